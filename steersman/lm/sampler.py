"""Sampling many continuations of a few prompts, far wider than `generate` does: the engine behind effect measurements.

Two things make it fast where a thousand rows are continued at once. A prompt is read once, and the rows that continue
it copy its keys and values. Keys and values are written into buffers that are kept from one call to the next
(`kv_buffers`), and a row's next token is found from one uniform number (`sampling`).

Shape letters: B rows, P prompts, Q prefix rows (a prompt read under one steering), S tokens of a prompt, T new tokens,
D width, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm.clock import PassDone
from steersman.lm.generate import real_generated, stop_ids
from steersman.lm.kv_buffers import RowBuffers
from steersman.lm.model import LanguageModel
from steersman.lm.passes import ForwardPass
from steersman.lm.sampling import Sampling
from steersman.lm.tokens import TokenBatch

Observer = Callable[[int, Tensor, Tensor], None]
"""Called for each new token of every row with (step, hidden states [B, D], whether the row is unfinished [B] bool)."""


class Sampler:
    """Draws continuations of fixed prompts, `new_tokens` tokens each.

    `buffers` may be shared with other samplers that do not run at the same time. Raises SteersmanError for a model that
    is no decoder, and when prompt and new tokens exceed its context.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: TokenBatch,
        sampling: Sampling,
        new_tokens: int,
        buffers: RowBuffers | None = None,
    ) -> None:
        width = prompts.input_ids.shape[1]
        lm.check_decoder()
        if new_tokens < 1:
            raise SteersmanError(f"new_tokens must be at least 1, got {new_tokens}")
        if lm.context_length is not None and width + new_tokens > lm.context_length:
            raise SteersmanError(
                f"a prompt of {width} tokens and {new_tokens} new ones exceed the context of {lm.name}, "
                f"{lm.context_length} tokens: shorten the prompt or lower new_tokens"
            )
        self.lm, self.sampling, self.new_tokens = lm, sampling, new_tokens
        self.prompts = prompts.to(lm.device)
        self.padded = bool((self.prompts.attention_mask == 0).any())
        self.prompts.check_left_padded()
        self.stop_ids = stop_ids(lm.model.generation_config.eos_token_id)
        needed = width + new_tokens
        self.buffers = buffers if buffers is not None and buffers.room >= needed else RowBuffers(needed)

    @torch.no_grad()
    def run(
        self,
        prefix: Tensor,
        index: Tensor,
        uniform: Tensor,
        *,
        prefix_context: AbstractContextManager[Any] | None = None,
        row_context: AbstractContextManager[Any] | None = None,
        observe: tuple[str, Observer] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] int64 and their mask [B, T]: 1 up to and including a row's end token, padding after it.

        `prefix` [Q] names the prompt of each prefix row, `index` [B] the prefix row that each row continues, and
        `uniform` [B, T] are its random numbers. `prefix_context` is open while the Q prompts are read, `row_context`
        while the B rows go on: steering with per-row parameters has Q rows in the one and B in the other.

        `observe` names a hook point and an `Observer` of the states there, as they are before `row_context` edits
        them. What edits nothing below the hook point leaves those the states of the unsteered model.
        """
        rows = (row_context or nullcontext(), observe)
        with prefix_context or nullcontext():
            cache, logits = self._read(prefix)
        index = index.to(self.lm.device)
        for i, layer in enumerate(cache.layers):
            cache.layers[i] = self.buffers.rows(i, layer, index)
        return self._continue(cache, logits[index], prefix.to(self.lm.device)[index], uniform, *rows)

    def _read(self, prefix: Tensor) -> tuple[Any, Tensor]:
        """The keys and values of the prompts `prefix` [Q], and their logits [Q, V] for the first new token."""
        from transformers.cache_utils import DynamicCache

        prefix = prefix.to(self.lm.device)
        cache = DynamicCache(config=self.lm.config)
        mask = self.prompts.attention_mask[prefix]
        return cache, self._forward(self.prompts.input_ids[prefix], cache, mask, mask.cumsum(1) - 1)

    def _forward(self, ids: Tensor, cache: Any, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] after the last of the tokens `ids` [B, n]."""
        inputs: dict[str, Any] = {"input_ids": ids, self.lm.cache_name: cache, "use_cache": True}
        if self.padded:
            inputs["attention_mask"] = mask
            if self.lm.accepts("position_ids"):
                inputs["position_ids"] = positions.clamp(min=0)
        if self.lm.accepts("logits_to_keep"):
            inputs["logits_to_keep"] = 1
        return self.lm.model(**inputs).logits[:, -1]

    def _continue(
        self,
        cache: Any,
        logits: Tensor,
        prompt: Tensor,
        uniform: Tensor,
        context: AbstractContextManager[Any],
        observe: tuple[str, Observer] | None,
    ) -> tuple[Tensor, Tensor]:
        B, T = uniform.shape
        device = self.lm.device
        uniform = uniform.to(device)
        width = self.prompts.input_ids.shape[1]
        mask = torch.ones(B, width + T, dtype=torch.long, device=device)
        mask[:, :width] = self.prompts.attention_mask[prompt]
        length = self.prompts.lengths[prompt][:, None]
        tokens = torch.empty(B, T, dtype=torch.long, device=device)
        going = torch.ones(B, dtype=torch.bool, device=device)
        step = 0

        def look(h: Tensor, _fwd: ForwardPass) -> Tensor:
            assert observe is not None
            observe[1](step, h[:, -1], going)
            if step == T - 1:
                raise PassDone  # no token follows the last: what lies above the hook point is not needed
            return h

        with ExitStack() as stack:
            if observe is not None:
                stack.enter_context(self.lm.edit(observe[0], look))  # entered first: it sees what comes before edits
            stack.enter_context(context)
            for step in range(T):
                tokens[:, step] = chosen = self.sampling.draw(logits, uniform[:, step])
                for stop in self.stop_ids:
                    going = going & (chosen != stop)
                if step == T - 1 and observe is None:
                    break
                with suppress(PassDone):
                    logits = self._forward(chosen[:, None], cache, mask[:, : width + step + 1], length + step)
        real = real_generated(tokens, self.stop_ids)
        pad = self.lm.pad_token_id
        return (tokens if pad is None else tokens.masked_fill(real == 0, pad)), real
