"""Editing what attention looks at: a bias on chosen keys, in chosen heads.

A bias log a multiplies a key's attention weight by a before the weights are normalised again; -inf takes the key away.

Shape letters: B rows, H heads, S queries (the tokens of the pass), K keys, P positions; R rows of parameters.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.steer.edits.base import Edit, PerRow, Saved, blend, common_rows, per_row

Window = tuple[int, int | None]
"""A half-open window of absolute positions; None as its end is open."""
Keys = Window | Sequence[Window] | Tensor
"""Which keys: a window or several, or a bool table [P], [R, P] or (for each head its own) [R, H, P] of positions, of
which those behind its end are not chosen. Positions count real tokens, the BOS at 0."""


class AttentionBiasEdit(Edit):
    """scores[b, n, q, k] + bias_b for the heads n in `heads` and the keys k in `keys`, at a `hook_attn_mask`.

    The tokens in scope are the queries q whose attention is changed. Heads are query heads, also where several share
    their keys and values. A query that -inf would leave without any key keeps the attention it has.

    Args:
        bias: a number or one per row; -inf is allowed.
        keys: see `Keys`.
        heads: which heads; None for all.

    >>> edit = AttentionBiasEdit(-4.6, keys=[(1, 5), (9, None)], heads=[0, 3])  # a hundredth of the weight
    """

    name = "attention_bias"

    def __init__(self, bias: PerRow, keys: Keys, heads: Sequence[int] | None = None) -> None:
        given = torch.as_tensor(bias, dtype=torch.float32)
        removed = given == -torch.inf
        finite = per_row(given.masked_fill(removed, 0.0), "bias", given.device)
        self.removed = removed.reshape(-1)  # [1] or [R]: rows of which the keys are taken away
        self.bias = finite.masked_fill(self.removed, -torch.inf)
        self.heads = None if heads is None else sorted({int(head) for head in heads})
        self.table: Tensor | None = None
        self.windows: list[Window] = []
        if isinstance(keys, Tensor):
            if keys.ndim not in (1, 2, 3):
                raise SteersmanError(f"a table of keys must be [P], [R, P] or [R, H, P], got {tuple(keys.shape)}")
            self.table = keys.bool() if keys.ndim == 3 else keys.bool().reshape(-1, 1, keys.shape[-1])
        else:
            self.windows = _windows(keys)
        if self.heads == []:
            raise SteersmanError("an attention bias needs at least one head: leave out heads= for all of them")
        self.rows = common_rows(bias=len(self.bias), keys=1 if self.table is None else len(self.table))
        self.active = (self.bias != 0).expand(self.rows)
        if self.table is not None:
            self.active = self.active & self.table.flatten(1).any(1)
        self.keys = keys  # as given: edits of several layers may share it, and what is found for it in a pass
        self.removes = bool(self.removed.any())

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        if point.kind != "hook_attn_mask":
            raise SteersmanError(f"an attention bias is added at a hook_attn_mask, not at {point.name}")
        if self.heads is not None and not 0 <= self.heads[0] <= self.heads[-1] < point.width:
            raise SteersmanError(f"heads {self.heads}: {lm.name} has {point.width} (0 to {point.width - 1})")
        if self.table is not None and self.table.shape[1] not in (1, point.width):
            raise SteersmanError(f"a table of keys for {self.table.shape[1]} heads: {lm.name} has {point.width}")

    def saved(self) -> Saved:
        settings = {"windows": [list(window) for window in self.windows], "heads": self.heads}
        return Saved(settings, {"bias": self.bias} | ({} if self.table is None else {"keys": self.table}))

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        windows = [(start, stop) for start, stop in saved.settings["windows"]]
        return cls(saved.tensors["bias"], saved.tensors.get("keys", windows), saved.settings["heads"])

    def scaled(self, factor: PerRow) -> "AttentionBiasEdit":
        factors = per_row(factor, "factor", self.bias.device)
        common_rows(bias=len(self.bias), factor=len(factors))
        removed = self.removed & (factors != 0)  # at every other factor a key taken away is so
        bias = (self.bias.masked_fill(self.removed, 0.0) * factors).masked_fill(removed, -torch.inf)
        return AttentionBiasEdit(bias, self.keys, self.heads)

    def chosen(self, fwd: ForwardPass, n_keys: int) -> Tensor:
        """[B, H or 1, K] bool: the keys that are biased."""
        key = (AttentionBiasEdit, id(self.keys), n_keys)
        if key not in fwd.memo:
            fwd.memo[key] = self._chosen(fwd, n_keys)
        return fwd.memo[key]

    def _chosen(self, fwd: ForwardPass, n_keys: int) -> Tensor:
        position = fwd.key_positions
        # A layer with a window may keep its last keys alone; a static cache has room behind those so far.
        position = position[:, -n_keys:]
        position = pad(position, (0, n_keys - position.shape[1]), value=-1)
        if self.table is not None:
            table = self.table.to(position.device)
            table = table if len(table) == 1 else self.expand(table, fwd)
            B, H, P = len(position), table.shape[1], table.shape[2]
            inside = ((position >= 0) & (position < P))[:, None]
            at = position.clamp(0, P - 1)[:, None].expand(-1, H, -1)
            return inside & table.expand(B, -1, -1).gather(2, at)
        chosen = torch.zeros_like(position, dtype=torch.bool)
        for start, stop in self.windows:
            inside = position >= start
            chosen |= inside if stop is None else inside & (position < stop)
        return chosen[:, None]

    def added(self, fwd: ForwardPass, n_heads: int, n_keys: int, like: Tensor) -> Tensor:
        """[B, H or 1, 1, K]: the bias of every key, in the dtype and on the device of `like`; once a pass."""
        key = (self, n_keys, like.dtype)
        if key not in fwd.memo:
            chosen = self.chosen(fwd, n_keys).to(like.device)[:, :, None]
            bias = self.bias.to(like.device, like.dtype)
            bias = (bias if len(bias) == 1 else self.expand(bias, fwd))[:, None, None, None]
            if self.heads is not None:
                in_heads = torch.zeros(n_heads, dtype=torch.bool, device=like.device)
                in_heads[self.heads] = True
                chosen = chosen & in_heads[:, None, None]
            fwd.memo[key] = torch.where(chosen, bias, 0.0)
        return fwd.memo[key]

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        least = torch.finfo(h.dtype).min
        new = (h + self.added(fwd, h.shape[1], h.shape[-1], h)).clamp_(min=least)
        if self.removes:
            new = torch.where((new > least).any(-1, keepdim=True), new, h)
        return blend(h, new, where)


def _windows(keys: Window | Sequence[Window]) -> list[Window]:
    one = isinstance(keys, tuple) and len(keys) == 2 and isinstance(keys[0], int)
    given: list[Any] = [keys] if one else list(keys)
    for window in given:
        if not (isinstance(window, tuple) and len(window) == 2 and isinstance(window[0], int)):
            raise SteersmanError(f"keys must be windows (start, stop) or a bool table [P] or [R, P], got {window!r}")
        start, stop = window
        if start < 0 or (stop is not None and stop <= start):
            raise SteersmanError(f"window {start}:{stop} is empty: positions are counted from 0, start before stop")
    if not given:
        raise SteersmanError("an attention bias needs at least one window of keys")
    return given
