"""Logistic regression of a side on states, by Newton's method over samples that are gone over in chunks.

Minimises, for states z centred and scaled to unit variance per dimension on average,

    mean over sides of mean log(1 + exp(-y (w . z + b))) + l2 |w|^2 / 2

with both sides weighing the same however many samples they have. Several problems with the same labels (the heads of a
layer) are solved at once. One wide problem is better solved without second derivatives (L-BFGS, Liu and Nocedal 1989).

Shape letters: N samples, P problems, D width.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import SteersmanError

NEWTON_STEPS = 30
TOLERANCE = 1e-9  # of the decrease that a Newton step promises, relative to the loss
HALVINGS = 20
GRADIENT_STEPS = 200

Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Samples x [n, P, D] and their sides [n] bool, part by part; called once for each pass over them."""


class Logistic(NamedTuple):
    """The logit w . x + b of the positive side, in units of the states. All float64."""

    weight: Tensor
    """[P, D]."""
    bias: Tensor
    """[P]."""

    def logits(self, x: Tensor) -> Tensor:
        """[n, P] for states x [n, P, D]."""
        return torch.einsum("npd,pd->np", x.double(), self.weight) + self.bias


def fit_logistic(chunks: Chunks, *, l2: float, by_gradients: bool = False) -> Logistic:
    """The minimum, for every problem; of one whose states are all the same, a weight of 0.

    `by_gradients` needs no D x D matrix, and so is faster for one wide problem; it comes near the minimum.
    Raises SteersmanError where a side has no sample, or no problem has states that differ.
    """
    n, counts = 0, torch.zeros(2, dtype=torch.float64)
    total, squares = torch.zeros(()), torch.zeros(())
    for x, positive in chunks():
        wide = x.double()
        n += len(x)
        counts += torch.stack([(~positive).sum(), positive.sum()])
        total, squares = total + wide.sum(0), squares + wide.square().sum((0, 2))
    if not bool((counts > 0).all()):
        raise SteersmanError("there are no examples on one side to tell from the other")
    centre = total / n  # [P, D]
    scale = ((squares / n - centre.square().sum(1)) / centre.shape[1]).clamp_min(0).sqrt()  # [P]
    if not bool((scale > 0).any()):
        raise SteersmanError("all states are the same: there is nothing to regress on")
    scale = torch.where(scale > 0, scale, 1.0)
    problem = _Problem(chunks, centre, scale, 0.5 / counts, l2)
    w = problem.near_minimum() if by_gradients else problem.minimum()
    weight = w[:, :-1] / scale[:, None]
    return Logistic(weight, w[:, -1] - (weight * centre).sum(1))


class _Problem(NamedTuple):
    chunks: Chunks
    centre: Tensor
    scale: Tensor
    per_side: Tensor
    l2: float

    def minimum(self) -> Tensor:
        """[P, D + 1], the bias last."""
        w = self.centre.new_zeros(len(self.centre), self.centre.shape[1] + 1)
        loss, gradient, hessian = self.at(w, derivatives=True)
        for _ in range(NEWTON_STEPS):
            step = torch.linalg.solve(hessian, gradient)
            promise = (gradient * step).sum(1)
            open_ = promise > TOLERANCE * loss.clamp_min(TOLERANCE)
            size, worse = open_.double(), open_
            for _ in range(HALVINGS):
                found = self.at(w - size[:, None] * step, derivatives=False)[0]
                worse = open_ & (found > loss - 1e-4 * size * promise)
                if not bool(worse.any()):
                    break
                size = torch.where(worse, size / 2, size)
            size = torch.where(worse, 0.0, size)
            if not bool((size > 0).any()):
                break
            w = w - size[:, None] * step
            loss, gradient, hessian = self.at(w, derivatives=True)
        return w

    def near_minimum(self) -> Tensor:
        """[P, D + 1], the bias last, from gradients alone."""
        w = self.centre.new_zeros(len(self.centre), self.centre.shape[1] + 1).requires_grad_()
        steps = torch.optim.LBFGS(
            [w], max_iter=GRADIENT_STEPS, tolerance_change=TOLERANCE, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            value, w.grad = self.slope(w.detach())
            return value.sum()

        steps.step(loss)
        return w.detach()

    def slope(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [P] and gradient [P, D + 1] over all samples."""
        penalty = torch.full_like(w, self.l2)
        penalty[:, -1] = 0
        loss, gradient = 0.5 * (penalty * w * w).sum(1), penalty * w
        weight = w[:, :-1] / self.scale[:, None]  # w . z = weight . (x - centre)
        offset = w[:, -1] - (weight * self.centre).sum(1)
        for x, positive in self.chunks():
            y, of_side = positive.double() * 2 - 1, self.per_side[positive.long()]
            columns = x.double().transpose(0, 1)  # [P, n, D]
            margin = y * ((columns @ weight[..., None])[..., 0] + offset[:, None])
            loss = loss + F.softplus(-margin) @ of_side
            pull = of_side * y * torch.sigmoid(-margin)  # [P, n]
            total = pull.sum(1, keepdim=True)
            along = ((pull[:, None] @ columns)[:, 0] - total * self.centre) / self.scale[:, None]
            gradient = gradient - torch.cat([along, total], 1)
        return loss, gradient

    def at(self, w: Tensor, *, derivatives: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [P], gradient [P, D + 1] and Hessian [P, D + 1, D + 1] over all samples."""
        penalty = torch.full_like(w, self.l2)
        penalty[:, -1] = 1e-12  # the bias is free; this keeps the Hessian invertible
        loss = 0.5 * (penalty * w * w).sum(1)
        gradient, hessian = penalty * w, torch.diag_embed(penalty)
        for x, positive in self.chunks():
            z = (x.double() - self.centre) / self.scale[:, None]
            z = torch.cat([z, z.new_ones(*z.shape[:2], 1)], 2).transpose(0, 1)  # [P, n, D + 1]
            y = positive.double() * 2 - 1
            weight = self.per_side[positive.long()]
            margin = y * (z @ w[..., None])[..., 0]  # [P, n]
            loss = loss + F.softplus(-margin) @ weight
            if derivatives:
                miss = torch.sigmoid(-margin)
                gradient = gradient - ((weight * y * miss)[:, None] @ z)[:, 0]
                hessian = hessian + z.mT @ (z * (weight * miss * (1 - miss))[..., None])
        return loss, gradient, hessian
