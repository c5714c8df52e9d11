"""Where pieces of a text are among its tokens: characters to absolute positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steersman.errors import SteersmanError
from steersman.lm.model import LanguageModel
from steersman.lm.tokens import Prompt

Piece = str | tuple[int, int]
"""Part of a text: a substring, wherever it occurs, or the characters from start up to but not including stop."""


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """A text beside its tokens."""

    text: str
    """The text, a conversation as its template writes it."""
    ids: list[int]
    """Its token ids, as `LanguageModel.encode` gives them: the BOS included."""
    characters: list[tuple[int, int]]
    """The characters of each token, half-open; none (start = stop) for a BOS that the text does not hold."""

    def positions(self, pieces: Sequence[Piece]) -> list[int]:
        """The absolute positions of all tokens that hold a character of one of `pieces`, once each, in order.

        Raises SteersmanError for a substring that does not occur, an empty piece and one outside the text.
        """
        ranges = [found for piece in pieces for found in self._ranges(piece)]
        return [
            i
            for i, (start, stop) in enumerate(self.characters)
            if any(start < end and begin < stop for begin, end in ranges)
        ]

    def _ranges(self, piece: Piece) -> list[tuple[int, int]]:
        if isinstance(piece, str):
            if not piece.strip():
                raise SteersmanError("a span of a text must hold more than white space")
            found, start = [], self.text.find(piece)
            while start >= 0:
                found.append((start, start + len(piece)))
                start = self.text.find(piece, start + len(piece))
            if not found:
                raise SteersmanError(f"the span {piece[:60]!r} does not occur in the prompt {self.text[:60]!r}")
            return found
        start, stop = piece
        if not 0 <= start < stop <= len(self.text):
            raise SteersmanError(f"characters {start}:{stop} are not in a prompt of {len(self.text)}")
        return [(start, stop)]


def text_offsets(lm: LanguageModel, prompt: Prompt) -> Offsets:
    """The characters of each token of a prompt, a string or a conversation, as `lm.encode` tokenizes it.

    Raises SteersmanError for token ids, for a tokenizer that does not say where its tokens come from, and where a
    conversation's template writes tokens that its text alone would not give.
    """
    tokenizer: Any = lm.tokenizer
    batch = lm.encode([prompt])  # also refuses what is no prompt
    ids = batch.input_ids[0].tolist()
    if isinstance(prompt, str):
        text = prompt
    elif batch.spans is not None:
        text = batch.spans.conversations[0].text
    else:
        raise SteersmanError("spans are found in text: give prompts as strings or conversations, not as token ids")
    if not getattr(tokenizer, "is_fast", False):
        raise SteersmanError(
            f"the tokenizer of {lm.name} is not fast: it does not say which characters its tokens hold"
        )
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    characters = [(int(start), int(stop)) for start, stop in read["offset_mapping"]]
    before = len(ids) - len(read["input_ids"])
    if before < 0 or ids[before:] != list(read["input_ids"]):
        raise SteersmanError("the prompt's tokens are not those of its text: its spans cannot be found")
    return Offsets(text=text, ids=ids, characters=[(0, 0)] * before + characters)
