"""The text of single tokens, as it stands inside a text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Piece", "Pieces"]

_BROKEN = "\ufffd"
_LONGEST = 4
"""Tokens that one character can be spread over: the bytes of UTF-8."""


class Piece(NamedTuple):
    """A stretch of tokens that has a text: one token, or those that share a character."""

    text: str
    start: int
    """Its first token's place."""
    stop: int
    """The place after its last token."""


class Pieces:
    """The texts of a tokenizer's tokens, each looked up once.

    A tokenizer may leave out the space before the first token of a text, so that a token is read behind another. Tokens
    that hold only some of a character's bytes are one piece.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._before = self._decoded(self._anchor)

    def __call__(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of consecutive tokens, which together hold each token once."""
        found, at = [], 0
        while at < len(ids):
            text, stop = self.text(ids[at]), at + 1
            if _BROKEN in text:
                for end in range(at + 2, min(at + _LONGEST, len(ids)) + 1):
                    joined = self._behind(ids[at:end])
                    if _BROKEN not in joined:
                        text, stop = joined, end
                        break
            found.append(Piece(text, at, stop))
            at = stop
        return found

    def text(self, token: int) -> str:
        """The text of one token; with the sign for what is no character where it holds a part of one."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._behind([token])
        return known

    def _behind(self, ids: Sequence[int]) -> str:
        whole = self._decoded([*self._anchor, *ids])
        return whole[len(self._before) :] if whole.startswith(self._before) else self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
