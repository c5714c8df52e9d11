"""Confidence intervals of means: the percentile bootstrap over independent units (prompts, texts, pairs)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over units and what is known of its accuracy."""

    mean: float
    """Mean over the units."""
    low: float
    """Lower end of the 95 % interval; the mean itself for a single unit."""
    high: float
    """Upper end."""
    n: int
    """Units: prompts, texts or pairs."""

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0, level: float = 0.95) -> Estimate | None:
    """The mean of `values` with its interval; entries that are NaN (nothing to measure) do not count. None for none.

    >>> bootstrap([1.0, 1.0, 1.0])
    Estimate(mean=1.0, low=1.0, high=1.0, n=3)
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return None
    draws = np.random.default_rng(seed).integers(0, len(x), size=(DRAWS, len(x)))
    low, high = np.quantile(x[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean=float(x.mean()), low=float(low), high=float(high), n=len(x))
