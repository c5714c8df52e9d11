"""`FeatureScores`: what is known of every feature of one SAE, by the name of the score, each with its null beside it.

Shape letters: L features.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from steersman.errors import SteersmanError, near_names
from steersman.files import make_folder
from steersman.lm.origin import Origin
from steersman.reading import parse_json
from steersman.sae import SAE, FeatureLabels
from steersman.steer.effects.measured import sae_identity
from steersman.tensor_files import check_format, load_tensors, save_tensors

FORMAT, VERSION = "steersman.feature_scores", 1
_ABOUT = ("model_name", "hook_name", "sae", "columns")
_PARTS = ("values", "null", "strengths")


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """One score of every feature."""

    values: Tensor
    """[L] fp32; NaN for a feature that the score does not know."""
    null: Tensor
    """[L] fp32: the `level` quantile of the score's size where there is nothing to find; NaN where none was made."""
    null_max: float
    """The same of the largest size among all features: what the best of L features must exceed to mean something."""
    unit: str
    """What the values are in."""
    n: int
    """Samples (texts, prompts, tokens) behind each value."""
    level: float
    """Level of the null's quantiles."""
    strengths: Tensor | None = None
    """[L] fp32: how strong the score says to steer by each feature, in raw activations; None where it says nothing."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Source, settings and figures of the measurement, as JSON values."""

    def __post_init__(self) -> None:
        for name in _PARTS:
            tensor = getattr(self, name)
            if tensor is not None:
                object.__setattr__(self, name, tensor.detach().cpu().float())


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A feature and what a score says of it."""

    feature: int
    """Feature id."""
    value: float
    """Its score."""
    null: float
    """The null's quantile for this feature."""
    above_null: bool
    """Whether its size exceeds the null of the best of all features (of this one, where that is not known)."""
    strength: float | None
    """The score's own strength, raw activations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureScores(Mapping[str, Column]):
    """The scores of one SAE's features, a mapping from the score's name to its `Column`.

    >>> table = FeatureScores.of({}, model_name="toy", hook_name="blocks.1.hook_resid_post", sae={"d_sae": 8})
    >>> len(table), table.d_sae
    (0, 8)
    """

    columns: Mapping[str, Column]
    """Score name -> column."""
    model_name: str
    """The model that the scores were measured on."""
    hook_name: str
    """The hook point of the SAE."""
    sae: Mapping[str, Any]
    """What the SAE is: `hash` of its weights, `d_sae`, `d_in` and what else `sae_identity` says."""

    @classmethod
    def of(
        cls, columns: Mapping[str, Column], *, model_name: str, hook_name: str, sae: SAE | Mapping[str, Any]
    ) -> "FeatureScores":
        """A table for an SAE at a hook point of a model."""
        known = sae_identity(sae) if isinstance(sae, SAE) else dict(sae)
        return cls(columns=dict(columns), model_name=model_name, hook_name=hook_name, sae=known)

    def __getitem__(self, name: str) -> Column:
        if name not in self.columns:
            near = near_names(name, list(self.columns), limit=3)
            raise SteersmanError(f"no score {name!r} in this table; it has {near or 'none'}")
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def d_sae(self) -> int:
        """L."""
        return int(self.sae["d_sae"])

    @property
    def origin(self) -> Origin:
        """Model, hook point and width."""
        return Origin(self.model_name, self.hook_name, self.sae.get("d_in"))

    def __repr__(self) -> str:
        return f"FeatureScores({', '.join(self.columns) or 'empty'}: {self.d_sae} features at {self.hook_name})"

    def check_sae(self, sae: SAE) -> None:
        """Raise SteersmanError unless `sae` is the one whose features these are."""
        if sae_identity(sae)["hash"] != self.sae.get("hash"):
            raise SteersmanError(f"these scores are of another SAE, at {self.hook_name}: score this one by itself")

    def merged(self, other: "FeatureScores") -> "FeatureScores":
        """Both tables' columns, those of `other` where both have one. Raises SteersmanError for another SAE's."""
        if self.sae.get("hash") != other.sae.get("hash") or self.hook_name != other.hook_name:
            raise SteersmanError(
                f"scores at {self.hook_name} and {other.hook_name} are not of one SAE: keep both tables"
            )
        return replace(self, columns={**self.columns, **other.columns})

    def top(self, name: str, n: int = 10, *, sign: str = "positive") -> list[Scored]:
        """The n features with the largest score: `sign` positive for the highest, negative for the lowest (below 0),
        both for the largest in size. Features that the score does not know, or scores 0, are never among them."""
        return _top(self[name], n, sign)

    def to_text(self, n: int = 10, *, sign: str = "positive", labels: FeatureLabels | None = None) -> str:
        """A table of the n best features of each score, with their labels; `*` marks what exceeds the null of the best
        of all features."""
        label = FeatureLabels().text if labels is None else labels.text
        lines = [f"{self.d_sae} features at {self.hook_name} of {self.model_name}"]
        for name, column in self.columns.items():
            bar = "no null" if math.isnan(column.null_max) else f"best of all by chance {column.null_max:.3g}"
            lines += ["", f"{name} ({column.unit}; n = {column.n}; {bar} at level {column.level:g})"]
            lines += [f"  {'feature':>8}  {'score':>9}  {'null':>9}  {'strength':>9}"]
            for found in self.top(name, n, sign=sign):
                strength = "" if found.strength is None else f"{found.strength:.4g}"
                mark = " *" if found.above_null else ""
                row = f"  {found.feature:>8}  {found.value:>9.4g}  {found.null:>9.3g}  {strength:>9}{mark:<2}"
                row += f"  {label(found.feature)}"
                lines.append(row.rstrip())
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the table as a safetensors file: tensors `NAME.values`, `NAME.null` and `NAME.strengths`, the rest as
        JSON in the header."""
        path = Path(path)
        make_folder(path.parent)
        tensors, columns = {}, {}
        for name, column in self.columns.items():
            for part in _PARTS:
                if (tensor := getattr(column, part)) is not None:
                    tensors[f"{name}.{part}"] = tensor
            columns[name] = {
                "unit": column.unit, "n": column.n, "level": column.level, "about": dict(column.about),
                "null_max": None if math.isnan(column.null_max) else column.null_max,
            }  # fmt: skip
        about = {**self.origin._asdict(), "sae": dict(self.sae), "columns": columns}
        save_tensors(path, tensors, {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "FeatureScores":
        """Read a table. Raises SteersmanError, naming the file, when it holds none or contradicts itself."""
        tensors, header = load_tensors(path)
        check_format(path, header, FORMAT, VERSION, "feature scores")
        about = parse_json(header.get("about", ""), path)
        if not isinstance(about, dict) or any(name not in about for name in _ABOUT):
            raise SteersmanError(f"{path}: what its header says about the scores is missing or wrong")
        try:
            columns = {name: _column(name, known, tensors) for name, known in about["columns"].items()}
            table = cls.of(
                columns, model_name=about["model_name"], hook_name=about["hook_name"], sae=dict(about["sae"])
            )
            whole = all(len(column.values) == len(column.null) == table.d_sae for column in columns.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SteersmanError(f"{path}: what its header says does not fit its tensors ({error!r})") from error
        if not whole:
            raise SteersmanError(f"{path}: its columns are not of one SAE's features")
        return table


def _column(name: str, known: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Column:
    largest = known["null_max"]
    return Column(
        values=tensors[f"{name}.values"], null=tensors[f"{name}.null"], strengths=tensors.get(f"{name}.strengths"),
        null_max=math.nan if largest is None else float(largest), unit=str(known["unit"]), n=int(known["n"]),
        level=float(known["level"]), about=dict(known["about"]),
    )  # fmt: skip


SIGNS = ("positive", "negative", "both")


def _top(column: Column, n: int, sign: str) -> list[Scored]:
    if sign not in SIGNS:
        raise SteersmanError(f"unknown sign {sign!r}: use one of {', '.join(SIGNS)}")
    values = column.values
    rank = {"positive": values, "negative": -values, "both": values.abs()}[sign].nan_to_num(nan=0.0, posinf=math.inf)
    order = rank.argsort(descending=True, stable=True)[: max(n, 0)]
    return [_scored(column, j) for j in order.tolist() if rank[j] > 0]


def _scored(column: Column, feature: int) -> Scored:
    value, null = float(column.values[feature]), float(column.null[feature])
    bar = null if math.isnan(column.null_max) else column.null_max
    return Scored(
        feature=feature, value=value, null=null, above_null=abs(value) > bar,
        strength=None if column.strengths is None else float(column.strengths[feature]),
    )  # fmt: skip


def only(tables: FeatureScores | Sequence[FeatureScores]) -> list[FeatureScores]:
    """The tables that were given, one or several."""
    return [tables] if isinstance(tables, FeatureScores) else list(tables)
