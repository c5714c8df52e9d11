"""Colour in a terminal, where there is one that wants it."""

import os
import sys
from typing import TextIO

__all__ = ["PALETTE", "Painted", "highlighted", "in_colour"]

PALETTE = (222, 153, 157, 218, 216, 183)
"""Backgrounds among the 256 colours of terminals, light enough for black text."""


class Painted(str):
    """Text that has escape codes of ours, and whose parts from elsewhere went through `steersman.visible` already."""


def in_colour(stream: TextIO | None = None) -> bool:
    """Whether to write in colour to `stream` (standard output): a terminal, and `NO_COLOR` (https://no-color.org) is
    not set."""
    stream = stream or sys.stdout
    asked = bool(stream) and stream.isatty()
    return asked and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def highlighted(text: str, colour: int) -> str:
    """`text` in black on a background of `PALETTE`, which is gone round for further colours."""
    return f"\x1b[38;5;16;48;5;{PALETTE[colour % len(PALETTE)]}m{text}\x1b[0m"
