"""The input side of a label: the words that a feature fires on, from its contexts as plain text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from steersman.errors import SteersmanError
from steersman.steer.labels.words import whole_word


class Firing(NamedTuple):
    """One token that a feature fires on."""

    before: str
    """Text before it."""
    token: str
    """The token."""
    after: str
    """Text behind it."""
    activation: float
    """How strongly the feature fires there."""


def fired_words(firings: Iterable[Firing], tokens: Sequence[str] = ()) -> list[str]:
    """The words in which the tokens of `firings` stand, by the sum of their activations, largest first; then those of
    `tokens` (the feature's top tokens) that are no part of one.

    >>> fired_words([Firing("the tur", "nips", " and", 3.0), Firing("a", " pea", "", 2.0)], ["nips", " beans"])
    ['turnips', 'pea', 'beans']
    """
    total: dict[str, float] = {}
    for before, token, after, activation in firings:
        word = whole_word(before, token, after)
        word = word.strip() or word
        total[word] = total.get(word, 0.0) + abs(activation)
    words = sorted(total, key=lambda word: -total[word])
    rest = (token.strip() or token for token in tokens)
    return words + [token for token in rest if not any(token in word for word in words)]


def words_fired_on(features: Iterable[Mapping[str, Any]]) -> dict[int, list[str]]:
    """The words that each feature fires on, by its id, from what `summarize_features` says of them: its features as
    dictionaries, or the entries of the features.json that `steersman features` writes.

    Raises SteersmanError for what is no such entry.

    >>> context = {"before": "the tur", "token": "nips", "after": " and", "activation": 3.0}
    >>> words_fired_on([{"id": 5, "fires_on": ["nips", " beans"], "contexts": [context]}])
    {5: ['turnips', 'beans']}
    """
    found = {}
    try:
        for entry in features:
            firings = [
                Firing(str(one["before"]), str(one["token"]), str(one["after"]), float(one["activation"]))
                for one in entry.get("contexts", ())
            ]
            found[int(entry["id"])] = fired_words(firings, [str(token) for token in entry.get("fires_on", ())])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SteersmanError(f"no entry of `steersman features`: {error!r}") from error
    return found
