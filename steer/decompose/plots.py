"""A picture of decompositions: explained variance against the number of features, beside that of random directions."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from steersman.files import write_bytes
from steersman.steer.decompose.record import Decomposition

_LOWEST = -1.0  # an explained variance below this says no more than this does


def plot_decompositions(found: Mapping[str, Decomposition] | Sequence[Decomposition], path: str | Path = "") -> bytes:
    """A PNG of the curves and their nulls, by name; also written to `path` where one is given."""
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
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    if path:
        write_bytes(path, png.getvalue())
    return png.getvalue()
