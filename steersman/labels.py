"""Labels of text: of a whole document, or of each of its tokens.

A label is 1, 0, or -1 where nothing is known. It travels with its document, as a string that holds it.
"""

from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import shown

__all__ = ["UNLABELLED", "Label", "LabelledText", "parse_label"]

UNLABELLED = -1

Label = int | tuple[int, ...]
"""Of a document, or of each of its tokens."""


class LabelledText(str):
    """A document with a label for all of its tokens, or one for each of them (without the BOS).

    >>> text = LabelledText("a sunny day", 1)
    >>> text, text.label
    ('a sunny day', 1)
    """

    label: Label

    def __new__(cls, text: str, label: Label) -> "LabelledText":
        made = super().__new__(cls, text)
        made.label = label
        return made


def parse_label(value: Any, where: str) -> Label:
    """A label as files hold it: 1, 0, -1, true, false, null for -1, or a list of those with one for each token.

    >>> parse_label(True, "line 1"), parse_label(None, "line 2"), parse_label([0, 1], "line 3")
    (1, -1, (0, 1))
    """
    if isinstance(value, list | tuple):
        return tuple(_one(entry, where) for entry in value)
    return _one(value, where)


def _one(value: Any, where: str) -> int:
    if value is None:
        return UNLABELLED
    if value in (0, 1, UNLABELLED) and isinstance(value, bool | int | float):
        return int(value)
    raise SteersmanError(f"{where}: the label is {shown(value)}; it must be 1, 0, or -1 where it is not known")
