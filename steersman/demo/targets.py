"""What the quickstart steers towards, and how often it shows in text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something to steer towards: the words by which to see it, and the features that may bring it about."""

    name: str
    """Name of the concept, or the first tokens that the feature promotes."""
    words: tuple[str, ...]
    """The words that should become more frequent."""
    candidates: tuple[int, ...]
    """Feature ids to try."""


def word_rate(completions: Sequence[str], words: Sequence[str]) -> float:
    """Words of `words` per 100 words of `completions`.

    >>> word_rate(["The fog came. Fog!", "Mist and fog everywhere"], ("fog", "mist"))
    50.0
    """
    found = re.findall(r"\w+", " ".join(completions).lower())
    wanted = {word.lower() for word in words}
    return 100 * sum(word in wanted for word in found) / max(1, len(found))
