"""matplotlib figures as files and bytes. A function that draws returns a figure; what becomes of it is decided here."""

from __future__ import annotations

import io
from os import PathLike
from typing import TYPE_CHECKING

from steersman.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["png", "save_figure", "svg"]

DPI = 110


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, the same bytes each time: without a date, its ids from what is drawn."""
    import matplotlib as mpl

    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "steersman"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": f"Matplotlib {mpl.__version__}"})
    return content.getvalue()


def save_figure(figure: Figure, path: str | PathLike[str], dpi: int = DPI) -> None:
    """Write the figure as a PNG file, whole or not at all."""
    write_bytes(path, png(figure, dpi))
