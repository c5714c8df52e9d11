"""A picture of decompositions: explained variance against the number of features, beside that of random directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Curves(Protocol):
    """Of a `Decomposition`."""

    @property
    def method(self) -> str:
        """Its method."""
        ...

    @property
    def curve(self) -> Tensor:
        """[k], the explained variance with the first 1, 2, ... features."""
        ...

    @property
    def null_curve(self) -> Tensor:
        """[k], the mean of random directions."""
        ...

    @property
    def null_high(self) -> Tensor:
        """[k], the largest of random directions."""
        ...

    def __len__(self) -> int: ...


_LOWEST = -1.0  # an explained variance below this says no more than this does


def plot_decompositions(found: Mapping[str, Curves] | Sequence[Curves]) -> Figure:
    """A figure of the curves and their nulls, by name."""
    from matplotlib.figure import Figure

    named = found if isinstance(found, Mapping) else {f"{i}: {d.method}": d for i, d in enumerate(found)}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, d) in enumerate(named.items()):
        count = range(1, len(d) + 1)
        colour = f"C{i % 10}"
        axes.plot(count, d.curve.clamp_min(_LOWEST).tolist(), color=colour, marker=".", label=name)
        axes.plot(count, d.null_curve.clamp_min(_LOWEST).tolist(), color=colour, linestyle=":", linewidth=1)
        low, high = d.null_curve.clamp_min(_LOWEST).tolist(), d.null_high.clamp_min(_LOWEST).tolist()
        axes.fill_between(count, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.plot([], [], color="grey", linestyle=":", label="random directions (mean, up to the largest)")
    axes.set(xlabel="features", ylabel="explained variance")
    axes.legend(fontsize=8)
    return figure
