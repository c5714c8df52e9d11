"""Orthogonal matching pursuit: `min |v - W_dec^T c|` with `|c|_0 <= k`, both signs, greedily.

At each step the unit decoder row with the largest |inner product| with what is left of v joins, and all coefficients
are fitted anew by least squares. Source: Pati, Rezaiifar and Krishnaprasad (1993); the growing Cholesky factor of the
Gram matrix as in Rubinstein, Zibulevsky and Elad (2008). All vectors step together: one B x L product a step, and Gram
entries only for the features that were chosen.

Shape letters: B vectors, L latents, D width, k steps, m steps done.
"""

import torch
from torch import Tensor

from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.base import Method, Null, Problem
from steersman.steer.decompose.gradient_pursuit import gradient_pursuit
from steersman.steer.decompose.terms import Terms

TOGETHER = 128  # vectors that step together: the product is efficient, and B * k * D float64 rows stay small
_LEFT = 1e-7  # fraction of |v| below which nothing is left to explain
_DEPENDENT = 1e-10  # squared distance of a unit row from the chosen ones' span below which it adds nothing


class OMP(Method):
    """Matching pursuit; `pursuit="gradient"` takes gradient steps instead of fitting anew."""

    name = "omp"
    source = "Pati, Rezaiifar and Krishnaprasad 1993"
    settings = ("pursuit",)
    needs_k = True
    independent = True
    null = Null.SCALE_FREE

    def terms(self, problem: Problem) -> list[Terms]:
        assert problem.config.k is not None
        pursue = gradient_pursuit if problem.config.pursuit == "gradient" else matching_pursuit
        parts = problem.vectors.split(TOGETHER)
        return [terms for V in parts for terms in pursue(V, problem.atoms, problem.config.k)]


def matching_pursuit(V: Tensor, atoms: Atoms, k: int) -> list[Terms]:
    """Exact orthogonal matching pursuit of V [B, D] float64, to at most k features each."""
    (B, D), device = V.shape, V.device
    size = V.norm(dim=1)
    unit = V / size[:, None]
    wide = {"dtype": torch.float64, "device": device}
    rows = torch.zeros(B, k, D, **wide)
    factor = torch.eye(k, **wide).repeat(B, 1, 1)  # lower triangular: factor factor^T is the chosen rows' Gram matrix
    onto = torch.zeros(B, k, **wide)  # factor^-1 (rows v): fixed once computed, as the factor only grows
    features = torch.zeros(B, k, dtype=torch.int64, device=device)
    curve = torch.zeros(B, k, **wide)
    count = torch.zeros(B, dtype=torch.int64, device=device)
    left, live = unit, torch.ones(B, dtype=torch.bool, device=device)
    coefficients = torch.zeros(B, k, **wide)
    for m in range(k):
        chosen, strength = atoms.strongest(left, features[:, :m])
        d = atoms.unit(chosen)
        w = torch.linalg.solve_triangular(factor[:, :m, :m], rows[:, :m] @ d[..., None], upper=False)[..., 0]
        rest = 1 - w.square().sum(dim=1)
        live = live & (strength.abs() > _LEFT) & (rest > _DEPENDENT)
        if not bool(live.any()):
            break
        rest = torch.where(live, rest, 1.0).sqrt()
        w = w * live[:, None]
        rows[:, m] = d * live[:, None]
        factor[:, m, :m], factor[:, m, m] = w, rest
        onto[:, m] = ((rows[:, m] * unit).sum(dim=1) - (w * onto[:, :m]).sum(dim=1)) / rest
        features[:, m] = chosen
        count += live
        solved = torch.linalg.solve_triangular(factor[:, : m + 1, : m + 1].mT, onto[:, : m + 1, None], upper=True)
        coefficients[:, : m + 1] = solved[..., 0]
        left = unit - (solved.mT @ rows[:, : m + 1])[:, 0]
        curve[:, m] = 1 - left.square().sum(dim=1)
    return [
        Terms(features=features[b, :n], coefficients=coefficients[b, :n] * size[b], curve=curve[b, :n])
        for b, n in enumerate(count.tolist())
    ]
