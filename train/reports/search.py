"""Features by words: in their labels, in the tokens they fire on and write, in their contexts."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import read_json
from steersman.sae.feature_labels import FeatureLabels

_LARGEST = 1 << 30


@dataclass(frozen=True, kw_only=True)
class WordMatch:
    """A feature that has the words that were looked for."""

    feature: int
    """Feature id."""
    where: tuple[str, ...]
    """What has all of them: label, fires_on, promotes, contexts."""
    contexts: int
    """Contexts that have all of them."""
    label: str
    """Its label; empty where it has none."""
    fires_on: tuple[str, ...]
    """Tokens it fires on most, where that is known."""
    context: str
    """The first context that has them, the token that fires between «»; empty where none has."""


def search_features(
    words: str, features: Iterable[Any] = (), labels: FeatureLabels | None = None, n: int | None = None
) -> list[WordMatch]:
    """The features with all of `words` (any case, also as parts of words) in their label, in the tokens they fire on or
    promote, or in one of their contexts: labels first, then tokens, then the number of contexts.

    `features` as a `FeatureReport` has them or as `features.json` does. Raises SteersmanError for no words.

    >>> from steersman.sae import FeatureLabel
    >>> search_features("snow", labels=FeatureLabels({12: FeatureLabel(text="Snow and ice")}))[0].where
    ('label',)
    """
    wanted = words.casefold().split()
    if not wanted:
        raise SteersmanError("no words to look for")
    records = {int(record["id"]): record for record in map(_record, features)}
    labelled = {} if labels is None else {feature: label.text for feature, label in labels.items()}
    found = [
        match
        for feature in sorted({*records, *labelled})
        if (match := _match(feature, wanted, records.get(feature, {}), labelled.get(feature, ""))).where
    ]
    found.sort(key=lambda match: ("label" not in match.where, "fires_on" not in match.where, -match.contexts))
    return found[:n]


def read_feature_records(path: str | Path) -> list[Mapping[str, Any]]:
    """The features in a file that `steersman features` wrote. Raises SteersmanError where it holds none."""
    value = read_json(path, limit=_LARGEST)
    if not isinstance(value, list) or not all(map(_is_feature, value)):
        raise SteersmanError(f"{path}: not a list of features as `steersman features` writes it")
    return value


def _is_feature(record: Any) -> bool:
    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    return (
        isinstance(record, dict)
        and type(record.get("id")) is int
        and all(texts(record.get(name, [])) for name in ("fires_on", "promotes", "suppresses"))
        and isinstance(record.get("contexts", []), list)
        and all(
            isinstance(context, dict) and texts([context.get(part) for part in ("before", "token", "after")])
            for context in record.get("contexts", [])
        )
    )


def _record(feature: Any) -> Mapping[str, Any]:
    if isinstance(feature, Mapping):
        return feature
    if not is_dataclass(feature) or isinstance(feature, type):
        raise SteersmanError(f"features to search are those of a FeatureReport, not {type(feature).__name__}")
    return asdict(feature)


def _match(feature: int, wanted: list[str], record: Mapping[str, Any], label: str) -> WordMatch:
    def has(text: Any) -> bool:
        folded = str(text).casefold()
        return all(word in folded for word in wanted)

    contexts = [f"{c['before']}«{c['token']}»{c['after']}" for c in record.get("contexts", ())]
    hits = [text for text in contexts if has(text.replace("«", "").replace("»", ""))]
    parts = {
        "label": has(label),
        "fires_on": has(" ".join(record.get("fires_on", ()))),
        "promotes": has(" ".join(record.get("promotes", ()))),
        "contexts": bool(hits),
    }
    return WordMatch(
        feature=feature, where=tuple(name for name, there in parts.items() if there), contexts=len(hits), label=label,
        fires_on=tuple(record.get("fires_on", ())), context=hits[0] if hits else "",
    )  # fmt: skip
