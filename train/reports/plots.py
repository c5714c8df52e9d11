"""Pictures of a training run: figures, which `plot_run` saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.figures import save_figure
from steersman.sae import FeatureStats
from steersman.sae.plots import plot_density

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_run(metrics: list[dict[str, Any]], stats: FeatureStats, folder: Path) -> None:
    """Write `loss.png` (FVU and dead fraction over tokens) and `density.png` (histogram of feature densities).

    Raises SteersmanError when they cannot be written.
    """
    for name, figure in (("loss.png", plot_loss(metrics)), ("density.png", plot_density(stats))):
        save_figure(figure, folder / name)


def plot_loss(metrics: list[dict[str, Any]]) -> Figure:
    """A figure of the FVU on training batches and the dead features (%) over tokens, from the lines of a run's log."""
    from matplotlib.figure import Figure

    tokens = [line["tokens"] for line in metrics]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, [line.get("fvu", np.nan) for line in metrics], color="C0")
    axes.set(xlabel="tokens", ylabel="FVU (training batches)", yscale="log")
    twin = axes.twinx()
    twin.plot(tokens, [100 * line.get("dead_share", np.nan) for line in metrics], color="C1", linewidth=1)
    twin.set_ylabel("dead features (%)", color="C1")
    return figure
