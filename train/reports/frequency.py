"""How often the token of a row is among the rows that are trained on: rare tokens are rebuilt worse than frequent ones,
and a mean over all rows is mostly of the frequent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.train.store.store import ActivationStore

BOUNDS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Shares of the rows at which one bucket ends and the next begins, most frequent first; the last has no lower bound."""
MAX_COUNTED = 10_000_000
"""Rows whose tokens are counted, at most: pieces spread over the store."""
_PIECE = 65_536
_LARGEST = 1 << 22  # no vocabulary is larger: ids above it count as one


class TokenFrequency:
    """The bucket of each token, by its share of the training rows of a store."""

    def __init__(self, store: ActivationStore, heldout_fraction: float, bounds: Sequence[float] = BOUNDS) -> None:
        self.bounds = tuple(bounds)
        start, stop = store.split_rows("train", heldout_fraction)
        if stop <= start:
            start, stop = store.split_rows("all")
        firsts = range(start, stop, _PIECE)
        firsts = firsts[:: max(1, -(-(stop - start) // MAX_COUNTED))]
        counts, n = torch.zeros(0, dtype=torch.int64), 0
        for first in firsts:
            ids = store.tokens(first, min(first + _PIECE, stop)).token_ids.long().clamp(0, _LARGEST)
            n += len(ids)
            here = torch.bincount(ids, minlength=len(counts))
            here[: len(counts)] += counts
            counts = here
        self.known = int((counts > 0).sum()) > 1
        """Whether rows are of different tokens; a store of rows from elsewhere may know none."""
        share = counts.double() / max(1, n)
        self._bucket = (share[:, None] < torch.tensor(self.bounds, dtype=torch.float64)).sum(dim=1)

    @property
    def n_buckets(self) -> int:
        return len(self.bounds) + 1

    def bucket(self, token_ids: Tensor) -> Tensor:
        """The bucket of each of token_ids [N], [N] int64: 0 the most frequent; unknown tokens are in the last."""
        ids = token_ids.long()
        seen = (ids >= 0) & (ids < len(self._bucket))
        return torch.where(seen, self._bucket[ids.clamp(0, len(self._bucket) - 1)], self.n_buckets - 1)
