"""A label from what a feature reads and what it writes, honest about the two where they differ.

`sun, sunny, rain` is a feature that fires on these words and writes them or their like; `onions, carrots -> cooked,
cold` fires on the first and writes the second; `-> cooked, cold` never fired; `onions, carrots` alone writes nothing
that stands out. The two sides are kept apart because they often are different things, and it is the output side that
predicts what steering does (arXiv 2501.08319, sec. 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from steersman.steer.labels.words import alike, words_of

ARROW = "->"
_FUSION = 5
"""Constant of the reciprocal ranks by which two lists of tokens are joined (Cormack et al. 2009 take 60 for long
ones): small, as it is the first few places that count."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The words of both sides of a feature, strongest first."""

    reads: tuple[str, ...]
    """Words it fires on; empty where it never fired."""
    writes: tuple[str, ...]
    """Words it makes likelier; empty where nothing stands out."""
    agreement: float | None
    """Share of the words it reads that are among those it writes (or begin alike); None where a side is empty."""

    def text(self, n: int = 3) -> str:
        """The label, of at most n words a side."""
        if self.agreement is not None and self.agreement >= 0.5:
            both = sorted(self.reads, key=lambda word: not _among(word, self.writes))  # stable: those of both first
            return ", ".join(both[:n])
        read, written = (", ".join(side[:n]) for side in (self.reads, self.writes))
        return f"{read} {ARROW} {written}".strip() if written else read


def both_sides(fires_on: Sequence[str], raised: Sequence[Sequence[str]], n: int = 5) -> Sides:
    """The words of a feature that fires on the tokens `fires_on`, and of which each list of `raised` (by the decoder
    row, by clamping) says that it raises those tokens, strongest first. `n` words of each side are kept; agreement is
    looked for among all of those raised.

    >>> both_sides([" sun", " rain"], [[" sunny", " rain", " dog"], [" rain", " cat"]]).text()
    'sun, rain'
    >>> both_sides([" sun", " rain"], [[" cold", " warm"], [" cold"]]).text()
    'sun, rain -> cold, warm'
    """
    reads, writes = words_of(fires_on, n), joined(raised)
    shared = [word for word in reads if _among(word, writes)]
    agreement = len(shared) / len(reads) if reads and writes else None
    kept = writes if agreement is not None and agreement >= 0.5 else writes[:n]
    return Sides(reads=tuple(reads), writes=tuple(kept), agreement=agreement)


def joined(lists: Sequence[Sequence[str]]) -> list[str]:
    """The words of several ranked lists as one, by the sum of reciprocal ranks: what stands high in more than one
    comes first."""
    score: dict[str, float] = {}
    shown: dict[str, str] = {}
    for tokens in lists:
        for rank, word in enumerate(words_of(tokens)):
            key = word.casefold()
            shown.setdefault(key, word)
            score[key] = score.get(key, 0.0) + 1 / (_FUSION + rank)
    return [shown[key] for key in sorted(score, key=lambda key: -score[key])]


def _among(word: str, words: Sequence[str]) -> bool:
    return any(alike(word, other) for other in words)
