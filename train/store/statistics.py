"""What a store knows about the sizes of its activations, gathered while they are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from steersman.errors import SteersmanError

# A norm's histogram bucket is its float32 bit pattern without the last 11 bits: the sign (always 0), the 8 bits of the
# exponent and 12 of the mantissa. Buckets of one octave are therefore 2^-12 of it wide, and counts merge exactly.
_DROPPED_BITS = 11

LARGE_NORM_RATIO = 10.0
"""A row whose norm is above this many times the median counts as large. Norms of ordinary rows stay within a few times
their median at every hook point; the massive activations of attention sinks (arXiv 2402.17762) are tens to thousands of
times as long, and nothing lies between."""


@dataclass(frozen=True, kw_only=True)
class ActivationStats:
    """Statistics of one hook point over all rows, of the values as stored (after rounding to the store's type)."""

    mean: torch.Tensor
    """Mean of every dimension, [D] float32, summed in float64."""
    mean_norm: float
    """Mean over rows of the Euclidean norm."""
    median_norm: float
    """Median over rows of the Euclidean norm: the middle of the histogram bucket that holds the lower median (row
    (n - 1) // 2 in sorted order). Buckets are 2^-12 of an octave wide, so it is exact to 0.013 %."""
    mean_squared_norm: float
    """Mean over rows of the squared Euclidean norm."""
    n_rows: int
    """Rows that the figures are over."""
    max_norm: float = math.inf
    """At least the largest norm of a row, at most 0.025 % more; infinite where that is not known."""
    n_large: int = 0
    """Rows whose norm is above `LARGE_NORM_RATIO` times the median."""
    large_share: float = 0.0
    """Fraction of the sum of squared norms that those rows hold."""
    all_rows: bool = False
    """Whether the figures are over all rows there are, so that none is longer than `max_norm`."""

    @property
    def large_norm(self) -> float:
        """The norm above which a row is large; infinite where the median is 0."""
        return LARGE_NORM_RATIO * self.median_norm or math.inf

    def large_rows(self) -> str:
        """What to tell of the large rows in one line; nothing where there are none.

        >>> ActivationStats(mean=torch.zeros(2), mean_norm=3, median_norm=1, mean_squared_norm=9, n_rows=1000,
        ...                 n_large=20, large_share=0.52).large_rows()
        '20 rows (2 %) have norms above 10 x the median and hold 52 % of the squared norm'
        """
        if not self.n_large:
            return ""
        rows = f"{self.n_large:,} rows ({100 * self.n_large / self.n_rows:.2g} %)"
        held = f"{100 * self.large_share:.3g} % of the squared norm"
        return f"{rows} have norms above {LARGE_NORM_RATIO:g} x the median and hold {held}"


def stats_side_by_side(parts: Sequence[ActivationStats]) -> ActivationStats:
    """Statistics of the rows of several hook points side by side, from those of each.

    They hold the exact mean and mean squared norm. What their norms are follows only if the norms of the parts do not
    vary, for which the mean and median norm given are right. Of large rows only the largest norm is known.
    """
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        mean=torch.cat([part.mean for part in parts]),
        mean_norm=math.hypot(*(part.mean_norm for part in parts)),
        median_norm=math.hypot(*(part.median_norm for part in parts)),
        mean_squared_norm=sum(part.mean_squared_norm for part in parts),
        max_norm=math.hypot(*(part.max_norm for part in parts)),
        n_large=0,
        large_share=0.0,
    )


def row_norms(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each row of `x` [n, D], in float32 [n]; infinite or NaN exactly where a row is not finite.

    (A finite row whose squared norm passes float32's largest number, about 3.4e38, counts as not finite too.)
    """
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def nonfinite_error(
    hook: str, x: torch.Tensor, dtype: str, token: int, token_text: str, position: int, document: int
) -> SteersmanError:
    """The error for a row `x` [D], as the model gave it, that is not finite once it has the type `dtype`."""
    overflow = bool(torch.isfinite(x).all())
    cause = f"overflows {dtype}" if overflow else "is not finite (NaN or infinite)"
    fix = "dtype='bfloat16'" if overflow and dtype == "float16" else "on_nonfinite='skip'"
    return SteersmanError(
        f"the activation at {hook} {cause} for token {token} {token_text!r} at position {position} of "
        f"document {document}; pass {fix} to continue"
    )


SKIP_NEEDS_ONE_PROCESS = "on_nonfinite='skip' needs one process: with several, rows are numbered before they run"
"""What to say where several processes would leave out rows that are not finite."""


class StatsSums:
    """Sums over rows from which `ActivationStats` follow; those of two sets of rows add up to those of both.

    >>> sums = StatsSums(2)
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    >>> sums.add(x, row_norms(x))
    >>> stats = sums.stats()
    >>> stats.mean.tolist(), stats.mean_norm, round(stats.median_norm, 2)
    ([3.0, 4.0], 5.0, 5.0)
    """

    def __init__(self, width: int) -> None:
        self.n_rows = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._norm_sums = np.zeros(2)  # of the norm, of its square
        self._pending: list[np.ndarray] = []
        self._keys = np.zeros(0, dtype=np.int32)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, x: torch.Tensor, norms: torch.Tensor) -> None:
        """Take in the finite rows `x` [n, D] with their norms [n], on any device."""
        self.n_rows += len(x)
        self._sum += x.sum(0, dtype=torch.float64).cpu()
        values = norms.cpu().numpy()
        wide = values.astype(np.float64)
        self._norm_sums += (wide.sum(), wide @ wide)
        self._pending.append(values.view(np.int32) >> _DROPPED_BITS)
        if sum(map(len, self._pending)) > 1 << 18:  # sorting now and then costs less than at every batch
            self._count_pending()

    def _count_pending(self) -> None:
        if self._pending:
            keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            self._merge(keys, counts)
            self._pending = []

    def _merge(self, keys: np.ndarray, counts: np.ndarray) -> None:
        merged, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        total = np.zeros(len(merged), dtype=np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        self._keys, self._counts = merged.astype(np.int32), total

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums as arrays to store, in a fixed order of names."""
        self._count_pending()
        return {
            "n_rows": np.array([self.n_rows], dtype=np.int64),
            "norm_counts": self._counts,
            "norm_keys": self._keys,
            "norm_sums": self._norm_sums,
            "sum": self._sum.numpy(),
        }

    def add_arrays(self, part: Mapping[str, np.ndarray]) -> None:
        """Add the sums of other rows, given as their `arrays`."""
        self.n_rows += int(part["n_rows"][0])
        self._sum += torch.from_numpy(np.array(part["sum"]))
        self._norm_sums += part["norm_sums"]
        self._merge(part["norm_keys"], part["norm_counts"])

    def stats(self) -> ActivationStats:
        """The statistics; all zero when there is no row."""
        self._count_pending()
        n, median, lows, highs = max(self.n_rows, 1), 0.0, np.zeros(0), np.zeros(0)
        if self.n_rows:
            lows, highs = (
                ((self._keys + step).astype(np.int32) << _DROPPED_BITS).view(np.float32).astype(np.float64)
                for step in (0, 1)
            )
            bucket = int(np.searchsorted(np.cumsum(self._counts), (self.n_rows - 1) // 2, side="right"))
            median = 0.0 if self._keys[bucket] == 0 else float((lows[bucket] + highs[bucket]) / 2)
        large = lows >= LARGE_NORM_RATIO * median if median else np.zeros(len(lows), dtype=bool)
        squares = float(self._counts[large] @ np.square((lows + highs)[large] / 2))
        return ActivationStats(
            mean=(self._sum / n).float(),
            mean_norm=float(self._norm_sums[0] / n),
            median_norm=median,
            mean_squared_norm=float(self._norm_sums[1] / n),
            n_rows=self.n_rows,
            max_norm=float(highs[-1]) if len(highs) else 0.0,
            n_large=int(self._counts[large].sum()),
            large_share=min(1.0, squares / self._norm_sums[1]) if large.any() else 0.0,
            all_rows=True,
        )
