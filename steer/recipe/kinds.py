"""The kinds of entry that a recipe may hold, each with its settings and the edits that it makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer.edits import Edit, EditSet
from steersman.steer.edits.reads import Feature
from steersman.steer.presets.base import PRESETS, preset
from steersman.steer.recipe.entry import Entry, Place, plain
from steersman.steer.steerer import Steerer
from steersman.steer.vectors.vector import SteeringVector


@dataclass(frozen=True, kw_only=True)
class _Vector:
    file: str
    hook: str | None = None


class VectorEntry(Entry):
    """`vector: FILE`: a steering vector, added."""

    name = "vector"
    Settings = _Vector
    short = "file"
    paths = ("file",)

    def edits(self, lm: LanguageModel) -> Mapping[str, Edit]:
        v = SteeringVector.load(self.settings.file)
        return Steerer(lm).vector(v, hook=self.settings.hook).edits


@dataclass(frozen=True, kw_only=True)
class _Features:
    sae: str
    ids: dict[int, float]
    mode: str = "add"
    units: str = "raw"
    hook: str | None = None


class FeaturesEntry(Entry):
    """`features: {sae: PATH, ids: {1234: 8.0}, mode: add, units: raw}`: features of an SAE, edited.

    The scale multiplies the change: in mode `scale` and `floor` too, it lies between the state and the edited one.
    """

    name = "features"
    Settings = _Features
    paths = ("sae",)

    def edits(self, lm: LanguageModel) -> Mapping[str, Edit]:
        s = self.settings
        sae = SAE.load(s.sae, lm.device)
        return Steerer(lm).features(sae, s.ids, mode=s.mode, units=s.units, hook=s.hook).edits


@dataclass(frozen=True, kw_only=True)
class _EditFile:
    file: str


class FileEntry(Entry):
    """`edit: FILE`: edits that were saved with their gates. Their own scope holds where the recipe's edit says none."""

    name = "edit"
    Settings = _EditFile
    short = "file"
    paths = ("file",)

    def edits(self, lm: LanguageModel) -> Mapping[str, Edit]:
        found = EditSet.load(self.settings.file)
        found.check_fits(lm)
        return found


@dataclass(frozen=True, kw_only=True)
class _Direction:
    read: str | None = None
    write: str | None = None
    sae: str | None = None
    feature: int | None = None
    hook: str | None = None
    rule: str = "add"
    value: Any = 1.0
    threshold: Any = 0.0
    keep_norm: Any = False


class DirectionEntry(Entry):
    """`direction: {read: FILE, rule: cap, value: 3.0}`: read along a vector (or `sae` and `feature`), write by a rule.

    `value` and `threshold` are a number, or {hook point: number}; `write` is the file of another vector.
    """

    name = "direction"
    Settings = _Direction
    paths = ("read", "write", "sae")

    def edits(self, lm: LanguageModel) -> Mapping[str, Edit]:
        s = self.settings
        if (s.read is None) == (s.sae is None) or (s.sae is None) != (s.feature is None):
            raise SteersmanError("direction needs read, the file of a vector, or sae and feature")
        read: Any = SteeringVector.load(s.read) if s.read else Feature(SAE.load(s.sae, lm.device), s.feature)
        write = SteeringVector.load(s.write) if s.write else None
        return (
            Steerer(lm)
            .direction(
                s.hook, read=read, write=write, rule=s.rule, value=s.value, threshold=s.threshold, keep_norm=s.keep_norm
            )
            .edits
        )


@dataclass(frozen=True, kw_only=True)
class _Preset:
    name: str
    given: dict[str, Any] = field(default_factory=dict)


class PresetEntry(Entry):
    """`preset: {name: icv, examples: pairs.jsonl}`: a published system, with what it needs; files by their names."""

    name = "preset"
    Settings = _Preset
    short = "name"

    @classmethod
    def read(cls, content: Mapping[str, Any], where: str, place: Place | None = None) -> _Preset:
        if not isinstance(content.get("name"), str):
            raise SteersmanError(f"{where} needs name, one of {', '.join(PRESETS)}")
        preset(content["name"])  # refuses an unknown one
        rest = {str(key): value for key, value in content.items() if key != "name"}
        if place is not None:
            rest = {key: place.path(value) if isinstance(value, str) else value for key, value in rest.items()}
        return _Preset(name=content["name"], given=rest)

    def written(self, place: Place) -> Any:
        given = {key: place.text(v) if isinstance(v, str) else plain(v) for key, v in self.settings.given.items()}
        return self._short({"name": self.settings.name, **given})

    def edits(self, lm: LanguageModel) -> Mapping[str, Edit]:
        found = preset(self.settings.name).build(lm, **self.settings.given)
        if isinstance(found, SteeringVector):
            return Steerer(lm).vector(found).edits
        if isinstance(found, Mapping):
            return found
        made = preset(self.settings.name).makes
        raise SteersmanError(f"preset {self.settings.name!r} makes {made}: a recipe holds edits and vectors alone")
