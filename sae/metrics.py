"""How well an SAE rebuilds activations, and how often its features fire: sums over batches, in bounded memory.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae.base import SAE, FeatureStats, SparseCode

DENSE = 0.1
"""A feature active on more than this fraction of the tokens counts as dense."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Reconstruction metrics over a set of `n_tokens` tokens."""

    fvu: float
    """`sum |x - x_hat|^2 / sum |x - mean(x)|^2`, the mean per dimension over the set: predicting the mean gives 1. NaN
    where the rows do not vary."""
    fvu_ordinary: float
    """The same over the ordinary rows alone, and around their mean: a few rows of huge norm, as those of attention
    sinks, can hold most of the variance, and are rebuilt easily. Equal to `fvu` where there is none."""
    explained_variance: float
    """1 - fvu."""
    l0: float
    """Mean number of active features a token."""
    dead_fraction: float
    """Fraction of the features that never fired on the set."""
    dense_fraction: float
    """Fraction of the features that fired on more than a tenth of the tokens."""
    cosine: float
    """Mean cosine of x and x_hat."""
    relative_norm: float
    """Mean of |x_hat| / |x|."""
    n_tokens: int
    """Size of the set: rare features need many tokens before silence means death."""
    n_large: int
    """Rows of the set that are no ordinary ones, because their norm is too large."""

    @property
    def undefined(self) -> str:
        """What is to be said of figures that are not defined; nothing where all are."""
        if not math.isnan(self.fvu_ordinary):
            return ""
        which = "the" if math.isnan(self.fvu) else "the ordinary"
        return f"{which} rows measured on do not vary, so no share of their variance is defined"

    def record(self) -> dict[str, float | None]:
        """The figures as files and tables have them: under the names that they always had, None for what is not
        defined."""
        on_disk = {"dead_fraction": "dead_share", "dense_fraction": "dense_share"}
        return {on_disk.get(name, name): defined(value) for name, value in asdict(self).items()}


def defined(value: float) -> float | None:
    """`value`, or None for NaN: JSON has no word for it."""
    return None if math.isnan(value) else value


class ReconstructionSums:
    """Running sums behind `Reconstruction`, in float64 on the device of the data; read once, at the end."""

    def __init__(self, d_in: int, d_sae: int, device: torch.device, *, by_column: bool = False):
        """`by_column` keeps what `fvu_of` needs."""
        self.counts = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.sum = torch.zeros(2, d_in, dtype=torch.float64, device=device)
        """Of the centred rows: all, and the large ones."""
        self.scalars = torch.zeros(7, dtype=torch.float64, device=device)
        """Squared error, squared centred norm, cosine and relative norm; of the large rows their number and the first
        two."""
        self.columns = torch.zeros(2, d_in if by_column else 0, dtype=torch.float64, device=device)
        """Squared error and squared centred value of every column."""
        self.shift: Tensor | None = None
        self.n_tokens = 0

    def add(self, x: Tensor, x_hat: Tensor, code: SparseCode, large: Tensor | None = None) -> None:
        """Add N tokens: x and x_hat [N, D], their code [N, K], and which rows are large, [N] bool (None: no row)."""
        x, x_hat = x.float(), x_hat.float()
        if self.shift is None:  # sums of squares around a point near the mean lose no digits
            self.shift = x.mean(dim=0)
        centred = (x - self.shift).double()
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        tiny = torch.finfo(torch.float32).tiny
        cosine = (x * x_hat).sum(dim=1) / (norm * norm_hat).clamp_min(tiny)
        self.sum[0] += centred.sum(dim=0)
        self.scalars[:4] += torch.stack(
            [
                (x - x_hat).double().square().sum(),
                centred.square().sum(),
                cosine.double().sum(),
                (norm_hat / norm.clamp_min(tiny)).double().sum(),
            ]
        )
        if self.columns.numel():
            self.columns += torch.stack([(x - x_hat).double().square().sum(dim=0), centred.square().sum(dim=0)])
        if large is not None:
            self._add_large(centred[large], (x - x_hat)[large].double())
        active = code.active.double()
        self.counts.scatter_add_(0, code.indices.flatten(), active.flatten())
        self.n_tokens += len(x)

    def _add_large(self, centred: Tensor, error: Tensor) -> None:
        self.sum[1] += centred.sum(dim=0)
        n = torch.tensor(len(centred), dtype=torch.float64, device=centred.device)
        self.scalars[4:] += torch.stack([n, error.square().sum(), centred.square().sum()])

    def density(self) -> Tensor:
        """[L] float64: the fraction of the tokens on which each feature was active."""
        return self.counts / max(1, self.n_tokens)

    def fvu_of(self, start: int, stop: int) -> float:
        """FVU of columns start..stop alone, such as those of one hook point of several side by side; NaN where they do
        not vary."""
        error, squares = self.columns[:, start:stop].sum(dim=1).tolist()
        return _fvu(error, squares, self.sum[0, start:stop], self.n_tokens)

    def result(self) -> Reconstruction:
        """The metrics. Raises SteersmanError for too few tokens."""
        if self.n_tokens < 2:
            raise SteersmanError(f"{self.n_tokens} tokens are too few to measure a variance; evaluate on more")
        error, squares, cosine, ratio, n_large, large_error, large_squares = self.scalars.tolist()
        fvu = _fvu(error, squares, self.sum[0], self.n_tokens)
        n_ordinary = self.n_tokens - int(n_large)
        ordinary = _fvu(error - large_error, squares - large_squares, self.sum[0] - self.sum[1], n_ordinary)
        density = self.density()
        return Reconstruction(
            fvu=fvu,
            fvu_ordinary=ordinary if n_large else fvu,
            explained_variance=1 - fvu,
            l0=float(self.counts.sum()) / self.n_tokens,
            dead_fraction=float((density == 0).double().mean()),
            dense_fraction=float((density > DENSE).double().mean()),
            cosine=cosine / self.n_tokens,
            relative_norm=ratio / self.n_tokens,
            n_tokens=self.n_tokens,
            n_large=int(n_large),
        )


class GroupedSums:
    """Squared error and variance of rows by groups, the variance around the mean of all of them: the figure of all is
    the mean of the groups', weighted by their variance."""

    def __init__(self, n_groups: int, d_in: int, device: torch.device) -> None:
        self.sum = torch.zeros(n_groups, d_in, dtype=torch.float64, device=device)
        self.scalars = torch.zeros(3, n_groups, dtype=torch.float64, device=device)
        """Rows, squared error, squared centred norm."""
        self.shift: Tensor | None = None

    def add(self, x: Tensor, x_hat: Tensor, group: Tensor) -> None:
        """Add N tokens: x and x_hat [N, D], and their groups [N] int64."""
        if not len(x):
            return
        x = x.float()
        if self.shift is None:
            self.shift = x.mean(dim=0)
        centred = (x - self.shift).double()
        error = (x - x_hat.float()).double().square().sum(dim=1)
        self.sum.index_add_(0, group, centred)
        of_rows = torch.stack([torch.ones_like(error), error, centred.square().sum(dim=1)])
        self.scalars.index_add_(1, group, of_rows)

    def result(self) -> list[tuple[int, float]]:
        """Of each group its number of rows and their FVU; NaN where they do not vary."""
        n, error, squares = self.scalars
        mean = self.sum.sum(dim=0) / n.sum().clamp_min(1)
        variance = squares - 2 * self.sum @ mean + n * mean.square().sum()
        fvu = torch.where(variance > 0, error / variance, float("nan"))
        return [(int(rows), value) for rows, value in zip(n.tolist(), fvu.tolist())]


def _fvu(error: float, squares: float, total: Tensor, n_tokens: int) -> float:
    """Squared error over variance, from the sums of squares and of the rows [D] around one point."""
    variance = squares - float(total.square().sum()) / max(1, n_tokens)
    return error / variance if variance > 0 else float("nan")


def large_rows(x: Tensor, max_norm: float) -> Tensor:
    """Which of the rows x [N, D] are longer than `max_norm`, [N] bool."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) > max_norm


@torch.no_grad()
def measure_reconstruction(sae: SAE, batches: Iterable[Tensor], max_norm: float = float("inf")) -> Reconstruction:
    """Reconstruction metrics of `sae` over batches of activations [N, D]; rows longer than `max_norm` are no ordinary
    ones. Raises SteersmanError for a transcoder.

    >>> from steersman.sae import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=4, d_sae=8, k=2))
    >>> measure_reconstruction(sae, [torch.randn(10, 4), torch.randn(10, 4)]).n_tokens
    20
    """
    if sae.cfg.transcoder:
        sae.check_residual("measuring the reconstruction of activations by themselves")
    sums = ReconstructionSums(sae.cfg.out_width, sae.cfg.d_sae, sae.device)
    for x in batches:
        x = x.to(sae.device)
        sums.add(x, *sae.reconstruct(x), large_rows(x, max_norm))
    return sums.result()


class FeatureSums:
    """Running sums behind `FeatureStats`, on the device of the SAE."""

    def __init__(self, n_latents: int, device: torch.device):
        self.largest = torch.zeros(n_latents, device=device)
        self.total = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.counts = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.n_tokens = 0

    def add(self, code: SparseCode, large: Tensor | None = None) -> None:
        """Add the code [N, K] of N tokens, and which rows are large, [N] bool (None: no row)."""
        values, flat = code.values.flatten(), code.indices.flatten()
        ordinary = code.values if large is None else code.values.masked_fill(large[:, None], 0)
        self.largest.scatter_reduce_(0, flat, ordinary.flatten().abs(), "amax")
        self.total.scatter_add_(0, flat, values.double())
        self.counts.scatter_add_(0, flat, code.active.flatten().double())
        self.n_tokens += len(code.values)

    def stats(self, median_norm: float) -> FeatureStats:
        return FeatureStats(
            max_act=self.largest.cpu(),
            density=(self.counts / max(1, self.n_tokens)).float().cpu(),
            mean_act=(self.total / self.counts.clamp_min(1)).float().cpu(),
            n_tokens=self.n_tokens,
            median_norm=median_norm,
        )
