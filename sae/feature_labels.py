"""What features stand for, in words: `labels.jsonl` beside an SAE, one feature a line.

{"d_sae": 4096, "d_in": 576, "hook_name": "blocks.12.hook_resid_post", "model_name": "smollm2"}
{"feature": 12, "label": "weather words", "source": "contexts+output", "scores": {"detection": 0.91}}

The first line says of which SAE; it may be missing, as in a file that somebody wrote by hand.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from steersman.errors import SteersmanError
from steersman.files import write_text
from steersman.reading import parse_json, read_text, shown
from steersman.sae.config import SAEConfig

__all__ = ["LABELS", "FeatureLabel", "FeatureLabels", "named_feature"]

LABELS = "labels.jsonl"
"""The file beside an SAE."""
MAX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class FeatureLabel:
    """The label of one feature."""

    text: str
    """A few words or a sentence."""
    source: str = ""
    """Where it comes from: a method, a model, a person."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """How well it holds, by name of the measure (detection, fuzzing, ...)."""


ABOUT = {"d_sae": int, "d_in": int, "hook_name": str, "model_name": str}
"""What the first line may say of the SAE."""


class FeatureLabels(Mapping[int, FeatureLabel]):
    """Labels of some features of one SAE, by feature id. `about` is what is known of that SAE, by the names of `ABOUT`.

    >>> labels = FeatureLabels({12: FeatureLabel(text="weather words")})
    >>> labels.text(12), labels.text(13), labels.search("weather")
    ('weather words', '', [12])
    """

    def __init__(
        self,
        labels: Mapping[int, FeatureLabel] | Iterable[tuple[int, FeatureLabel]] = (),
        about: Mapping[str, Any] | None = None,
    ):
        self._labels = dict(sorted(dict(labels).items()))
        own = labels.about if isinstance(labels, FeatureLabels) else {}
        self.about: dict[str, Any] = dict(own if about is None else about)

    def __getitem__(self, feature: int) -> FeatureLabel:
        return self._labels[feature]

    def __iter__(self) -> Iterator[int]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __repr__(self) -> str:
        return f"FeatureLabels({len(self)} features)"

    def text(self, feature: int) -> str:
        """The label of a feature, empty where it has none."""
        found = self._labels.get(int(feature))
        return "" if found is None else found.text

    def search(self, words: str) -> list[int]:
        """The features whose label holds each of `words` (any case), by id."""
        wanted = words.casefold().split()
        folded = ((feature, label.text.casefold()) for feature, label in self.items())
        return [feature for feature, text in folded if all(word in text for word in wanted)]

    def merged(self, other: Mapping[int, FeatureLabel]) -> "FeatureLabels":
        """These labels, and those of `other` over them; about the same SAE."""
        return FeatureLabels({**self._labels, **other}, self.about)

    def of(self, cfg: SAEConfig) -> "FeatureLabels":
        """The same labels, which say that they are those of an SAE of the configuration `cfg`."""
        known = {name: getattr(cfg, name) for name in ABOUT}
        return FeatureLabels(self, {name: value for name, value in known.items() if value != ""})

    def check(self, cfg: SAEConfig, where: str = "these labels") -> None:
        """Raise SteersmanError, naming `where` they stand, for labels of another SAE than one of the configuration
        `cfg`: of another size, hook point or model, or of a feature that it lacks."""
        for name, value in self.about.items():
            own = getattr(cfg, name)
            a, b = (str(one).rstrip("/").rpartition("/")[2].casefold() for one in (value, own))
            if own != "" and a != b:
                raise SteersmanError(f"{where}: labels of another SAE: of {name} {value}, and this one has {own}")
        largest = max(self, default=-1)
        if largest >= cfg.d_sae:
            raise SteersmanError(
                f"{where} has a label of feature {largest}, and the SAE has features 0 to {cfg.d_sae - 1}"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        records = [self.about] if self.about else []
        records += [_record(feature, label) for feature, label in self.items()]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_text(path, "".join(f"{line}\n" for line in lines))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "FeatureLabels":
        """Read the file.

        Raises:
            SteersmanError: the file cannot be read, or a line of it is no label; the message has its number.
        """
        labels: dict[int, FeatureLabel] = {}
        about: dict[str, Any] = {}
        for number, line in enumerate(read_text(path, limit=MAX_BYTES).split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                record = parse_json(line, where)
                if number == 1 and isinstance(record, dict) and "d_sae" in record:
                    about = _about(record, where)
                    continue
                feature, label = _parsed(record, where)
                if feature in labels:
                    raise SteersmanError(f"{where}: a second label of feature {feature}")
                labels[feature] = label
        return cls(labels, about)


def _about(record: dict[str, Any], where: str) -> dict[str, Any]:
    for name, value in record.items():
        if name not in ABOUT or not isinstance(value, ABOUT[name]) or isinstance(value, bool):
            raise SteersmanError(f"{where}: {name} is {shown(value)}; the first line names {', '.join(ABOUT)}")
    return record


def named_feature(feature: int, label: str) -> str:
    """A feature as a line calls it.

    >>> named_feature(12, "weather words"), named_feature(13, "")
    ('feature 12 (weather words)', 'feature 13')
    """
    return f"feature {feature} ({label})" if label else f"feature {feature}"


def _record(feature: int, label: FeatureLabel) -> dict[str, Any]:
    record: dict[str, Any] = {"feature": feature, "label": label.text}
    if label.source:
        record["source"] = label.source
    return record | ({"scores": dict(label.scores)} if label.scores else {})


def _parsed(record: Any, where: str) -> tuple[int, FeatureLabel]:
    if not isinstance(record, dict):
        raise SteersmanError(f"{where}: not a JSON object with feature and label")
    feature, text, source = record.get("feature"), record.get("label"), record.get("source", "")
    if not isinstance(feature, int) or isinstance(feature, bool) or feature < 0:
        raise SteersmanError(f"{where}: feature is {shown(feature)}, not a feature id")
    if not isinstance(text, str) or not isinstance(source, str):
        raise SteersmanError(f"{where}: label and source are text")
    scores = record.get("scores", {})
    if not isinstance(scores, dict) or not all(_is_score(value) for value in scores.values()):
        raise SteersmanError(f"{where}: scores is {shown(scores)}, not names with numbers")
    return feature, FeatureLabel(text=text, source=source, scores={k: float(v) for k, v in scores.items()})


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
