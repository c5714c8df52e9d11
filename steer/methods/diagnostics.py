"""What predicts whether a vector will steer: do the pairs agree, and does the vector separate the examples?

- `agreement`: mean cosine between the differences of two different pairs, from the unit differences d_i:
  (|sum d_i|^2 - n) / (n (n - 1)). 1 when every pair says the same, about 0 when they say nothing in common.
- `split_half`: cosine between the vectors made from each half of the examples (`half_of`: dealt by chance, since
  examples often alternate, as answers Yes and No do).
- `auroc`, `d_prime`: how well the vector separates the sides. Each half is projected on the vector of the OTHER half,
  so that a vector cannot score on what it was fitted to: with fewer examples than dimensions anything separates those.
- `pairs_right`: the fraction of pairs whose positive lies further along, held out in the same way.

Agreement and separability are the predictors that arXiv 2505.22637 finds for steering vectors (it measures them in
sample). N samples, D width.
"""

from typing import Any

import torch
from torch import Tensor

from steersman.ranking import auroc

LOW = {"agreement": 0.1, "split_half": 0.5, "auroc": 0.7}
"""Below these, steering along the vector is likely to disappoint: figures to look twice at, not limits of a theory."""


def half_of(unit: Tensor) -> Tensor:
    """Which half, 0 or 1, the examples number `unit` [n] belong to: of each two that follow one another one goes to
    each half, and which one is drawn. The same in every run, and however examples are batched.

    >>> half_of(torch.arange(12)).tolist()
    [1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1]
    """
    pair = unit.long() // 2
    drawn = (pair + 1) * 0x9E3779B1 & 0xFFFFFFFF  # a multiplicative hash; its high bits are well mixed
    drawn = (drawn ^ drawn >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return (unit + (drawn >> 16)) % 2


class Agreement:
    """Streams the differences of pairs and says how much they agree."""

    def __init__(self) -> None:
        self.n, self.total = 0, torch.zeros(())

    def add(self, differences: Tensor) -> None:
        """Take in differences [n, D]; those that are zero say nothing and do not count."""
        norm = differences.double().norm(dim=1, keepdim=True)
        keep = norm[:, 0] > 0
        self.n += int(keep.sum())
        self.total = self.total + (differences[keep].double() / norm[keep]).sum(0)

    def figures(self) -> dict[str, float]:
        """`agreement`, where there are at least two pairs."""
        if self.n < 2:
            return {}
        return {"agreement": (float(self.total @ self.total) - self.n) / (self.n * (self.n - 1))}


class Projections:
    """Samples projected on a vector and on the vectors of the two halves: two numbers are kept per sample."""

    def __init__(self, direction: Tensor, halves: tuple[Tensor, Tensor] | None) -> None:
        self.unit = (direction / direction.norm()).double()
        self.halves = None
        if halves is not None:
            self.halves = torch.stack([half / half.norm() for half in halves]).double()
        self._along: list[Tensor] = []
        self._heldout: list[Tensor] = []
        self._positive: list[Tensor] = []

    def add(self, x: Tensor, positive: Tensor, unit: Tensor) -> None:
        """Take in samples x [n, D], their sides [n] and their units [n] (see `half_of`)."""
        self._along.append(x.double() @ self.unit)
        self._positive.append(positive)
        if self.halves is not None:
            both = x.double() @ self.halves.T  # [n, 2]
            self._heldout.append(both.gather(1, 1 - half_of(unit)[:, None])[:, 0])

    def figures(self, *, paired: bool) -> dict[str, Any]:
        """All the module describes but `agreement`; held-out figures only where both halves have a vector."""
        along, positive = torch.cat(self._along), torch.cat(self._positive)
        found: dict[str, Any] = {"n_positive": int(positive.sum()), "n_negative": int((~positive).sum())}
        two_sided = found["n_positive"] > 0 and found["n_negative"] > 0
        found["heldout"] = self.halves is not None
        if self.halves is not None:
            found["split_half"] = float(self.halves[0] @ self.halves[1])
            along = torch.cat(self._heldout)
        if two_sided:
            found["auroc"] = float(auroc(along[:, None], positive[:, None]))
            found["d_prime"] = d_prime(along[positive], along[~positive])
        if paired:
            found["pairs_right"] = float((along[0::2] > along[1::2]).double().mean())
        return found


def d_prime(positive: Tensor, negative: Tensor) -> float | None:
    """Difference of the means over the root mean square of the standard deviations; None where nothing varies."""
    if len(positive) < 2 or len(negative) < 2:
        return None
    spread = float(((positive.var() + negative.var()) / 2).sqrt())
    return float(positive.mean() - negative.mean()) / spread if spread > 0 else None


def warnings(figures: dict[str, Any]) -> list[str]:
    """What the figures of one hook point warn of, in plain words."""
    said = {
        "agreement": "the pairs' differences have little in common (agreement {value:.2f}): no vector may fit all",
        "split_half": "half of the examples gives another direction (cosine {value:.2f}): use more examples",
        "auroc": "the vector hardly separates examples it was not made from (AUROC {value:.2f})",
    }
    found = []
    for name, text in said.items():
        value = figures.get(name)
        if isinstance(value, int | float) and value < LOW[name]:
            found.append(text.format(value=value))
    if not figures.get("heldout", True):
        found.append("too few examples to check the vector on others than those it was made from")
    return found
