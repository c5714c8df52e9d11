"""One decoding stream: a batch of prompts under a KV cache, fed token by token by whoever chooses the tokens.

What `generate` does with one stream, decoders that need several do with a `Session` each: mixtures of logits feed the
same tokens to all, particles copy and reorder the rows of theirs. A session may run under edits that its neighbours
know nothing of: its `context` is open around each of its own passes and closed between them.

Shape letters: P prompts, B rows (P times the copies, those of one prompt side by side), S tokens so far, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm.generate import stop_ids
from steersman.lm.model import LanguageModel
from steersman.lm.passes import GenerationRun
from steersman.lm.tokens import Prompt, TokenBatch
from steersman.lm.unwinding import Unwinding


class Session:
    """Prompts that are being continued, each in `copies` rows.

    To the edits that `context()` opens it is one call of `generate` with `num_return_sequences=copies`: scopes,
    absolute positions, per-row parameters and generated steps are the same, also where several sessions take turns.
    Tokens after the first end token of a row (`stop`; by default those of the model) are padding, which no edit
    touches.

    Args:
        lm: the model; a decoder with a KV cache.
        prompts: left-padded tokens and mask [P, S], as from `lm.encode(texts, padding_side="left")`, or the texts.
        copies: rows for each prompt.
        context: opens what steers this stream, anew for each pass. The same context object may be returned every time:
            then its trace begins anew too.
        stop: ids that end a row.

    Raises SteersmanError for a model that is no decoder or keeps no cache of keys and values, prompts padded on the
    right, and for more tokens than its context holds.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: TokenBatch | Sequence[Prompt] | str,
        *,
        copies: int = 1,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        stop: Sequence[int] | None = None,
    ) -> None:
        lm.check_decoder()
        if not lm.accepts(lm.cache_name):
            raise SteersmanError(f"{lm.name} keeps no cache of keys and values: it cannot be decoded token by token")
        if copies < 1:
            raise SteersmanError(f"copies must be at least 1, got {copies}")
        batch = prompts if isinstance(prompts, TokenBatch) else lm.encode(prompts, padding_side="left")
        batch = batch.to(lm.device)
        batch.check_left_padded()
        self.lm = lm
        self.context = context or nullcontext
        self.stop_ids = stop_ids(lm.model.generation_config.eos_token_id) if stop is None else [int(t) for t in stop]
        self.prompt_columns = batch.input_ids.shape[1]
        self.padded = bool((batch.attention_mask == 0).any())
        if self.padded:
            lm.check_left_padding()
        self.tokens, self.mask = batch.input_ids, batch.attention_mask
        self.finished = torch.zeros(len(self.tokens), dtype=torch.bool, device=lm.device)
        """[B] bool: rows that were fed an end token."""
        spans = batch.spans or lm.clock.spans()
        self.run = GenerationRun(len(self.tokens), self.prompt_columns, self.mask, self.stop_ids, 1, spans)
        lm.clock.numbered(self.run)
        self.cache = _new_cache(lm)
        self.logits = self._forward(self.tokens)
        """[B, V] fp32: for the next token of each row."""
        if copies > 1:
            self._select(torch.arange(len(self.tokens), device=lm.device).repeat_interleave(copies))

    @property
    def rows(self) -> int:
        """B."""
        return len(self.tokens)

    @property
    def prompt_length(self) -> Tensor:
        """[B] int64: real tokens of each row's prompt."""
        return self.mask[:, : self.prompt_columns].sum(1)

    @property
    def new_tokens(self) -> Tensor:
        """[B, T] int64: what was fed after the prompts."""
        return self.tokens[:, self.prompt_columns :]

    def feed(self, chosen: Tensor) -> Tensor:
        """Continue each row by the tokens `chosen`, [B] or [B, n]; the logits [B, V] for the next. What a finished row
        is fed is of no consequence."""
        chosen = torch.as_tensor(chosen, device=self.lm.device).long()
        chosen = chosen[:, None] if chosen.ndim == 1 else chosen
        if chosen.ndim != 2 or len(chosen) != self.rows or chosen.shape[1] < 1:
            raise SteersmanError(f"feed takes a token for each of {self.rows} rows, got shape {tuple(chosen.shape)}")
        self.tokens = torch.cat([self.tokens, chosen], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(chosen)], dim=1)
        self.logits = self._forward(chosen)
        for stop in self.stop_ids:
            self.finished = self.finished | (chosen == stop).any(1)
        if self.rows > 1 and self.stop_ids:
            self.run.unfinished = ~self.finished[:, None]
        return self.logits

    def reorder(self, ancestors: Tensor) -> None:
        """Row b becomes a copy of row `ancestors[b]` [B], which must continue the same prompt."""
        ancestors = torch.as_tensor(ancestors, device=self.lm.device).long()
        each = self.rows // self.run.rows
        own = torch.arange(len(ancestors), device=self.lm.device) // each
        if len(ancestors) != self.rows or bool((ancestors // each != own).any()):
            raise SteersmanError("a row can only become a copy of one that continues the same prompt")
        self._select(ancestors)

    def fork(self, context: Callable[[], AbstractContextManager[Any]] | None = None, *, copies: int = 1) -> "Session":
        """A session that continues from here by itself, under a `context` of its own, each row `copies` times side by
        side: what was read so far is read once for all of them."""
        if copies < 1:
            raise SteersmanError(f"copies must be at least 1, got {copies}")
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        other.run = copy.copy(self.run)
        other.context = context or nullcontext
        self.lm.clock.numbered(other.run)
        if copies > 1:
            other._select(torch.arange(self.rows, device=self.lm.device).repeat_interleave(copies))
        return other

    def _select(self, index: Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.tokens, self.mask, self.finished = self.tokens[index], self.mask[index], self.finished[index]
        self.logits = self.logits[index]
        if self.run.unfinished is not None:
            self.run.unfinished = self.run.unfinished[index]

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        lm, width = self.lm, self.tokens.shape[1]
        if lm.context_length is not None and width > lm.context_length:
            raise SteersmanError(f"{width} tokens exceed the context of {lm.name}, {lm.context_length} tokens")
        inputs: dict[str, Any] = {"input_ids": ids, lm.cache_name: self.cache, "use_cache": True}
        if self.padded:
            inputs |= lm.padded_inputs(self.mask, ids.shape[1])
        if lm.accepts("logits_to_keep"):
            inputs["logits_to_keep"] = 1
        with Unwinding() as stack:
            stack.enter_context(self.context())
            lm.clock.resume(self.run, stack)
            self.run.seen, self.run.history = width - ids.shape[1], self.tokens
            return lm.model(**inputs).logits[:, -1].float()


def _new_cache(lm: LanguageModel) -> Any:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=lm.config)
