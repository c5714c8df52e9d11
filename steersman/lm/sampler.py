"""Sampling many continuations of a few prompts, far wider than `generate` does: the engine behind effect measurements.

Three things make it fast where a thousand rows go on at once. A prompt is read once, and the rows that go on with it
copy its keys and values. Keys and values are written into buffers that are kept from one call to the next, where
`generate` makes a longer copy of them for each token. And a row's next token is found from one uniform number by
inverting its distribution, so that what a row becomes is decided by its own numbers and not by its neighbours'.

Shape letters: B rows, P prompts, Q prefix rows (a prompt read under one steering), S tokens of a prompt, T new tokens,
D width, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm.clock import Pass
from steersman.lm.generate import real_generated
from steersman.lm.model import LanguageModel, _PassDone
from steersman.lm.tokens import TokenBatch

Observer = Callable[[int, Tensor, Tensor], None]
"""Called for each new token of every row with (step, hidden states [B, D], whether the row's text goes on [B] bool)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: temperature first, then the `top_k` likeliest, then the nucleus `top_p` of those."""

    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; None keeps all."""
    top_p: float | None = None
    """Keep the smallest set of the likeliest tokens with at least this probability; None keeps all."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SteersmanError(f"sampling needs a temperature above 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise SteersmanError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SteersmanError(f"top_p must lie in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Token ids [B] from logits [B, V] and one number in [0, 1) for each row, `uniform` [B].

        >>> logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
        >>> [int(Sampling().draw(logits, torch.tensor([u]))) for u in (0.1, 0.3, 0.9)]
        [0, 1, 2]
        >>> [int(Sampling(top_k=2).draw(logits, torch.tensor([u]))) for u in (0.1, 0.6, 0.9)]
        [1, 1, 2]
        """
        scaled, ids = logits.float(), None
        if self.temperature != 1:
            scaled = scaled / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            scaled, ids = largest(scaled, self.top_k)
        elif self.top_p is not None and self.top_p < 1:
            scaled, ids = scaled.sort(dim=-1, descending=True)
        p = scaled.softmax(-1)
        total = p.cumsum(-1)
        if self.top_p is not None and self.top_p < 1:
            # A token stays when those before it do not reach top_p; the first one always does.
            n_kept = (total - p < self.top_p).sum(-1, keepdim=True)
        else:
            n_kept = torch.full_like(total[:, :1], total.shape[-1], dtype=torch.long)
        mass = total.gather(1, n_kept - 1)
        place = torch.searchsorted(total, uniform.to(mass)[:, None] * mass, right=True)
        place = torch.minimum(place, n_kept - 1)
        return (place if ids is None else ids.gather(1, place))[:, 0]


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x [B, V] and their columns, [B, k], in falling order.

    As `x.topk(k)`; on the CPU numpy's vectorised partition finds the k-th largest several times faster.

    >>> largest(torch.tensor([[3.0, 9.0, 5.0, 4.0]]), 2)
    (tensor([[9., 5.]]), tensor([[1, 2]]))
    """
    if x.device.type != "cpu" or x.shape[0] < 64:
        return _sorted_topk(x, k)

    least = torch.from_numpy(np.partition(x.numpy(), -k, axis=1)[:, -k].copy())
    columns = (x >= least[:, None]).nonzero()[:, 1]
    if len(columns) != k * len(x):  # ties for the last place (or NaN): more than k in some row
        return _sorted_topk(x, k)
    columns = columns.view(-1, k)
    values, order = x.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _sorted_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = torch.topk(x, k, dim=-1)
    return values, columns


def _buffer_layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class BufferLayer(DynamicLayer):
        """Keys and values of one layer as views into buffers with room for all tokens to come.

        The buffers are [room, B, heads, head width]: a token is written in one piece, and read fastest so.
        """

        def __init__(self, room: int) -> None:
            super().__init__()
            self.room = room
            self._store: tuple[Tensor, Tensor] | None = None

        def take(self, layer: Any, index: Tensor) -> "BufferLayer":
            """Start anew with rows `index` of what `layer` holds."""
            self.lazy_initialization(layer.keys, layer.values)
            rows, (_, heads, length, _) = len(index), layer.keys.shape
            if self._store is None or self._store[0].shape[1] < rows:
                self._store = (
                    layer.keys.new_empty(self.room, rows, heads, layer.keys.shape[-1]),
                    layer.values.new_empty(self.room, rows, heads, layer.values.shape[-1]),
                )
            for kept, given in zip(self._store, (layer.keys, layer.values)):
                kept[:length, :rows] = given.permute(2, 0, 1, 3)[:, index]
            self._show(rows, length)
            return self

        def _show(self, rows: int, length: int) -> None:
            assert self._store is not None
            self.keys, self.values = (kept[:length, :rows].permute(1, 2, 0, 3) for kept in self._store)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            assert self._store is not None
            assert self.keys is not None
            rows, old = self.keys.shape[0], self.keys.shape[2]
            end = old + key_states.shape[2]
            self._store[0][old:end, :rows] = key_states.permute(2, 0, 1, 3)
            self._store[1][old:end, :rows] = value_states.permute(2, 0, 1, 3)
            self._show(rows, end)
            assert self.values is not None
            return self.keys, self.values

    return BufferLayer


class RowBuffers:
    """Room for the keys and values of the rows of a batch, kept from one batch to the next; samplers may share it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._layers: list[Any] = []

    def rows(self, i: int, layer: Any, index: Tensor) -> Any:
        """A cache layer that goes on with rows `index` of layer number `i` of a model."""
        from transformers.cache_utils import DynamicLayer

        if type(layer) is not DynamicLayer:  # sliding windows and other kinds keep their own rules
            layer.reorder_cache(index)
            return layer
        while len(self._layers) <= i:
            self._layers.append(_buffer_layer_class()(self.room))
        return self._layers[i].take(layer, index)


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
        if not lm.can_generate:
            raise SteersmanError(f"{lm.name} ({type(lm.model).__name__}) cannot generate text: it is not a decoder")
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
        if self.padded and bool((self.prompts.attention_mask[:, -1] == 0).any()):
            raise SteersmanError("prompts to continue are padded on the left: encode them with padding_side='left'")
        eos = lm.model.generation_config.eos_token_id
        self.stop_ids = [] if eos is None else [int(e) for e in torch.as_tensor(eos).flatten().tolist()]
        self._takes = set(lm._clock.parameters)
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

        `prefix` [Q] names the prompt of each prefix row, `index` [B] the prefix row that each row goes on with, and
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
        inputs: dict[str, Any] = {"input_ids": ids, self.lm._clock.cache_name: cache, "use_cache": True}
        if self.padded:
            inputs["attention_mask"] = mask
            if "position_ids" in self._takes:
                inputs["position_ids"] = positions.clamp(min=0)
        if "logits_to_keep" in self._takes:
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

        def look(h: Tensor, _now: Pass) -> Tensor:
            assert observe is not None
            observe[1](step, h[:, -1], going)
            if step == T - 1:
                raise _PassDone  # no token follows the last: what lies above the hook point is not needed
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
                with suppress(_PassDone):
                    logits = self._forward(chosen[:, None], cache, mask[:, : width + step + 1], length + step)
        real = real_generated(tokens, self.stop_ids)
        pad = self.lm.pad_token_id
        return (tokens if pad is None else tokens.masked_fill(real == 0, pad)), real
