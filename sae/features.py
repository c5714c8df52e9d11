"""What each feature does on a set of tokens: density, activation levels and the tokens it fires on most.

One pass over the activations; memory depends on the number of features, not of tokens.

Shape letters: N tokens of a batch, L latents, K active latents a token, M kept examples a feature.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.sae.base import SAE, FeatureStats, SparseCode
from steersman.sae.metrics import FeatureSums, large_rows

_BINS_PER_OCTAVE, _OCTAVES = 16, 16
_LOWEST = -10  # log2 of the smallest activation resolved, in units of the median |x| / sqrt(d_in)


@dataclass(frozen=True, kw_only=True)
class FeatureSummary:
    """Summary of every feature over `stats.n_tokens` tokens. L latents, M examples a feature."""

    stats: FeatureStats
    """Density, largest and mean activation."""
    p999: Tensor
    """[L] fp32: 99.9th percentile of the activations over the ordinary rows where the feature is active, from a
    histogram with 16 bins an octave (so within 4.4 %); 0 where it is active on none."""
    example_values: Tensor
    """[L, M] fp32: the largest activations (of a signed code those of largest magnitude, with their signs), largest
    first; 0 where there are fewer. On ordinary rows or, for a feature that fires on none, on rows of huge norm."""
    example_rows: Tensor
    """[L, M] int64: the store's rows they are on; -1 where there are fewer."""


class TopExamples:
    """The M largest activations (by magnitude) of every feature and the rows they are on."""

    def __init__(self, n_latents: int, n_examples: int, device: torch.device):
        self.values = torch.zeros(n_latents, n_examples, device=device)
        self.rows = torch.full((n_latents, n_examples), -1, dtype=torch.int64, device=device)

    def add(self, code: SparseCode, rows: Tensor) -> None:
        """Merge in the code [N, K] of the tokens at `rows` [N]."""
        M = self.values.shape[1]
        active = code.active
        values, latents = code.values[active], code.indices[active]
        rows = rows[:, None].expand_as(code.indices)[active]
        # Only what beats a feature's smallest kept value can matter: after the first batches, almost nothing.
        better = values.abs() > self.values[latents, -1].abs()
        values, latents, rows = values[better], latents[better], rows[better]
        order = torch.argsort(values.abs(), descending=True, stable=True)
        order = order[torch.argsort(latents[order], stable=True)]
        values, latents, rows = values[order], latents[order], rows[order]
        touched, counts = torch.unique_consecutive(latents, return_counts=True)
        starts = counts.cumsum(0) - counts
        rank = torch.arange(len(latents), device=latents.device) - starts.repeat_interleave(counts)
        kept = rank < M
        place = torch.searchsorted(touched, latents[kept])
        new_values = torch.zeros(len(touched), M, device=values.device)
        new_rows = torch.full((len(touched), M), -1, dtype=torch.int64, device=values.device)
        new_values[place, rank[kept]] = values[kept]
        new_rows[place, rank[kept]] = rows[kept]
        all_values = torch.cat([self.values[touched], new_values], dim=1)
        all_rows = torch.cat([self.rows[touched], new_rows], dim=1)
        best = torch.sort(all_values.abs(), dim=1, descending=True, stable=True).indices[:, :M]
        self.values[touched] = all_values.gather(1, best)
        self.rows[touched] = all_rows.gather(1, best)


class Levels:
    """A histogram of every feature's activations (of a signed code their magnitudes) on a logarithmic scale."""

    def __init__(self, n_latents: int, unit: float, device: torch.device):
        self.unit = unit
        self.n_bins = _BINS_PER_OCTAVE * _OCTAVES
        self.counts = torch.zeros(n_latents * self.n_bins, dtype=torch.int32, device=device)

    def add(self, code: SparseCode) -> None:
        active = code.active
        values, latents = code.values[active].abs(), code.indices[active]
        level = ((values / self.unit).log2() - _LOWEST) * _BINS_PER_OCTAVE
        bins = level.floor().clamp(0, self.n_bins - 1).long()
        self.counts.scatter_add_(0, latents * self.n_bins + bins, torch.ones_like(bins, dtype=torch.int32))

    def percentile(self, fraction: float, largest: Tensor) -> Tensor:
        """[L]: the upper edge of the bin that holds the percentile, at most the largest activation seen."""
        counts = self.counts.view(-1, self.n_bins).long()
        total = counts.sum(dim=1, keepdim=True)
        reached = counts.cumsum(dim=1) >= (fraction * total).ceil().clamp_min(1)
        edge = torch.exp2((reached.int().argmax(dim=1) + 1) / _BINS_PER_OCTAVE + _LOWEST) * self.unit
        return torch.where(total[:, 0] > 0, torch.minimum(edge, largest), torch.zeros_like(largest))


class Rows(NamedTuple):
    """Some tokens: their activations x [N, D] and their row numbers [N] in the store."""

    x: Tensor
    rows: Tensor


@torch.no_grad()
def summarize_features(
    sae: SAE, batches: Iterable[Rows], median_norm: float, n_examples: int = 30, max_norm: float = float("inf")
) -> FeatureSummary:
    """Statistics and the largest activations of every feature, in one pass over `batches`; rows longer than `max_norm`
    are no ordinary ones.

    >>> from steersman.sae import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=4, d_sae=8, k=2))
    >>> batches = [Rows(torch.randn(20, 4), torch.arange(20))]
    >>> summarize_features(sae, batches, median_norm=2.0, n_examples=3).example_rows.shape
    torch.Size([8, 3])
    """
    L, device = sae.cfg.d_sae, sae.device
    examples, of_large = TopExamples(L, n_examples, device), TopExamples(L, n_examples, device)
    levels = Levels(L, median_norm / sae.cfg.d_in**0.5, device)
    sums = FeatureSums(L, device)
    for x, rows in batches:
        x, rows = x.to(device), rows.to(device)
        code, large = sae.encode_sparse(x), large_rows(x, max_norm)
        sums.add(code, large)
        ordinary = code
        if bool(large.any()):
            of_large.add(SparseCode(code.values[large], code.indices[large]), rows[large])
            ordinary, rows = SparseCode(code.values[~large], code.indices[~large]), rows[~large]
        levels.add(ordinary)
        examples.add(ordinary, rows)
    on_large_alone = (examples.rows[:, :1] < 0).expand_as(examples.rows)
    return FeatureSummary(
        stats=sums.stats(median_norm),
        p999=levels.percentile(0.999, sums.largest).cpu(),
        example_values=torch.where(on_large_alone, of_large.values, examples.values).cpu(),
        example_rows=torch.where(on_large_alone, of_large.rows, examples.rows).cpu(),
    )
