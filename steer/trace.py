"""The trace of an edit: which (row, position) pairs it steered."""

import torch
from torch import Tensor

from steersman.lm import ForwardPass

FOLD_EVERY = 256  # passes kept back before they are counted: reading the device at every decoding step would be slow


class Trace:
    """Counts the distinct (row, position) pairs that were steered while a context was open.

    Each call of `generate`, and each forward pass outside it that starts a text anew, counts as a text of its own.
    Within a text a pair counts once, so that generating without a cache, which passes over the same tokens again and
    again, gives the same trace as with it.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._pending: list[tuple[int, int, tuple[int, int], Tensor | bool]] = []
        self._finished = 0
        self._grid: Tensor | None = None
        self._sequence = -1
        self._last: ForwardPass | None = None

    def record(self, fwd: ForwardPass, where: Tensor | bool) -> None:
        """Note the tokens [B, S] steered in a pass; True stands for all of them."""
        self.passes += 1
        self._last = fwd
        self._pending.append((fwd.sequence, fwd.past, (fwd.batch, fwd.length), where))
        if len(self._pending) >= FOLD_EVERY:
            self._fold()

    def _fold(self) -> None:
        self._pending.sort(key=lambda entry: entry[0])  # texts of several threads come mixed
        for sequence, past, (batch, length), where in self._pending:
            if self._grid is None or sequence != self._sequence:
                self._finished += 0 if self._grid is None else int(self._grid.sum())
                self._grid, self._sequence = torch.zeros(batch, 0, dtype=torch.bool), sequence
            elif batch != len(self._grid):  # the prompts were read once, and their rows copied since
                self._grid = self._grid.repeat_interleave(batch // len(self._grid), dim=0)
            end = past + length
            if self._grid.shape[1] < end:
                new = torch.zeros(batch, end - self._grid.shape[1], dtype=torch.bool)
                self._grid = torch.cat([self._grid, new], dim=1)
            self._grid[:, past:end] |= where if isinstance(where, bool) else where.cpu()
        self._pending.clear()

    @property
    def count(self) -> int:
        """Number of distinct (row, position) pairs steered, over all texts."""
        self._fold()
        return self._finished + (0 if self._grid is None else int(self._grid.sum()))

    @property
    def rows(self) -> list[int]:
        """Steered positions per row of the latest text."""
        self._fold()
        return [] if self._grid is None else self._grid.sum(1).tolist()

    def pairs(self) -> list[tuple[int, int]]:
        """The steered (row, absolute position) pairs of the latest text, in order."""
        self._fold()
        if self._grid is None or self._last is None:
            return []
        columns = torch.arange(self._grid.shape[1]).expand(self._grid.shape[0], -1)
        if self._last.mask is not None:
            columns = (self._last.mask.cpu().long().cumsum(1) - 1)[:, : self._grid.shape[1]]
        rows, where = self._grid.nonzero(as_tuple=True)
        return [(int(r), int(columns[r, c])) for r, c in zip(rows, where)]

    def __repr__(self) -> str:
        return f"Trace({self.count} positions steered in {self.passes} passes)"
