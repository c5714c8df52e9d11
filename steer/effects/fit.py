"""Fitting y ~ x M + b: least squares in closed form, and Adam for comparison (arXiv 2411.02193, sec. 3).

The closed form is ridge regression with a free intercept. Sums of x^T x and x^T y are made in float64 while the effects
stream by, so memory is that of one D x L and one D x D matrix whatever the number of vectors. With the eigenvalues
w_i and eigenvectors Q of the centred x^T x, and C = Q^T x^T y,

    M = Q diag(1 / (w_i + ridge)) C,    b = mean(y) - mean(x) M,

and every ridge costs only its scaling of C; `auto` takes the one with the least generalised cross-validation error
RSS / (n - df)^2, df = 1 + sum_i w_i / (w_i + ridge) (Golub, Heath and Wahba 1979).

Shape letters: n vectors, D width, L latents.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from steersman.errors import SteersmanError

_COLUMNS = 2048
"""Latents whose part of M is computed together."""

Rows = Iterable[tuple[Tensor, Tensor]]
"""Blocks of (x [n, D], y [n, L])."""


class LinearFit(NamedTuple):
    """y ~ x M + b, and how much of M is noise."""

    M: Tensor
    """[D, L]."""
    b: Tensor
    """[L]."""
    ridge: float
    """What was added to the diagonal of the centred x^T x; 0 for Adam."""
    signal: Tensor
    """[L] fp32: |M_j|^2 over what noise alone would give it on average; near 1 without any signal, 0 for a feature that
    no vector moves."""
    noise: Tensor
    """[L] fp32: standard deviation of the residuals of y_j."""


@dataclass
class Moments:
    """Running sums of n rows of x and y, float64."""

    xx: Tensor
    """[D, D] sum of x^T x."""
    xy: Tensor
    """[D, L] sum of x^T y."""
    yy: Tensor
    """[L] sum of y^2."""
    x: Tensor
    """[D] sum of x."""
    y: Tensor
    """[L] sum of y."""
    n: int = 0

    @classmethod
    def over(cls, rows: Rows) -> "Moments":
        """The sums over all blocks. Raises SteersmanError when there is none."""
        total: Moments | None = None
        for x, y in rows:
            if total is None:
                (D, L), kind = (x.shape[1], y.shape[1]), torch.float64
                xx, xy, yy, sx, sy = (torch.zeros(s, dtype=kind) for s in ((D, D), (D, L), (L,), (D,), (L,)))
                total = cls(xx, xy, yy, sx, sy)
            total.add(x, y)
        if total is None:
            raise SteersmanError("no vectors to fit a map to")
        return total

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in a block."""
        x = x.double()
        self.xx.addmm_(x.T, x)
        self.x += x.sum(0)
        for start in range(0, y.shape[1], _COLUMNS):  # the float64 copy of y is never whole
            part = y[:, start : start + _COLUMNS].double()
            self.xy[:, start : start + _COLUMNS].addmm_(x.T, part)
            self.yy[start : start + _COLUMNS] += part.square().sum(0)
            self.y[start : start + _COLUMNS] += part.sum(0)
        self.n += len(x)

    def centre(self) -> None:
        """Turn the sums into those of x - mean(x) and y - mean(y), in place."""
        x, y = self.x / self.n, self.y / self.n
        self.xx.addr_(self.x, x, alpha=-1)
        self.xy.addr_(self.x, y, alpha=-1)
        self.yy -= self.y * y


def ridge_fit(rows: Rows, ridge: float | None = None, dtype: torch.dtype = torch.float64) -> LinearFit:
    """The ridge fit, with the given `ridge` or, where None, the one that cross-validates best. M and b in `dtype`.

    Raises SteersmanError for fewer vectors than D + 2 when no ridge is given: then there is nothing to choose it by.

    >>> x, M = torch.randn(50, 4), torch.randn(4, 6)
    >>> fit = ridge_fit([(x, x @ M + 1)], ridge=0.0)
    >>> bool(torch.allclose(fit.M.float(), M, atol=1e-5)), bool(torch.allclose(fit.b.float(), torch.ones(6), atol=1e-5))
    (True, True)
    """
    return ridge_of(Moments.over(rows), ridge, dtype)


def ridge_of(sums: Moments, ridge: float | None = None, dtype: torch.dtype = torch.float64) -> LinearFit:
    """`ridge_fit` from the sums, which it uses up."""
    D, L, n = *sums.xy.shape, sums.n
    check_enough(n, D, ridge)
    mean_x, mean_y, square = sums.x / n, sums.y / n, sums.yy.clone()
    sums.centre()
    flat = sums.yy <= 1e-12 * square  # what is left of a constant is rounding
    w, Q = torch.linalg.eigh(sums.xx)
    w = w.clamp_min(0)
    C, power = sums.xy, torch.zeros(D, dtype=torch.float64)
    for start in range(0, L, _COLUMNS):  # C takes the place of x^T y
        part = Q.T @ C[:, start : start + _COLUMNS]
        C[:, start : start + _COLUMNS] = part
        power += part.square().sum(1)
    ridge = _best_ridge(w, power, float(sums.yy.sum()), n) if ridge is None else ridge
    inverse = _inverse(w, ridge)
    M = torch.empty(D, L, dtype=dtype)
    b, rss = torch.empty(L, dtype=torch.float64), torch.empty(L, dtype=torch.float64)
    strength = torch.empty(L, dtype=torch.float64)
    explained = 2 * inverse - w * inverse.square()
    for start in range(0, L, _COLUMNS):
        at = slice(start, start + _COLUMNS)
        part = Q @ (inverse[:, None] * C[:, at])
        M[:, at] = part
        b[at] = mean_y[at] - mean_x @ part
        strength[at] = part.square().sum(0)
        rss[at] = sums.yy[at] - (C[:, at].square() * explained[:, None]).sum(0)
    freedom = max(1.0, n - 1 - float((w * inverse).sum()))
    variance = rss.clamp_min(0) / freedom
    # Under noise of this variance, M_j would have the covariance Q diag(w / (w + ridge)^2) Q^T times it.
    signal = _ratio(strength, variance * (w * inverse.square()).sum()).masked_fill(flat, 0.0)
    return LinearFit(M, b.to(dtype), ridge, signal.float(), variance.sqrt().float())


def check_enough(n: int, width: int, ridge: float | None) -> None:
    """Raise SteersmanError when n vectors are too few for a map of this width."""
    if n < width + 2 and ridge is None:
        raise SteersmanError(
            f"{n} vectors are too few for a map of width {width}: it needs more than {width + 1}, better "
            f"{4 * width}; measure more, or fit with a ridge of your choice"
        )
    if ridge is not None and (not math.isfinite(ridge) or ridge < 0):
        raise SteersmanError(f"ridge must be 0 or more and finite, got {ridge}")


def _inverse(w: Tensor, ridge: float) -> Tensor:
    """1 / (w + ridge), and 0 for directions that no vector has any part in."""
    small = w + ridge <= float(w.max()) * len(w) * torch.finfo(w.dtype).eps
    return torch.where(small, torch.zeros_like(w), 1 / (w + ridge).clamp_min(1e-300))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > 0, a / b.clamp_min(1e-300), torch.zeros_like(a)).clamp(max=1e30)


def _best_ridge(w: Tensor, power: Tensor, total: float, n: int) -> float:
    """The ridge with the least generalised cross-validation error, of 49 from 1e-6 to 1e2 times the mean of w."""
    best, least = 0.0, float("inf")
    for ridge in (float(w.mean()) * torch.logspace(-6, 2, 49, dtype=torch.float64)).tolist():
        inverse = _inverse(w, ridge)
        rss = max(0.0, total - float((power * (2 * inverse - w * inverse.square())).sum()))
        freedom = n - 1 - float((w * inverse).sum())
        error = rss / max(freedom, 1e-9) ** 2
        if error < least:
            best, least = ridge, error
    return best


def adam_fit(
    rows: Callable[[], Rows],
    *,
    epochs: int = 15,
    batch_size: int = 64,
    lr: float = 2e-4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LinearFit:
    """The same map by Adam on the mean squared error, the learning rate falling along a cosine to 0: the authors' way.

    `rows()` starts a pass over the blocks; within a block, vectors are shuffled. The noise in M is estimated as if the
    fit had ended where plain least squares does, with n - D - 1 degrees of freedom.
    """
    g = torch.Generator().manual_seed(seed)
    sizes = [(len(x), x.shape[1], y.shape[1]) for x, y in rows()]
    if not sizes:
        raise SteersmanError("no vectors to fit a map to")
    n, D, L = sum(size for size, _, _ in sizes), *sizes[0][1:]
    bound = D**-0.5
    M = ((2 * torch.rand(D, L, generator=g) - 1) * bound).requires_grad_()
    b = ((2 * torch.rand(L, generator=g) - 1) * bound).requires_grad_()
    optimizer = torch.optim.Adam([M, b], lr=lr)
    steps = epochs * sum(math.ceil(size / batch_size) for size, _, _ in sizes)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for x, y in rows():
            for part in torch.randperm(len(x), generator=g).split(batch_size):
                loss = mse_loss(torch.addmm(b, x[part].float(), M), y[part].float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    M, b = M.detach(), b.detach()
    rss = torch.zeros(L, dtype=torch.float64)
    xx = torch.zeros(D, D, dtype=torch.float64)
    for x, y in rows():
        rss += (y - torch.addmm(b, x.float(), M)).double().square().sum(0)
        xx += x.double().T @ x.double()
    variance = rss / max(1, n - D - 1)
    scatter = _inverse(torch.linalg.eigvalsh(xx).clamp_min(0), 0.0).sum()
    signal = _ratio(M.double().square().sum(0), variance * scatter)
    return LinearFit(M.to(dtype), b.to(dtype), 0.0, signal.float(), variance.sqrt().float())


class Response(NamedTuple):
    """What the gradients of n unsteered texts say: `steer/effects/gradients.py`."""

    M: Tensor
    """[D, L] fp32: derivative of each feature's average with respect to a vector that is added."""
    metric: Tensor
    """[D, D] float64, F: half of v^T F v is the KL per token that a small v costs, in nats."""
    damping: float
    """What to add to the diagonal of F before it is inverted, by cross-validation of f_j on g."""
    natural: LinearFit
    """The ridge fit of features on gradients, whose columns are directions of (F + damping)^-1 M."""


def response_fit(rows: Rows, tokens: float, ridge: float | None = None) -> Response:
    """The response to steering, from blocks of (gradients [n, D], features [n, L]) of texts of `tokens` tokens each."""
    sums = Moments.over(rows)
    check_enough(sums.n, len(sums.x), ridge)
    M = torch.addr(sums.xy, sums.x, sums.y / sums.n, alpha=-1).div_(sums.n).float()
    metric = torch.addr(sums.xx, sums.x, sums.x / sums.n, alpha=-1) / (sums.n * tokens)
    count = sums.n * tokens
    natural = ridge_of(sums, ridge, torch.float32)
    return Response(M, metric, natural.ridge / count, natural)


class Score(NamedTuple):
    """How well a map predicts vectors it was not fitted to."""

    r2: Tensor
    """[L] fp32: 1 - squared error over variance, per feature; NaN for a feature that does not vary."""
    ceiling: Tensor
    """[L] fp32: the R2 that the exact expected effects would have, given the sampling noise of the measurement."""
    total: float
    """R2 over all features together."""
    total_ceiling: float
    """The ceiling of that."""


def score(M: Tensor, b: Tensor, rows: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Score:
    """Score y ~ x M + b on blocks of (x [n, D], y [n, L], standard error of y [n, L])."""
    L = M.shape[1]
    error, noise, squares, sums = (torch.zeros(L, dtype=torch.float64) for _ in range(4))
    n = 0
    for x, y, standard_error in rows:
        y = y.double()
        error += (y - (x.to(M.dtype) @ M + b).double()).square().sum(0)
        noise += standard_error.double().square().sum(0)
        squares += y.square().sum(0)
        sums += y.sum(0)
        n += len(x)
    spread = squares - sums.square() / max(1, n)
    flat = spread <= 1e-12 * squares.clamp_min(1e-300)
    nan = torch.full_like(error, float("nan"))
    r2, ceiling = (torch.where(flat, nan, 1 - part / spread.clamp_min(1e-300)) for part in (error, noise))
    whole = max(float(spread.sum()), 1e-300)
    return Score(r2.float(), ceiling.float(), 1 - float(error.sum()) / whole, 1 - float(noise.sum()) / whole)
