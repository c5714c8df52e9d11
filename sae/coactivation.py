"""Which features fire on the same tokens.

    cosine(i, j) = n_ij / sqrt(n_i n_j),     n_i tokens on which i fires, n_ij on which both do

the cosine of two features' activity (Ochiai 1957), between 0 and 1. Pairs of features are never laid out as L x L: the
active features of tokens are kept as they are, and counted for one block of features after another. Where the pairs on
all tokens are more than `max_pairs`, tokens are drawn at random, each with the same probability `share`, and n_ij is
the count on those over that probability; n_i are counted on all tokens always.

Shape letters: N tokens of a batch, L latents, K active latents a token, F features asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steersman.sae.base import SparseCode

MAX_PAIRS = 150_000_000
"""Pairs of features on single tokens that are counted: 150 000 tokens of 32 active features. They take seconds to count
and four bytes of memory for each active feature of a token."""
_BLOCK_PAIRS = 4_000_000
_SPARSE = 8


@dataclass(frozen=True, kw_only=True)
class CoActive:
    """A feature that fires on the tokens of another."""

    feature: int
    """Its id."""
    together: int
    """Tokens on which both fire; where tokens were drawn, estimated from those."""
    count: int
    """Tokens on which this one fires."""
    cosine: float
    """together / sqrt(count_i * count_j), between 0 and 1."""


class CoActiveTable(NamedTuple):
    """Of F features the n that fire with them most, best first. Where there are fewer the id is -1, the rest 0."""

    features: Tensor
    """[F, n] int64 feature ids."""
    together: Tensor
    """[F, n] int64 tokens on which both fire."""
    cosine: Tensor
    """[F, n] fp32."""

    def of(self, row: int, counts: Tensor) -> list[CoActive]:
        """The features beside that of one row; `counts` [L] are the tokens on which each feature fires."""
        columns = (part[row].tolist() for part in self)
        return [
            CoActive(feature=feature, together=together, count=int(counts[feature]), cosine=cosine)
            for feature, together, cosine in zip(*columns)
            if feature >= 0
        ]


class CoActivity:
    """The active features of tokens, in bounded memory, and from them who fires with whom."""

    def __init__(self, n_latents: int, only: Sequence[int] | None = None, max_pairs: int = MAX_PAIRS) -> None:
        """For an SAE of L latents; `only` the features that will be asked for (None: any)."""
        self.max_pairs = max_pairs
        self.share = 1.0
        """Probability with which each token was drawn: 1 for all of them."""
        self.n_tokens = 0
        """Ordinary tokens seen."""
        self.counts = torch.zeros(n_latents, dtype=torch.int64)
        """[L]: ordinary tokens on which each feature fires."""
        self._wanted = np.ones(n_latents, dtype=bool)
        if only is not None:
            self._wanted[:] = False
            self._wanted[np.asarray(only, dtype=np.int64)] = True
        self._features = [np.empty(0, dtype=np.int32)]
        self._lengths = [np.empty(0, dtype=np.int32)]
        self._pairs = [np.empty(0, dtype=np.int64)]
        self._draws = [np.empty(0)]
        self._total = 0
        self._generator = np.random.default_rng(0)

    def add(self, code: SparseCode, large: Tensor | None = None) -> None:
        """Count the code [N, K] of some tokens; those that are `large` [N] bool are left out."""
        active = code.active if large is None else code.active & ~large[:, None]
        active, indices = active.cpu().numpy(), code.indices.cpu().numpy()
        self.n_tokens += len(indices) if large is None else int((~large).sum())
        self.counts += torch.from_numpy(np.bincount(indices[active], minlength=len(self.counts)))
        wanted = (active & self._wanted[indices]).sum(axis=1)
        draws = self._generator.random(len(indices))
        kept = (wanted > 0) & (draws < self.share)
        lengths = active[kept].sum(axis=1, dtype=np.int32)
        self._features.append(indices[kept][active[kept]].astype(np.int32))
        self._lengths.append(lengths)
        self._pairs.append(lengths.astype(np.int64) * wanted[kept])
        self._draws.append(draws[kept])
        self._total += int(self._pairs[-1].sum())
        while self._total > self.max_pairs:
            self._thin()

    def _thin(self) -> None:
        """Keep each token with half the probability."""
        self.share /= 2
        features, lengths, pairs, draws = self._gathered()
        kept = draws < self.share
        self._features = [features[np.repeat(kept, lengths)]]
        self._lengths, self._pairs, self._draws = [lengths[kept]], [pairs[kept]], [draws[kept]]
        self._total = int(self._pairs[0].sum())

    def _gathered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        parts = (self._features, self._lengths, self._pairs, self._draws)
        features, lengths, pairs, draws = (np.concatenate(part) for part in parts)
        return features, lengths, pairs, draws

    def nearest(self, features: Sequence[int], n: int) -> CoActiveTable:
        """The `n` features that fire with each of `features` most."""
        active, lengths, _, _ = self._gathered()
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        of_token = np.repeat(np.arange(len(lengths)), lengths)
        order = np.argsort(active, kind="stable")
        tokens, ends = of_token[order], np.cumsum(np.bincount(active, minlength=len(self.counts)))
        asked = np.asarray(features, dtype=np.int64)
        first = ends[asked] - np.bincount(active, minlength=len(self.counts))[asked]
        size = np.array([lengths[tokens[a:b]].sum(dtype=np.int64) for a, b in zip(first, ends[asked])], dtype=np.int64)
        table = CoActiveTable(
            torch.full((len(asked), n), -1),
            torch.zeros(len(asked), n, dtype=torch.int64),
            torch.zeros(len(asked), n),
        )
        blocks = (np.cumsum(size) - size) // _BLOCK_PAIRS
        for block in np.unique(blocks):
            rows = np.flatnonzero(blocks == block)
            entries = [tokens[first[row] : ends[asked[row]]] for row in rows]
            here = np.concatenate(entries)
            partners = active[_ranges(starts[here], lengths[here])].astype(np.int64)
            owner = np.repeat(np.repeat(rows, [len(entry) for entry in entries]), lengths[here])
            if len(owner):  # none of these features fires
                self._fill(table, asked, owner, partners, n)
        return table

    def _fill(self, table: CoActiveTable, asked: np.ndarray, owner: np.ndarray, partners: np.ndarray, n: int) -> None:
        """Count the pairs of rows of the table and the features that fired beside theirs."""
        L = len(self.counts)
        first, span = int(owner[0]), int(owner[-1] - owner[0] + 1) * L
        keys = (owner - first) * L + partners
        if span <= _SPARSE * len(keys):  # counting in place is faster than sorting, which needs no place
            together = np.bincount(keys, minlength=span)
            pairs = np.flatnonzero(together)
            together = together[pairs]
        else:
            pairs, together = np.unique(keys, return_counts=True)
        row, other = pairs // L + first, pairs % L
        real = asked[row] != other
        row, other, together = row[real], other[real], together[real] / self.share
        counts = self.counts.numpy()
        cosine = np.minimum(1.0, together / np.sqrt(counts[asked[row]] * counts[other].astype(np.float64)))
        order = np.lexsort((other, -cosine, row))
        row, other, together, cosine = row[order], other[order], together[order], cosine[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        best = rank < n
        at = (torch.from_numpy(row[best]), torch.from_numpy(rank[best]))
        table.features[at] = torch.from_numpy(other[best])
        table.together[at] = torch.from_numpy(together[best].round().astype(np.int64))
        table.cosine[at] = torch.from_numpy(cosine[best].astype(np.float32))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of all ranges start..start + length, one after another."""
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(before - starts, lengths)
