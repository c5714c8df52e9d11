"""`probe`: v along the weight of a logistic regression of the side on the state.

Minimises, for states z centred and scaled to unit variance per dimension on average,

    mean over sides of mean log(1 + exp(-y (w . z + b))) + l2 |w|^2 / 2

with both sides weighing the same however many tokens they have, by Newton's method with step halving: the samples are
in a temporary file, each step goes over them in chunks. Source: arXiv 2501.17148 (AxBench), section 3.2, which uses
Adam. Sign and length: see `steersman.steer.methods.base`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import SteersmanError
from steersman.steer.methods.base import ContrastConfig, Estimator, StreamedMethod
from steersman.steer.methods.examples import Examples
from steersman.steer.methods.moments import SampleFile

NEWTON_STEPS = 30
TOLERANCE = 1e-9  # of the decrease that a Newton step promises, relative to the loss


class LogisticWeight(Estimator):
    """Keeps the samples in a file and fits the regression at the end."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__(config)
        self.samples = SampleFile()
        self.squares = 0.0

    def update(self, x: Tensor, positive: Tensor) -> None:
        super().update(x, positive)
        self.squares += float(x.double().square().sum())
        self.samples.add(x, positive)

    def merged(self, other: Any) -> Any:
        both = super().merged(other)
        both.samples, both.squares = self.samples.merged(other.samples), self.squares + other.squares
        return both

    def direction(self) -> Tensor:
        return self.along(self.weight())

    def weight(self) -> Tensor:
        """w [D] float64, in units of the states: the logit is w . x + b."""
        n = self.positive.n + self.negative.n
        centre = (self.positive.mean * self.positive.n + self.negative.mean * self.negative.n) / n
        variance = (self.squares / n - float(centre @ centre)) / len(centre)
        scale = max(variance, 0.0) ** 0.5
        if not scale > 0:
            raise SteersmanError("all states are the same: there is nothing to regress on")
        w = centre.new_zeros(len(centre) + 1)  # the last entry is the bias
        loss, gradient, hessian = self._pass(w, centre, scale, derivatives=True)
        for _ in range(NEWTON_STEPS):
            step = torch.linalg.solve(hessian, gradient)
            promise = float(gradient @ step)
            if promise <= TOLERANCE * max(loss, TOLERANCE):
                break
            size = 1.0
            while size > 1e-6:
                new = w - size * step
                found = self._pass(new, centre, scale, derivatives=False)[0]
                if found <= loss - 1e-4 * size * promise:
                    break
                size /= 2
            else:
                break
            w = new
            loss, gradient, hessian = self._pass(w, centre, scale, derivatives=True)
        return w[:-1] / scale

    def _pass(self, w: Tensor, centre: Tensor, scale: float, *, derivatives: bool) -> tuple[float, Tensor, Tensor]:
        """Loss, gradient [D + 1] and Hessian [D + 1, D + 1] at w, over all samples."""
        penalty = torch.full_like(w, self.config.l2)
        penalty[-1] = 1e-12  # the bias is free; this keeps the Hessian invertible
        loss = float(0.5 * (penalty * w) @ w)
        gradient, hessian = penalty * w, torch.diag(penalty)
        for x, positive in self.samples.chunks():
            z = torch.cat([(x.double() - centre) / scale, x.new_ones(len(x), 1).double()], 1)
            y = positive.double() * 2 - 1
            weight = torch.where(positive, 0.5 / self.positive.n, 0.5 / self.negative.n).double()
            margin = y * (z @ w)
            loss += float(weight @ F.softplus(-margin))
            if derivatives:
                miss = torch.sigmoid(-margin)
                gradient = gradient - z.T @ (weight * y * miss)
                hessian = hessian + z.T @ (z * (weight * miss * (1 - miss))[:, None])
        return loss, gradient, hessian


class Probe(StreamedMethod):
    """Logistic regression over all tokens of each side."""

    name = "probe"
    source = "arXiv 2501.17148"
    positions = "all"
    order = "sides"
    estimator = LogisticWeight

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        if not config.l2 > 0:
            raise SteersmanError(
                f"l2 must be above 0, got {config.l2}: separable examples have no finite weight without"
            )
