"""The order that a shuffling buffer gives, known before any row is: it is filled and permuted, its first half given out
and its place filled again, stage after stage."""

from dataclasses import dataclass, field

import numpy as np


def stage_order(n_rows: int, seed: int, epoch: int, stage: int) -> np.ndarray:
    """The permutation of the `n_rows` that are in the buffer at a stage."""
    return np.random.default_rng([seed, epoch, stage]).permutation(n_rows)


@dataclass(frozen=True)
class NeededRows:
    """Which rows must be computed: those in `early` (sorted), and all from `frontier` on."""

    early: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    frontier: int = 0

    def any(self, start: int, stop: int) -> bool:
        """Whether any row of start..stop is needed."""
        low, high = np.searchsorted(self.early, (start, stop))
        return bool(stop > self.frontier or high > low)


def needed_rows(size: int, half: int, seed: int, epoch: int, skip: int) -> NeededRows:
    """The rows that a buffer still holds when all but the last whole half of the first `skip` rows were given out.

    One half more than the batches to come need is kept, because a text that ends there empties the buffer at once.
    """
    stages = max(skip // half - 1, 0)
    rows = np.arange(size)
    for stage in range(stages):
        mixed = stage_order(size, seed, epoch, stage)
        fresh = np.arange(size + stage * half, size + (stage + 1) * half)
        rows = np.concatenate([rows[mixed[half:]], fresh])
    return NeededRows(np.sort(rows), size + stages * half)
