"""What a method hands back: for each vector some features with signed coefficients, in the order of their curve.

Shape letters: B vectors, M terms, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from steersman.steer.decompose.atoms import Atoms


@dataclass(frozen=True, kw_only=True)
class PathPoint:
    """One corner of a regularisation path."""

    penalty: float
    """Weight of the L1 norm, as a fraction of the smallest one that leaves no feature."""
    n_features: int
    """Features with a coefficient other than 0."""
    explained_variance: float
    """Of the penalised (shrunken) coefficients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """The terms of ONE vector."""

    features: Tensor
    """[M] int64."""
    coefficients: Tensor
    """[M] float64, of unit directions."""
    curve: Tensor | None = None
    """[M] float64: explained variance of the first m terms, where the method fits each number of them anew; None where
    the coefficients are what they are and the curve simply adds them up."""
    t: Tensor | None = None
    """[M] float64: t statistic of each coefficient, where it is a mean over samples."""
    path: list[PathPoint] | None = None
    """The regularisation path, for convex methods."""
    details: dict[str, float] = field(default_factory=dict)
    """Further figures of the method, by name."""
    warnings: list[str] = field(default_factory=list)
    """What the method itself has to say."""


def largest(values: Tensor, k: int | None, by: Tensor | None = None) -> Tensor:
    """Ids [M] of the entries of values [L] that are not 0, largest |by| (or |values|) first, at most k.

    >>> largest(torch.tensor([0.0, -3.0, 1.0, 2.0]), 2).tolist()
    [1, 3]
    """
    ids = values.nonzero()[:, 0]
    order = (values if by is None else by)[ids].abs().sort(descending=True, stable=True).indices
    ids = ids[order]
    return ids if k is None else ids[:k]


def cumulative_ev(v: Tensor, atoms: Atoms, terms: Terms) -> Tensor:
    """Explained variance [M] of the first m terms with the coefficients as they are: `1 - |v - sum|^2 / |v|^2`."""
    parts = atoms.unit(terms.features) * terms.coefficients[:, None]
    errors = v - parts.cumsum(dim=0)
    return 1 - errors.square().sum(dim=1) / v.square().sum()


def span_of(atoms: Atoms, features: Tensor) -> Tensor:
    """Orthonormal rows [M, D]: the first m of them span the first m features (0 for one that adds nothing)."""
    rows = atoms.unit(features)
    if not len(rows):
        return rows
    q, r = torch.linalg.qr(rows.T)
    return torch.where(r.diagonal().abs() > 1e-9, q, 0.0).T[: len(features)]


def projected_ev(v: Tensor, span: Tensor) -> Tensor:
    """Explained variance [M] (or [B, M]) of v [D] (or [B, D]) by least squares on the first m features of a span."""
    fractions = (v @ span.T).square() / v.square().sum(dim=-1, keepdim=True)
    return fractions.cumsum(dim=-1)


def refit(v: Tensor, atoms: Atoms, features: Tensor) -> Tensor:
    """Least-squares coefficients [M] of v [D] on chosen features, float64."""
    if not len(features):
        return torch.zeros(0, dtype=torch.float64, device=v.device)
    rows = atoms.unit(features)
    return (torch.linalg.pinv(rows.T, rtol=1e-10) @ v[:, None])[:, 0]


def jaccard(a: set[int], b: set[int]) -> float:
    """Size of the intersection over that of the union; 0 for two empty sets.

    >>> jaccard({1, 2, 3}, {2, 3, 4})
    0.5
    """
    return len(a & b) / len(a | b) if a | b else 0.0


def negative_energy(coefficients: Tensor) -> float:
    """Fraction of the squared coefficients that is negative; 0 without coefficients."""
    energy = coefficients.square()
    return float(energy[coefficients < 0].sum() / energy.sum()) if float(energy.sum()) > 0 else 0.0
