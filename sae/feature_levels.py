"""How strongly every feature fires: a histogram of its activations on a logarithmic scale.

Shape letters: L latents, B bins.
"""

import torch
from torch import Tensor

BINS_PER_OCTAVE, OCTAVES = 16, 16
LOWEST = -10  # log2 of the smallest activation resolved, in units of the median |x| / sqrt(d_in)


class Levels:
    """A histogram of every feature's activations (of a signed code their magnitudes)."""

    def __init__(self, n_latents: int, unit: float, device: torch.device):
        self.unit = unit
        self.n_bins = BINS_PER_OCTAVE * OCTAVES
        self.counts = torch.zeros(n_latents * self.n_bins, dtype=torch.int32, device=device)

    def add(self, values: Tensor, latents: Tensor) -> None:
        """Count activations [n], none of them 0, of the features `latents` [n]."""
        level = ((values.abs() / self.unit).log2() - LOWEST) * BINS_PER_OCTAVE
        bins = level.floor().clamp(0, self.n_bins - 1).long()
        self.counts.scatter_add_(0, latents * self.n_bins + bins, torch.ones_like(bins, dtype=torch.int32))

    @property
    def edges(self) -> Tensor:
        """[B + 1]: the bins' edges, in units of activation. The first bin holds all below it, the last all above."""
        return torch.exp2(torch.arange(self.n_bins + 1) / BINS_PER_OCTAVE + LOWEST) * self.unit

    def percentile(self, fraction: float, largest: Tensor) -> Tensor:
        """[L]: the upper edge of the bin that holds the percentile, at most the largest activation seen."""
        counts = self.counts.view(-1, self.n_bins).long()
        total = counts.sum(dim=1, keepdim=True)
        reached = counts.cumsum(dim=1) >= (fraction * total).ceil().clamp_min(1)
        edge = self.edges.to(counts.device)[reached.int().argmax(dim=1) + 1]
        return torch.where(total[:, 0] > 0, torch.minimum(edge, largest), torch.zeros_like(largest))

    def linear(self, n_bins: int, largest: Tensor) -> Tensor:
        """[L, n_bins] int32: counts in equal parts of (0, largest], each logarithmic bin's spread evenly over its
        width, with the sum kept. The lowest parts are exact up to that spread, the uppermost to 4.4 %."""
        counts, edges = self.counts.view(-1, self.n_bins), self.edges.to(self.counts.device)
        parts = torch.zeros(len(counts), n_bins, dtype=torch.int32, device=counts.device)
        width = edges.diff()
        for start in range(0, len(counts), _BLOCK):
            block, top = counts[start : start + _BLOCK].double(), largest[start : start + _BLOCK].double()
            ends = torch.arange(1, n_bins + 1, device=counts.device) / n_bins * top[:, None]
            below = block.cumsum(dim=1)
            at = torch.searchsorted(edges.double(), ends.contiguous()).sub_(1).clamp_(0, self.n_bins - 1)
            inside = ((ends - edges[at]) / width[at]).clamp(0, 1) * block.gather(1, at)
            upto = below.gather(1, at) - block.gather(1, at) + inside
            upto[:, -1] = below[:, -1]
            whole = upto.round().int()
            parts[start : start + _BLOCK] = torch.diff(whole, prepend=torch.zeros_like(whole[:, :1]), dim=1)
        return parts


_BLOCK = 4096  # features whose histograms are turned at once
