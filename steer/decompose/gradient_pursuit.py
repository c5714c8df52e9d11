"""Gradient pursuit (Blumensath and Davies, 2008): matching pursuit whose coefficients take one exact gradient step a
feature, in place of a least-squares fit.

With the chosen rows S and what is left r: `g = S r`, `e = S^T g`, `c += (r.e / e.e) g`. A step needs no factorisation
and O(k D) work whatever the number of features before it. One least-squares fit at the end makes the coefficients those
of the chosen features exactly; the features can differ from those of exact matching pursuit.

Shape letters: B vectors, D width, k steps, m steps done.
"""

import torch
from torch import Tensor

from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.terms import Terms, refit

_LEFT = 1e-7


def gradient_pursuit(V: Tensor, atoms: Atoms, k: int) -> list[Terms]:
    """Gradient pursuit of V [B, D] float64, to at most k features each."""
    B, D = V.shape
    size = V.norm(dim=1)
    unit = V / size[:, None]
    rows = torch.zeros(B, k, D, dtype=torch.float64, device=V.device)
    features = torch.zeros(B, k, dtype=torch.int64, device=V.device)
    curve = torch.zeros(B, k, dtype=torch.float64, device=V.device)
    count = torch.zeros(B, dtype=torch.int64, device=V.device)
    left, live = unit, torch.ones(B, dtype=torch.bool, device=V.device)
    for m in range(k):
        chosen, strength = atoms.strongest(left, features[:, :m])
        live = live & (strength.abs() > _LEFT)
        if not bool(live.any()):
            break
        rows[:, m] = atoms.unit(chosen) * live[:, None]
        features[:, m] = chosen
        count += live
        S = rows[:, : m + 1]
        g = S @ left[..., None]
        e = (S.mT @ g)[..., 0]
        along = (left * e).sum(dim=1) / e.square().sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        left = left - along[:, None] * e
        curve[:, m] = 1 - left.square().sum(dim=1)
    terms = []
    for b, n in enumerate(count.tolist()):
        coefficients = refit(V[b], atoms, features[b, :n])
        if n:
            error = V[b] - coefficients @ atoms.unit(features[b, :n])
            curve[b, n - 1] = 1 - error.square().sum() / size[b].square()
        terms.append(Terms(features=features[b, :n], coefficients=coefficients, curve=curve[b, :n]))
    return terms
