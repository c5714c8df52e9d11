"""The features of two SAEs beside one another: how alike each pair is, and the best matching of one to one.

Similarities are made for blocks of rows. The assignment alone holds all L x M of them, 8 bytes each. What is compared,
and what the figures mean, is in `compare.py`.

Shape letters: L, M features of two SAEs, D width, N rows, K active features of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import SteersmanError
from steersman.files import format_bytes
from steersman.progress import progress
from steersman.sae.base import SAE, SparseCode
from steersman.sae.feature_labels import FeatureLabels
from steersman.sae.metrics import large_rows
from steersman.sae.neighbours import unit_rows

_ENTRIES = 1 << 22  # similarities made at once
_PRODUCTS = 1 << 22  # products of activations made at once
_ROWS = 8192
_CHANCE_SEED = 0x5AE_C0DE  # no seed that somebody trains with: SAEs begin as random rows too


class RowSource(Protocol):
    """What of an `ActivationStore` comparing activations needs."""

    def hook_of(self, sae: SAE) -> str: ...
    def width(self, hook: str | None = None) -> int: ...
    def stats(self, hook: str | None = None) -> Any: ...
    @property
    def n_batches(self) -> Callable[..., int]: ...
    @property
    def batches(self) -> Callable[..., Iterator[Any]]: ...


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """A feature that the other SAE does not have."""

    feature: int
    """Its id."""
    nearest: int
    """The feature of the other SAE that is most like it."""
    similarity: float
    """How much."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMatching:
    """The features of an SAE of L features beside those of one of M."""

    nearest: tuple[Tensor, Tensor]
    """[L] and [M] int64: of each feature the one of the other SAE that is most like it."""
    similarity: tuple[Tensor, Tensor]
    """[L] and [M] fp32: how much."""
    pairs: Tensor
    """[P, 2] int64: the matched features, most alike first; P = min(L, M), or fewer where `mcc` is None."""
    pair_similarity: Tensor
    """[P] fp32."""
    mcc: float | None
    """Mean similarity of the matched pairs. None where L x M is above `max_pairs`: the pairs are then those of which
    each is the other's nearest."""
    chance: float | None
    """`mcc` of the first SAE and as many random rows as the second has; None where there is no `mcc`, and of
    activations."""
    threshold: float
    """Similarity above which a pair is one feature."""

    @property
    def mean_max(self) -> tuple[float, float]:
        """The mean over the features of the first SAE of their nearest's similarity, and over those of the second."""
        first, second = (float(similarity.mean()) for similarity in self.similarity)
        return first, second

    @property
    def n_shared(self) -> int:
        """Matched pairs above the threshold."""
        return int((self.pair_similarity > self.threshold).sum())

    @property
    def shared(self) -> float:
        """The same as a share of the features of the SAE that has fewer."""
        return self.n_shared / min(len(part) for part in self.nearest)

    def unmatched(self, side: int) -> list[Unmatched]:
        """The features of the first (0) or second (1) SAE that are in no pair above the threshold, those least like any
        of the other first."""
        held = torch.zeros(len(self.nearest[side]), dtype=torch.bool)
        held[self.pairs[self.pair_similarity > self.threshold, side]] = True
        left = (~held).nonzero()[:, 0]
        left = left[self.similarity[side][left].argsort(stable=True)]
        columns = left, self.nearest[side][left], self.similarity[side][left]
        return [
            Unmatched(feature=feature, nearest=nearest, similarity=similarity)
            for feature, nearest, similarity in zip(*(column.tolist() for column in columns))
        ]

    def record(self, names: Sequence[str], labels: Sequence[FeatureLabels]) -> dict[str, Any]:
        """The figures as JSON."""
        sides = [
            [
                {"feature": one.feature, "label": labels[side].text(one.feature), "nearest": one.nearest,
                 "similarity": one.similarity}
                for one in self.unmatched(side)
            ]
            for side in (0, 1)
        ]  # fmt: skip
        return {
            "saes": list(names), "mean_max": list(self.mean_max), "mcc": self.mcc, "chance_mcc": self.chance,
            "shared": self.shared, "n_shared": self.n_shared, "unmatched": sides,
        }  # fmt: skip


class Similar:
    """The similarities of L features and M, in blocks of rows."""

    def __init__(self, shape: tuple[int, int], block: Callable[[int, int], Tensor]) -> None:
        self.shape, self._block = shape, block

    def blocks(self, absolute: bool) -> Iterator[tuple[int, Tensor]]:
        """(first row, similarities [rows, M]) of each block."""
        n = max(1, _ENTRIES // max(1, self.shape[1]))
        for start in range(0, self.shape[0], n):
            found = self._block(start, min(start + n, self.shape[0]))
            yield start, found.abs() if absolute else found


_SIDES = {"decoder": ("decoder",), "encoder": ("encoder",), "both": ("decoder", "encoder")}


def row_widths(sae: SAE, by: str) -> list[int]:
    """The widths of the rows that are compared."""
    return [sae.cfg.out_width if side == "decoder" else sae.cfg.d_in for side in _SIDES[by]]


def _rows_of(sae: SAE, by: str) -> Tensor:
    """[L, D], or [L, D + D'] of both sides: unit rows whose products are the similarities."""
    rows = torch.cat([unit_rows(sae, side) for side in _SIDES[by]], dim=1) / len(_SIDES[by]) ** 0.5
    if not bool(rows.isfinite().all()):
        raise SteersmanError(f"{sae}: weights that are not finite have no cosines")
    return rows


def _products(rows: Tensor, others: Tensor) -> Similar:
    return Similar((len(rows), len(others)), lambda start, stop: (rows[start:stop] @ others.T).clamp_(-1, 1))


@torch.no_grad()
def cosines(a: SAE, b: SAE, by: str) -> Similar:
    return _products(_rows_of(a, by), _rows_of(b, by).to(a.device))


@torch.no_grad()
def by_chance_of(a: SAE, b: SAE, by: str) -> Similar:
    """The similarities of a's rows to random ones, as many as b has."""
    g = torch.Generator().manual_seed(_CHANCE_SEED)
    parts = [F.normalize(torch.randn(b.cfg.d_sae, width, generator=g), dim=1) for width in row_widths(b, by)]
    return _products(_rows_of(a, by), torch.cat(parts, dim=1).to(a.device) / len(parts) ** 0.5)


@torch.no_grad()
def correlations(a: SAE, b: SAE, store: RowSource, tokens: int, max_pairs: int) -> Similar:
    """Pearson correlations of the activations of each feature of `a` with each of `b`, over rows of the store."""
    shape = a.cfg.d_sae, b.cfg.d_sae
    if shape[0] * shape[1] > max_pairs:
        raise SteersmanError(
            f"correlating {shape[0]:,} features with {shape[1]:,} holds {format_bytes(4 * shape[0] * shape[1])}, more "
            f"than max_pairs = {max_pairs:,} of them: raise it, or compare by weights"
        )
    cross = torch.zeros(shape, device=a.device)
    sums = [torch.zeros(2, size, dtype=torch.float64, device=a.device) for size in shape]
    n = 0
    for codes in _codes(a, b, store, tokens):
        n += len(codes[0].values)
        for total, code in zip(sums, codes):
            flat, values = code.indices.flatten(), code.values.flatten().double()
            total[0].index_add_(0, flat, values)
            total[1].index_add_(0, flat, values.square())
        _add_products(cross, *codes)
    means = [total[0] / max(1, n) for total in sums]
    deviations = [(total[1] / max(1, n) - mean.square()).clamp_min(0).sqrt() for total, mean in zip(sums, means)]

    def block(start: int, stop: int) -> Tensor:
        covariance = cross[start:stop].double() / max(1, n) - means[0][start:stop, None] * means[1]
        scale = deviations[0][start:stop, None] * deviations[1]
        return torch.where(scale > 0, covariance / scale, torch.zeros_like(scale)).clamp_(-1, 1).float()

    return Similar(shape, block)


def _codes(a: SAE, b: SAE, store: RowSource, tokens: int) -> Iterator[tuple[SparseCode, SparseCode]]:
    """The codes of both SAEs for the first ordinary rows of the store."""
    hooks = [store.hook_of(sae) for sae in (a, b)]
    apart = list(dict.fromkeys(hooks))
    widths, limits = [store.width(hook) for hook in apart], [store.stats(hook).large_norm for hook in apart]
    batches = store.batches(_ROWS, hook=apart, split="all", shuffle=False, drop_last=False)
    total = min(store.n_batches(_ROWS, split="all", drop_last=False), -(-tokens // _ROWS))
    left = tokens
    for batch in progress(batches, desc="activations", total=total, unit="batch"):
        parts = batch.x[:left].split(widths, dim=1)
        left -= len(parts[0])
        ordinary = ~torch.stack([large_rows(part, limit) for part, limit in zip(parts, limits)]).any(0)
        read = dict(zip(apart, (part[ordinary] for part in parts)))
        first, second = (sae.encode_sparse(read[hook].to(sae.device)) for sae, hook in zip((a, b), hooks))
        yield first, SparseCode(second.values.to(a.device), second.indices.to(a.device))
        if left <= 0:
            return


def _add_products(cross: Tensor, a: SparseCode, b: SparseCode) -> None:
    """Add the sums over rows of the products of activations, [L, M], of codes [N, K] and [N, K']."""
    n = max(1, _PRODUCTS // max(1, a.values.shape[1] * b.values.shape[1]))
    for start in range(0, len(a.values), n):
        part = slice(start, start + n)
        keys = a.indices[part, :, None] * cross.shape[1] + b.indices[part, None, :]
        products = a.values[part, :, None] * b.values[part, None, :]
        cross.view(-1).index_add_(0, keys.flatten(), products.flatten().float())


def matching(
    similar: Similar, chance: Similar | None, absolute: bool, threshold: float, max_pairs: int
) -> FeatureMatching:
    L, M = similar.shape
    assigned = max_pairs >= L * M
    cost = np.empty((L, M)) if assigned else None
    forward: list[tuple[Tensor, Tensor]] = []
    best, nearest = torch.full((M,), float("-inf")), torch.zeros(M, dtype=torch.int64)
    for start, found in similar.blocks(absolute):
        found = found.cpu()
        most, of = found.max(dim=1)
        forward.append((most, of))
        over, where = found.max(dim=0)
        better = over > best
        best, nearest = torch.where(better, over, best), torch.where(better, where + start, nearest)
        if cost is not None:
            np.negative(found.numpy(), out=cost[start : start + len(found)])
    similarity, to = (torch.cat([part[column] for part in forward]) for column in (0, 1))
    if cost is not None:
        pairs, values = _assigned(cost)
    else:  # each the other's nearest
        mutual = (nearest[to] == torch.arange(L)).nonzero()[:, 0]
        pairs, values = torch.stack([mutual, to[mutual]], dim=1), similarity[mutual]
    order = values.argsort(descending=True, stable=True)
    by_chance = None
    if cost is not None and chance is not None:
        for start, found in chance.blocks(absolute):
            np.negative(found.cpu().numpy(), out=cost[start : start + len(found)])
        by_chance = float(_assigned(cost)[1].double().mean())
    return FeatureMatching(
        nearest=(to, nearest),
        similarity=(similarity, best),
        pairs=pairs[order],
        pair_similarity=values[order],
        mcc=float(values.double().mean()) if assigned else None,
        chance=by_chance,
        threshold=threshold,
    )


def _assigned(cost: np.ndarray) -> tuple[Tensor, Tensor]:
    """The matching [min(L, M), 2] of least cost [L, M], and minus the cost of each pair, fp32."""
    from scipy.optimize import linear_sum_assignment  # here, as it takes long to load

    rows, columns = linear_sum_assignment(cost)
    pairs = torch.from_numpy(np.stack([rows, columns], axis=1).astype(np.int64))
    return pairs, torch.from_numpy(-cost[rows, columns]).float()
