"""Maps between two classes of states, known by their means and covariances. All float64.

Shape letters: D width.
"""

import torch
from torch import Tensor

from steersman.errors import SteersmanError

LEAST = 1e-12
"""Eigenvalues below this fraction of the largest count as zero: there is no inverse along them."""


def shrunk(covariance: Tensor, amount: float) -> Tensor:
    """(1 - a) S + a tr(S)/D I: a covariance [D, D] that has an inverse, of the same trace."""
    if amount == 0:
        return covariance
    ridge = amount * float(covariance.trace()) / len(covariance)
    return (1 - amount) * covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)


def power(covariance: Tensor, exponent: float) -> Tensor:
    """S^p of a symmetric S [D, D] without negative eigenvalues; where an eigenvalue is zero, so is its power."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > LEAST * values[-1].clamp_min(0)
    powers = torch.where(kept, values.clamp_min(torch.finfo(values.dtype).tiny).pow(exponent), 0.0)
    return (vectors * powers) @ vectors.T


def gaussian_transport(source: Tensor, target: Tensor) -> Tensor:
    """A [D, D], the matrix of the optimal transport between two Gaussians of covariances S_s and S_t:

        A = S_s^-1/2 (S_s^1/2 S_t S_s^1/2)^1/2 S_s^-1/2,    A = A^T,    A S_s A = S_t.

    Source: Knott and Smith 1984; arXiv 2402.09631, theorem 1. Raises SteersmanError where S_s has no inverse.
    """
    values = torch.linalg.eigvalsh(source)
    if not float(values[0]) > LEAST * float(values[-1]):
        raise SteersmanError(
            f"the covariance of the source states has no inverse (eigenvalues {float(values[0]):.2g} to "
            f"{float(values[-1]):.2g}): set shrinkage, such as shrinkage=0.1"
        )
    root, inverse = power(source, 0.5), power(source, -0.5)
    return inverse @ power(root @ target @ root, 0.5) @ inverse


def transport_distance(mean_a: Tensor, a: Tensor, mean_b: Tensor, b: Tensor) -> float:
    """The squared 2-Wasserstein distance of two Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2).

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> round(transport_distance(torch.zeros(2), eye, torch.tensor([3.0, 4.0]), 4 * eye), 6)  # 25 + 2 (1 - 2)^2
    27.0
    """
    root = power(a, 0.5)
    overlap = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * overlap)


def erasing_direction(covariance: Tensor, crossed: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v) [D] each, such that x - u v^T (x - mu) is the least change of x, in mean square, after which no linear
    function of it says anything of a label z whose covariance with x is `crossed` [D]:

        u = S_xz,    v = S_xx^+ S_xz / (S_xz^T S_xx^+ S_xz).

    This is x - W^+ P W (x - mu) with W = S_xx^-1/2 and P the projector on W S_xz, written out for one label. Source:
    arXiv 2306.03819 (LEACE), theorem 4.3.
    """
    read = power(covariance, -1.0) @ crossed
    return crossed, read / (crossed @ read)
