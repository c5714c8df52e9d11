"""Several texts as one, mixed by weight: which text the next document comes from.

The next document is one of the text that is furthest behind its share, by the lengths of the documents given so far
(weighted fair queueing, SIGCOMM 1989, with documents for packets). So the shares are exact to a document at every
place, which random draws reach only on average; nothing is drawn, and the order follows from the texts and the weights
alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from steersman.errors import SteersmanError

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]
Measure = Callable[[Iterator[str]], Iterator[tuple[str, int]]]
"""Documents -> each with its length, in the unit in which shares are meant; a document may come with its tokens."""
_STRIDE = 256
"""Documents between two places that are remembered, so that reading can start near them."""


@dataclass(frozen=True)
class Mixture:
    """Texts that are read as one, each with the weight that is its share of the tokens, as far as they are enough.

    Wherever texts are given, so may a mixture be, or a mapping of names of texts to weights.

    >>> Mixture([("web", 0.7), ("code", 0.3)]).stopping_strategy
    'first_exhausted'
    """

    parts: Sequence[tuple[Any, float]]
    """(text, weight): whatever `open_text` takes, and a number above 0. Only the weights' ratios count."""
    stopping_strategy: StoppingStrategy = "first_exhausted"
    """Where the mixture ends, as `datasets.interleave_datasets` calls it: where the text whose turn it is has no
    further document (first_exhausted), or where each text has ended once (all_exhausted); till then those that end
    begin again."""

    def __post_init__(self) -> None:
        if self.stopping_strategy not in get_args(StoppingStrategy):
            known = " or ".join(get_args(StoppingStrategy))
            raise SteersmanError(f"stopping_strategy {self.stopping_strategy!r} is not {known}")
        if not self.parts:
            raise SteersmanError("a mixture of no texts: give at least one with its weight")
        for part in self.parts:
            if not isinstance(part, tuple | list) or len(part) != 2:
                raise SteersmanError(f"a mixture is of pairs (text, weight), not of {type(part).__name__}")
            check_weight(part[1], _shown(part[0]))

    @classmethod
    def of_weights(cls, weights: Mapping[Any, Any]) -> "Mixture":
        """From a mapping of texts' names to their weights."""
        return cls(list(weights.items()))


def check_weight(weight: Any, name: str) -> None:
    """Raise SteersmanError for a weight that is not a number above 0."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise SteersmanError(f"the weight of {name} is {type(weight).__name__}, not a number")
    if not (math.isfinite(weight) and weight > 0):
        raise SteersmanError(f"the weight of {name} is {weight:g}; it must be above 0 (leave out what has no share)")


def _shown(text: Any) -> str:
    return repr(text) if isinstance(text, str) and len(text) < 80 else f"a {type(text).__name__} of the mixture"


def named_texts(
    texts: str | Sequence[str] | None, stopping_strategy: StoppingStrategy = "first_exhausted"
) -> str | Mixture | None:
    """What settings name as text: nothing, one file, folder or dataset, or several, each as NAME=WEIGHT.

    A name may have `=` in it: what follows the last one is a weight if it is a number and no file has the whole name.

    >>> named_texts("web"), named_texts(["web=0.7", "code=0.3"]).parts
    ('web', [('web', 0.7), ('code', 0.3)])
    """
    given = [texts] if isinstance(texts, str) else list(texts or ())
    if not given:
        return None
    parts = [_with_weight(text) for text in given]
    if len(parts) == 1:
        name, weight = parts[0]
        if weight is not None:
            check_weight(weight, repr(name))
        return name
    for name, weight in parts:
        if weight is None:
            raise SteersmanError(
                f"text {name!r} has no weight: of several texts each is given as NAME=WEIGHT, such as {name}=0.5"
            )
    return Mixture([(name, weight) for name, weight in parts if weight is not None], stopping_strategy)


def _with_weight(text: str) -> tuple[str, float | None]:
    name, equals, tail = text.rpartition("=")
    if not equals or not name or _is_there(text):
        return text, None
    try:
        return name, float(tail)
    except ValueError:
        if _is_there(name):
            raise SteersmanError(f"text {text!r}: the weight of {name!r} is {tail!r}, which is no number") from None
        return text, None


def _is_there(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError):
        return False


class _Place(NamedTuple):
    """Where in its texts a mixture is, before one of its documents."""

    documents: tuple[int, ...]
    """Of each text, the number of its next document."""
    given: tuple[int, ...]
    """Of each text, the length of what it gave."""
    ended: tuple[bool, ...]
    """Of each text, whether it has ended, and begun again."""


@dataclass(frozen=True)
class MixedText:
    """A mixture that is open: see `steersman.text.TextSource`. Documents are numbered as the mixture gives them.

    Starting at a later document reads, and measures, from the last place before it that this process has passed; a new
    process begins with the first document.
    """

    texts: tuple[Any, ...]
    """The texts, each a `TextSource`."""
    weights: tuple[float, ...]
    """Their shares, which add up to 1."""
    stopping_strategy: StoppingStrategy
    measure: Measure
    _places: dict[int, _Place] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, mixture: Mixture, open_one: Callable[[Any], Any], measure: Measure | None) -> "MixedText":
        """The mixture with its texts opened by `open_one`. Raises SteersmanError for a text that is given twice."""
        texts = tuple(open_one(source) for source, _ in mixture.parts)
        seen: set[str] = set()
        for text in texts:
            if (identity := text.identity()) in seen:
                raise SteersmanError(f"{text.name} is in the mixture twice: give it once, with the sum of the weights")
            seen.add(identity)
        total = sum(weight for _, weight in mixture.parts)
        if not math.isfinite(total):
            raise SteersmanError("the weights of the mixture add up to infinity: only their ratios count, give less")
        weights = tuple(weight / total for _, weight in mixture.parts)
        return cls(texts, weights, mixture.stopping_strategy, measure or _in_characters)

    @property
    def name(self) -> str:
        """See `TextSource`."""
        return f"the mixture of {self._joined(lambda text: text.name)}"

    def identity(self) -> str:
        """See `TextSource`."""
        return f"mixture of {self._joined(lambda text: text.identity())}, {self.stopping_strategy}"

    def _joined(self, say: Callable[[Any], str]) -> str:
        return " and ".join(f"{weight:.6g} of ({say(text)})" for text, weight in zip(self.texts, self.weights))

    @property
    def remote(self) -> bool:
        """Whether one of the texts comes over the network."""
        return any(getattr(text, "remote", False) for text in self.texts)

    @property
    def endless(self) -> bool:
        """Whether it has no end."""
        enough = all if self.stopping_strategy == "first_exhausted" else any
        return enough(getattr(text, "endless", False) for text in self.texts)

    def n_characters(self) -> int | None:
        """See `TextSource`: as if all texts had as many characters a token."""
        most = self.stopping_strategy == "all_exhausted"
        lengths = []
        for text, weight in zip(self.texts, self.weights):
            n = text.n_characters()
            if n is None and (most or not getattr(text, "endless", False)):
                return None
            if n is not None:
                lengths.append(n / weight)
        return round((max if most else min)(lengths)) if lengths else None

    def documents(self, start: int = 0) -> Iterator[str]:
        """See `TextSource`."""
        n = len(self.texts)
        number = max((known for known in list(self._places) if known <= start), default=0)
        place = self._places.get(number) or _Place((0,) * n, (0,) * n, (False,) * n)
        at, given, ended = list(place.documents), list(place.given), list(place.ended)
        streams = [self._from(i, at[i]) for i in range(n)]
        while True:
            if number % _STRIDE == 0:
                self._places.setdefault(number, _Place(tuple(at), tuple(given), tuple(ended)))
            behind = min(range(n), key=lambda i: given[i] / self.weights[i])
            found = next(streams[behind], None)
            if found is None:
                ended[behind] = True
                if self.stopping_strategy == "first_exhausted" or all(ended):
                    return
                if not given[behind]:
                    raise SteersmanError(f"{self.texts[behind].name} has no text for its share of the mixture")
                at[behind], streams[behind] = 0, self._from(behind, 0)
                continue
            document, length = found
            at[behind] += 1
            given[behind] += length
            if number >= start:
                yield document
            number += 1

    def _from(self, i: int, document: int) -> Iterator[tuple[str, int]]:
        return self.measure(self.texts[i].documents(document))


def _in_characters(documents: Iterator[str]) -> Iterator[tuple[str, int]]:
    return ((document, len(document)) for document in documents)
