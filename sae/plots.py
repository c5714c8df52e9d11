"""Figures of an SAE's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Densities(Protocol):
    """Of `FeatureStats`."""

    @property
    def density(self) -> Tensor:
        """[L], the fraction of the tokens that each feature is active on."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens that it was counted on."""
        ...


def plot_density(stats: Densities) -> Figure:
    """A figure of how many features fire on which fraction of the tokens; those that never fire are counted above."""
    from matplotlib.figure import Figure

    density = stats.density.numpy()
    alive = density[density > 0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if len(alive):
        axes.hist(np.log10(alive), bins=50, color="C0")
    axes.set(xlabel="log10 of the fraction of tokens", ylabel="features")
    axes.set_title(f"{len(alive)} of {len(density)} features fired on {stats.n_tokens:,} tokens", fontsize=10)
    return figure
