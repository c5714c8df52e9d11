"""What is known of a document beside its text, which travels with it, as a string that holds it: labels and tokens.

A label is 1, 0, or -1 where nothing is known, of a whole document or of each of its tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from steersman.errors import SteersmanError
from steersman.reading import shown

__all__ = [
    "UNLABELLED",
    "Label",
    "LabelledText",
    "TextTokens",
    "TokenizedText",
    "parse_label",
    "tokens_of",
    "with_tokens",
]

UNLABELLED = -1

Label = int | tuple[int, ...]
"""Of a document, or of each of its tokens."""


@dataclass(frozen=True)
class TextTokens:
    """The tokens of a document, where they were found before it is put into contexts."""

    ids: np.ndarray
    """[n] int64."""
    kept: np.ndarray | None = None
    """[n] bool: which of them may become rows; None: all."""


class TokenizedText(str):
    """A document that brings its tokens."""

    tokens: TextTokens

    def __new__(cls, text: str, tokens: TextTokens) -> "TokenizedText":
        made = super().__new__(cls, text)
        made.tokens = tokens
        return made


def tokens_of(document: str) -> TextTokens | None:
    """The tokens that a document brings, if it does."""
    return document.tokens if isinstance(document, TokenizedText | LabelledText) else None


def with_tokens(document: str, tokens: TextTokens) -> str:
    """The document with its tokens, and with its label where it has one."""
    text = TokenizedText(document, tokens)
    return LabelledText(text, document.label) if isinstance(document, LabelledText) else text


class LabelledText(str):
    """A document with a label for all of its tokens, or one for each of them (without the BOS).

    >>> text = LabelledText("a sunny day", 1)
    >>> text, text.label
    ('a sunny day', 1)
    """

    label: Label
    tokens: TextTokens | None = None

    def __new__(cls, text: str, label: Label) -> "LabelledText":
        made = super().__new__(cls, text)
        made.label = label
        if isinstance(text, TokenizedText):
            made.tokens = text.tokens
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
