"""Statistics of features against labels, from sums in float64 that stream over samples and never keep them.

All come from the same sums, of f, f^2 and f y over samples, for the labels as they are and for permutations of them:
the permuted ones are the null. With n samples, y in {0, 1} where two classes are compared, and m+ and m- their means:

| statistic | formula |
|---|---|
| `correlation` | Pearson's r of f and y, any real y |
| `difference` | m+ - m- |
| `f_statistic` | one-way F of two classes: SS_between / (SS_within / (n - 2)) = r^2 (n - 2) / (1 - r^2) |

The last equality says that F and |r| rank features alike where both see the same samples.

Shape letters: N samples, L features, P permutations.
"""

import math

import torch
from torch import Tensor

from steersman.errors import SteersmanError

_ROUNDING = 1e-12
"""Variance over mean square up to which a feature counts as constant: what is left is rounding of the sums."""


class LabelSums:
    """Sums of L features over samples with labels [N], which are known before the first sample comes.

    Column 0 of every statistic is that of the labels as given, the other P those of seeded permutations of them.

    >>> y = torch.tensor([1.0, 0.0, 1.0, 0.0])
    >>> sums = LabelSums(y, n_features=1)
    >>> sums.add(torch.tensor([[3.0], [1.0], [3.0], [1.0]]), torch.arange(4))
    >>> sums.correlation().tolist(), sums.difference().tolist()
    ([[1.0]], [[2.0]])
    """

    def __init__(self, labels: Tensor, *, n_features: int, permutations: int = 0, seed: int = 0) -> None:
        y = torch.as_tensor(labels).double()
        if y.ndim != 1 or len(y) < 3 or not bool(y.isfinite().all()) or float(y.min()) == float(y.max()):
            raise SteersmanError(
                "labels need at least 3 samples, finite, and not all the same: there is nothing to compare otherwise"
            )
        generator = torch.Generator().manual_seed(seed)
        shuffled = [y[torch.randperm(len(y), generator=generator)] for _ in range(permutations)]
        self.y = torch.stack([y, *shuffled], dim=1)  # [N, 1 + P]
        self.n = 0
        self.total = torch.zeros(n_features, dtype=torch.float64)
        self.squares = torch.zeros(n_features, dtype=torch.float64)
        self.products = torch.zeros(n_features, 1 + permutations, dtype=torch.float64)
        self.successes = torch.zeros(n_features, dtype=torch.float64)

    def add(self, f: Tensor, index: Tensor) -> None:
        """Take in the features [n, L] of the samples number `index` [n]."""
        wide = f.detach().cpu().double()
        self.n += len(wide)
        self.total += wide.sum(0)
        self.squares += wide.square().sum(0)
        self.products += wide.T @ self.y[index.cpu()]
        self.successes += wide[self.y[index.cpu(), 0] > 0.5].sum(0)

    def _check_whole(self) -> None:
        if self.n != len(self.y):
            raise SteersmanError(f"{self.n} of the {len(self.y)} labelled samples were read")

    @property
    def _spread(self) -> Tensor:
        """[L]: the sum of squares about the mean; 0 where a feature is constant."""
        about = self.squares - self.total.square() / self.n
        return torch.where(about > _ROUNDING * self.squares, about, torch.zeros_like(about))

    def correlation(self) -> Tensor:
        """Pearson's r [L, 1 + P] float64; 0 for a constant feature."""
        self._check_whole()
        y = self.y[:, 0]
        covariance = self.products - self.total[:, None] * y.mean()
        scale = (self._spread * (y - y.mean()).square().sum()).sqrt()[:, None]
        return torch.where(scale > 0, covariance / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(-1, 1)

    def means(self) -> tuple[Tensor, Tensor]:
        """(mean over y = 1, mean over y = 0), each [L, 1 + P]. Raises SteersmanError for other labels."""
        self._check_whole()
        y = self.y[:, 0]
        if not bool(((y == 0) | (y == 1)).all()):
            raise SteersmanError("two classes are compared here: labels must be 0 or 1")
        return self.products / y.sum(), (self.total[:, None] - self.products) / (len(y) - y.sum())

    def success_mean(self) -> Tensor:
        """The mean [L] over the samples whose label is above 1/2. Raises SteersmanError where there is none."""
        self._check_whole()
        n = int((self.y[:, 0] > 0.5).sum())
        if not n:
            raise SteersmanError("no sample has a label above 1/2: there is no success to take a strength from")
        return self.successes / n

    def difference(self) -> Tensor:
        """m+ - m- [L, 1 + P] float64."""
        positive, negative = self.means()
        return positive - negative

    def f_statistic(self) -> Tensor:
        """F [L, 1 + P] float64; 0 for a constant feature, inf for one that separates the classes without any spread."""
        n_positive = float(self.y[:, 0].sum())
        between = self.difference().square() * (n_positive * (self.n - n_positive) / self.n)
        whole = self._spread[:, None]
        within = whole - between
        within = torch.where(within > _ROUNDING * whole, within, torch.zeros_like(within))
        return torch.where(whole > 0, between / (within / (self.n - 2)), torch.zeros_like(within))


def f_statistic(x: Tensor, labels: Tensor) -> Tensor:
    """The one-way F of two classes for each column of x [N, L], labels [N] of 0 and 1 (or bool): [L] float64.

    >>> f_statistic(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([0, 0, 1, 1])).tolist()
    [8.0]
    """
    sums = LabelSums(labels, n_features=x.shape[1])
    sums.add(x, torch.arange(len(x)))
    return sums.f_statistic()[:, 0]


def null_quantiles(permuted: Tensor, level: float) -> tuple[Tensor, float]:
    """The null of a statistic from permutations [L, P]: the `level` quantile of its size for each feature [L], and that
    of the largest size over all features, which is what an argmax over features must beat. NaN without permutations."""
    if not permuted.shape[1]:
        return torch.full((len(permuted),), math.nan), math.nan
    size = permuted.abs()
    each = torch.cat([part.quantile(level, dim=1) for part in size.split(4096)])
    return each.float(), float(size.amax(0).quantile(level))


def null_bound(n_features: int, n_samples: int) -> float:
    """About the largest |r| that chance gives among L features and n samples: sqrt(2 ln L / n)."""
    return math.sqrt(2 * math.log(max(n_features, 2)) / n_samples)
