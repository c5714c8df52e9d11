"""Features near one another, and near a direction: cosines of decoder rows or of encoder rows.

    decoder:  cos(d_i, d_j)     what the features write
    encoder:  cos(e_i, e_j)     what they read

Cosines are made for a block of rows at a time; L x L of them are never held.

Shape letters: F rows asked for, L latents, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae.base import SAE

__all__ = ["Nearest", "Neighbour", "Sides", "feature_neighbours", "nearest_features"]

Sides = Literal["decoder", "encoder"]
"""Whose rows are compared."""
Sign = Literal["positive", "negative", "both"]
"""Which cosines come first: the highest, the lowest, or the largest in size."""
_ENTRIES = 1 << 24  # cosines held at once


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A feature near another, or near a direction."""

    feature: int
    """Its id."""
    cosine: float
    """Cosine of the two, -1 to 1."""


class Nearest(NamedTuple):
    """For F rows the n features nearest each, nearest first."""

    features: Tensor
    """[F, n] int64 feature ids."""
    cosines: Tensor
    """[F, n] fp32."""

    def of(self, row: int) -> list[Neighbour]:
        """The features near one row."""
        pairs = zip(self.features[row].tolist(), self.cosines[row].tolist())
        return [Neighbour(feature=feature, cosine=cosine) for feature, cosine in pairs]


@torch.no_grad()
def feature_neighbours(
    sae: SAE, features: Sequence[int] | None = None, n: int = 10, *, by: Sides = "decoder", sign: Sign = "positive"
) -> Nearest:
    """The `n` features nearest each of `features` (None: all, in order), itself left out.

    Raises SteersmanError for a feature out of range and an unknown `by`.

    >>> from steersman.sae import SAEConfig
    >>> feature_neighbours(SAE(SAEConfig(d_in=4, d_sae=8, k=2)), [3], n=2).features.shape
    torch.Size([1, 2])
    """
    rows = unit_rows(sae, by)
    for feature in features or ():
        sae.check_feature(feature)
    ids = torch.arange(len(rows)) if features is None else torch.tensor(list(features), dtype=torch.int64)
    return _nearest(rows, rows, ids, n, sign)


@torch.no_grad()
def nearest_features(
    sae: SAE, directions: Tensor, n: int = 10, *, by: Sides = "decoder", sign: Sign = "positive"
) -> Nearest:
    """The `n` features whose decoder (or encoder) rows are nearest each of `directions`, [D] or [F, D].

    Raises SteersmanError for a direction of another width, of zeros or with entries that are not finite.
    """
    rows = unit_rows(sae, by)
    given = torch.atleast_2d(directions.detach()).to(rows.device).float()
    if given.ndim != 2 or given.shape[1] != rows.shape[1]:
        raise SteersmanError(
            f"directions of shape {tuple(directions.shape)} do not fit {by} rows of width {rows.shape[1]}"
        )
    if not bool(given.isfinite().all()) or not bool(given.any(dim=1).all()):
        raise SteersmanError("a direction must be finite and not zero: there is nothing near it otherwise")
    return _nearest(torch.nn.functional.normalize(given, dim=1), rows, None, n, sign)


class Crowding(NamedTuple):
    """How alike an SAE's features are to one another."""

    mean_abs: float
    """Mean |cosine| over all pairs of features: lowest near the right L0, where features mix least (c_dec of arXiv
    2508.16560). In D dimensions random rows have sqrt(2 / (pi D)), about."""
    nearest: float
    """Mean over the features of the largest cosine to another; of a signed code the largest |cosine|."""


@torch.no_grad()
def crowding(sae: SAE, *, by: Sides = "decoder", max_rows: int = 16_384) -> Crowding:
    """How alike the features of an SAE are to one another, in blocks; of more than `max_rows` features those drawn with
    a fixed seed, each compared with all.

    >>> from steersman.sae import SAEConfig
    >>> crowding(SAE(SAEConfig(d_in=64, d_sae=128, k=2))).mean_abs < 0.15
    True
    """
    rows = unit_rows(sae, by)
    L = len(rows)
    ids = torch.arange(L) if max_rows >= L else torch.randperm(L, generator=torch.Generator().manual_seed(0))[:max_rows]
    total = torch.zeros(2, dtype=torch.float64, device=rows.device)
    for part in ids.to(rows.device).split(max(1, _ENTRIES // max(1, L))):
        cosines = rows[part] @ rows.T
        size = cosines.abs().scatter_(1, part[:, None], 0.0)
        largest = size if sae.signed else cosines.scatter_(1, part[:, None], -1.0)
        total += torch.stack([size.double().sum(), largest.amax(dim=1).double().sum()])
    mean_abs, nearest = (total / torch.tensor([max(1, L - 1), 1]).to(total) / len(ids)).tolist()
    return Crowding(mean_abs, nearest)


def unit_rows(sae: SAE, by: str) -> Tensor:
    """[L, D] fp32: the decoder or encoder rows at length 1; a row of zeros stays one."""
    if by not in get_args(Sides):
        raise SteersmanError(f"rows are compared by {' or '.join(get_args(Sides))}, not by {by!r}")
    rows = sae.W_dec if by == "decoder" else sae.W_enc.T
    return torch.nn.functional.normalize(rows.detach().float(), dim=1)


def nearest_rows(asked: Tensor, rows: Tensor, n: int) -> Nearest:
    """The `n` unit rows [L, D] of largest cosine to each of the unit rows `asked` [F, D]."""
    return _nearest(asked, rows, None, n, "positive")


def _nearest(asked: Tensor, rows: Tensor, own: Tensor | None, n: int, sign: str) -> Nearest:
    """The rows [L, D] nearest those `asked` [F, D], or those of the ids `own` [F], which are then left out."""
    if sign not in get_args(Sign):
        raise SteersmanError(f"unknown sign {sign!r}: use one of {', '.join(get_args(Sign))}")
    n = max(0, min(n, len(rows) - (own is not None)))
    found = [torch.empty(0, n, dtype=torch.int64)], [torch.empty(0, n)]
    total = len(asked) if own is None else len(own)
    block = max(1, _ENTRIES // max(1, len(rows)))
    for start in range(0, total, block):
        ids = None if own is None else own[start : start + block].to(rows.device)
        cosines = (asked[start : start + block] if ids is None else rows[ids]) @ rows.T
        order = {"positive": cosines, "negative": -cosines, "both": cosines.abs()}[sign].clone()
        if ids is not None:
            order.scatter_(1, ids[:, None], float("-inf"))
        best = order.topk(n, dim=1).indices
        found[0].append(best.cpu())
        found[1].append(cosines.gather(1, best).clamp(-1, 1).cpu())
    return Nearest(*map(torch.cat, found))
