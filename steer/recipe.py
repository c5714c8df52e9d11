"""`Recipe`: several edits at several layers in one YAML file, opened as one context.

    model: SmolLM2-135M-Instruct        # refused with another model; optional
    scope: generation                   # of every edit that says none
    edits:
      - vector: calm.safetensors        # a file of this folder
        scale: 2.0
      - features: {sae: sae/, ids: {1234: 8.0}, mode: floor, units: max_act}
        scope: all
      - edit: cap.safetensors           # what `SavedEdits.save` wrote
    target_kl: 0.3                      # all of it together; or `scale: 1.0`

Every edit has one kind (the word that opens it) and may have `scale`, `scope`, `include_bos`, `gate`, `schedule` and a
`target_kl` of its own. Edits are entered in the order of the file: a later one sees what an earlier one did. Paths are
read from the recipe's folder. A kind is a subclass of `Entry`, found by its `name`.

A recipe has a strength, `scale`, that multiplies every edit's, so `calibrate` and `evaluate_steering` take it as they
take a vector.
"""

import copy
import dataclasses
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from steersman.config import parse_yaml, typed
from steersman.errors import SteersmanError, near_names
from steersman.files import make_folder, write_text
from steersman.lm import LanguageModel
from steersman.lm.origin import same_model
from steersman.lm.unwinding import Opened, Unwinding
from steersman.reading import read_text, shown
from steersman.registry import Registry
from steersman.sae import SAE
from steersman.steer.calibrate import calibrate, refuse_unmet
from steersman.steer.dose import Dose, as_steerer
from steersman.steer.edits import Edit, EditSet, gated
from steersman.steer.edits.reads import Feature
from steersman.steer.presets.base import PRESETS, preset
from steersman.steer.scope import Scope
from steersman.steer.steerer import Steerer, Steering
from steersman.steer.vectors.vector import SteeringVector

log = logging.getLogger(__name__)

ENTRIES: Registry[type["Entry"]] = Registry("kind of edit")
"""Every kind of edit that a recipe may hold, by name."""

_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every edit of a recipe may say beside its kind."""

    scale: float = 1.0
    """Multiple of the edit."""
    scope: str | None = None
    """Tokens to steer; by default the recipe's."""
    include_bos: bool | None = None
    """Steer the beginning-of-sequence token too; by default as the recipe says."""
    gate: float | None = None
    """A number that multiplies what the edit changes. Other gates come with the edits of a file (`edit`)."""
    schedule: str | tuple[float, ...] | None = None
    """Strength by generated step: `start`, `diminishing:30`, or a list of which the last is held."""
    target_kl: float | None = None
    """In place of `scale`: what this edit alone may cost, KL(steered || base) in nats per token."""


class Place:
    """The folder from which a recipe's paths are read, and relative to which they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, text: str) -> str:
        """The path of what `text` names: a file or folder beside the recipe, or else as it stands (a hub id)."""
        beside = self.folder / text
        return str(beside) if beside.exists() else text

    def text(self, path: str) -> str:
        """What is written for a path: relative to the folder where it lies in it or near it."""
        if not Path(path).exists():
            return path
        return os.path.relpath(Path(path).resolve(), self.folder.resolve())


class Entry(ABC):
    """One edit of a recipe. A subclass says its `name`, the dataclass of its `Settings`, and how it is opened."""

    name: ClassVar[str] = ""
    """The word that opens it in the file."""
    Settings: ClassVar[type[Any]]
    """What may be said of it, as a dataclass."""
    short: ClassVar[str] = ""
    """The setting that a plain value in place of a mapping stands for."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Settings that name files or folders."""

    def __init_subclass__(cls) -> None:
        ENTRIES.register(cls, cls)

    def __init__(self, settings: Mapping[str, Any] | None = None, /, *, options: Options | None = None, **more: Any):
        """Settings as in the file; `options` beside them."""
        content = {**(settings or {}), **more}
        own = {f.name: content.pop(f.name) for f in dataclasses.fields(Options) if f.name in content}
        self.options = dataclasses.replace(options or Options(), **own)
        self.settings = self.read(content, self.name)
        self._made: tuple[LanguageModel, Mapping[str, Edit]] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    @classmethod
    def read(cls, content: Mapping[str, Any], where: str, place: "Place | None" = None) -> Any:
        """The settings from what the file says. Raises SteersmanError that names an unknown or a missing one."""
        settings = typed(content, cls.Settings, where)
        if place is not None:
            settings |= {name: place.path(settings[name]) for name in cls.paths if settings.get(name)}
        needed = [f.name for f in dataclasses.fields(cls.Settings) if _default(f) is dataclasses.MISSING]
        if missing := [name for name in needed if name not in settings]:
            raise SteersmanError(f"{where} needs {' and '.join(missing)}")
        return cls.Settings(**settings)

    def written(self, place: Place) -> Any:
        """The settings as the file holds them."""
        said = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.Settings)}
        kept = {
            f.name: place.text(said[f.name]) if f.name in self.paths and said[f.name] else _plain(said[f.name])
            for f in dataclasses.fields(self.Settings)
            if f.default is dataclasses.MISSING or said[f.name] != f.default
        }
        return self._short(kept)

    def _short(self, kept: dict[str, Any]) -> Any:
        return kept[self.short] if self.short and set(kept) == {self.short} else kept

    @abstractmethod
    def edits(self, lm: LanguageModel) -> Mapping[str, Edit]:
        """The edits by hook point, at scale 1. Raises SteersmanError for what does not fit the model."""

    def open(self, st: Steerer, scale: float, scope: str, include_bos: bool) -> Steering:
        """The context of the edit, `scale` times as strong. `scope` and `include_bos` hold where it says none."""
        if self._made is None or self._made[0] is not st.lm:
            self._made = st.lm, self.edits(st.lm)  # files are read once
        made, o = self._made[1], self.options
        if isinstance(made, EditSet):
            scope, include_bos = made.scope, made.include_bos
        gate = 1.0 if o.gate is None else o.gate
        edits = {hook: gated(edit, gate, o.schedule).scaled(scale * o.scale) for hook, edit in made.items()}
        bos = include_bos if o.include_bos is None else o.include_bos
        return Steering(st.lm, edits, Scope.of(o.scope or scope, include_bos=bos), None, st.for_all_threads)


class Recipe(Dose):
    """Several edits with their scopes, units and strengths, for one model."""

    def __init__(
        self,
        edits: Sequence[Entry],
        *,
        model: str = "",
        template: str = "",
        scope: str = "all",
        include_bos: bool = False,
        scale: float = 1.0,
        target_kl: float | None = None,
        notes: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """`model` and `template` (the digest of its chat template) are checked where they are given. Raises
        SteersmanError for a recipe without edits."""
        if not edits:
            raise SteersmanError("a recipe needs at least one edit")
        self.edits, self.model, self.template = list(edits), model, template
        self.scope, self.include_bos, self.scale, self.target_kl = scope, include_bos, float(scale), target_kl
        self.notes, self.metadata = notes, dict(metadata or {})
        self._met: tuple[Any, Recipe] | None = None

    def __repr__(self) -> str:
        return f"Recipe({', '.join(entry.name for entry in self.edits)}, scale {self.scale:g})"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """A recipe from its file. Raises SteersmanError, in one line, for what cannot be read and for an unknown key,
        naming near ones; no file that it names is opened yet."""
        path = Path(path)
        content = parse_yaml(read_text(path, limit=_BYTES), str(path))
        if not isinstance(content, dict):
            raise SteersmanError(f"{path} must hold a mapping with `edits`, a list")
        head = typed(content, _File, str(path))
        place = Place(path.parent)
        edits = [_entry(entry, place, f"{path}: edit {i}") for i, entry in enumerate(head.pop("edits", []), 1)]
        if not edits:
            raise SteersmanError(f"{path} holds no edit: give `edits`, a list")
        return cls(edits, **head)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe whole; paths relative to its folder."""
        path = Path(path)
        make_folder(path.parent)
        place = Place(path.parent)
        head = {f.name: getattr(self, f.name) for f in dataclasses.fields(_File) if f.name != "edits"}
        kept = {
            f.name: _plain(head[f.name])
            for f in dataclasses.fields(_File)
            if f.name != "edits" and head[f.name] != _default(f)
        }
        kept["edits"] = []
        for entry in self.edits:
            options = {
                f.name: _plain(getattr(entry.options, f.name))
                for f in dataclasses.fields(Options)
                if getattr(entry.options, f.name) != f.default
            }
            kept["edits"].append({entry.name: entry.written(place), **options})
        write_text(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))

    def of(self, lm: LanguageModel) -> "Recipe":
        """The recipe with the model's name and the digest of its chat template recorded."""
        return self._with(model=lm.name, template=template_of(lm))

    def check(self, lm: LanguageModel) -> None:
        """Raise SteersmanError for another model, or another chat template, than the recorded."""
        if not same_model(self.model, lm.name):
            raise SteersmanError(f"this recipe was made for {self.model!r}, not for {lm.name!r}")
        have = template_of(lm)
        if self.template and have and self.template != have:
            raise SteersmanError(
                f"this recipe was made with another chat template ({self.template}) than that of {lm.name} ({have})"
            )

    def apply(self, st: Steerer | LanguageModel, scale: float = 1.0) -> "RecipeSteering":
        """The one context in which a model is steered by all of it, `scale` times as strong.

        Where the recipe (or an edit) has a `target_kl`, its scale is found first, on texts that the model writes
        itself; once for each model. Raises SteersmanError for another model, and for what each kind of edit refuses.
        """
        steerer = as_steerer(st)
        self.check(steerer.lm)
        recipe = self.calibrated(steerer)
        return RecipeSteering(recipe.steerings(steerer, scale))

    def calibrated(self, st: Steerer | LanguageModel, texts: Sequence[str] | None = None) -> "Recipe":
        """The recipe with a scale in place of each `target_kl`, found on `texts` (or on the model's own)."""
        if self.target_kl is None and all(entry.options.target_kl is None for entry in self.edits):
            return self
        steerer = as_steerer(st)
        if texts is None and self._met is not None and self._met[0] is steerer.lm:
            return self._met[1]
        edits = []
        for entry in self.edits:
            if (target := entry.options.target_kl) is not None:
                alone = self._with([_with(entry, scale=1.0, target_kl=None)], target_kl=None, scale=1.0)
                found = calibrate(alone, steerer, texts=texts, target_kl=target)
                entry = _with(entry, scale=entry.options.scale * refuse_unmet(found).scale, target_kl=None)
            edits.append(entry)
        recipe = self._with(edits, target_kl=None)
        if self.target_kl is not None:
            found = calibrate(recipe, steerer, texts=texts, target_kl=self.target_kl)
            recipe = refuse_unmet(found)
            log.info("recipe: %s", found)
        if texts is None:
            self._met = steerer.lm, recipe
        return recipe

    def opened(self, st: Steerer, scale: Any = 1.0, **_options: Any) -> AbstractContextManager[Any]:
        """As a dose: the recipe's own scopes hold, whatever is asked for."""
        return self.apply(st, scale)

    def times(self, factor: float, **notes: Any) -> "Recipe":
        """The recipe `factor` times as strong, with `notes` about it."""
        return self._with(scale=self.scale * factor, metadata={**self.metadata, **notes})

    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"method": "recipe", "kinds": [entry.name for entry in self.edits], "scale": self.scale}

    def steerings(self, st: Steerer, scale: float = 1.0) -> list[Steering]:
        """The contexts of its edits, in order, not yet entered. Every `target_kl` must have been met before."""
        return [entry.open(st, scale * self.scale, self.scope, self.include_bos) for entry in self.edits]

    def _with(self, edits: Sequence[Entry] | None = None, **changes: Any) -> "Recipe":
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(_File) if f.name != "edits"}
        return Recipe(self.edits if edits is None else edits, **{**own, **changes})


class RecipeSteering(Opened):
    """All steerings of a recipe, entered in its order. `trace` counts the tokens that the first of them that met most
    steered."""

    def __init__(self, steerings: list[Steering]) -> None:
        super().__init__()
        self.steerings = steerings

    def __repr__(self) -> str:
        return f"RecipeSteering({', '.join(map(repr, self.steerings))})"

    def _open(self, stack: Unwinding) -> None:
        for steering in self.steerings:
            stack.enter_context(steering)

    @property
    def trace(self) -> Any:
        """The trace of the steering that met the most tokens."""
        return max((steering.trace for steering in self.steerings), key=lambda trace: trace.count)


@dataclass(frozen=True, kw_only=True)
class _File:
    """The keys of a recipe's file."""

    model: str = ""
    template: str = ""
    scope: str = "all"
    include_bos: bool = False
    scale: float = 1.0
    target_kl: float | None = None
    notes: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    edits: list[Any] = field(default_factory=list)


def _entry(content: Any, place: Place, where: str) -> Entry:
    """An edit from what the file says of it."""
    if not isinstance(content, dict):
        raise SteersmanError(f"{where} is {shown(content)}, it should be a mapping such as `vector: FILE`")
    options = [f.name for f in dataclasses.fields(Options)]
    kinds = [key for key in content if key in ENTRIES]
    for key in content:
        if key not in ENTRIES and key not in options:
            near = near_names(str(key)[:100], [*ENTRIES, *options], 3)
            raise SteersmanError(f"{where}: unknown key {shown(key)}; near it: {near}")
    if len(kinds) != 1:
        have = "none" if not kinds else ", ".join(kinds)
        raise SteersmanError(f"{where} needs one kind of edit ({', '.join(ENTRIES)}), it has {have}")
    kind = ENTRIES[kinds[0]]
    value = content[kinds[0]]
    beside = typed({key: content[key] for key in content if key != kinds[0]}, Options, where)
    if not isinstance(value, dict):
        if not kind.short:
            raise SteersmanError(f"{where}: {kind.name} is {shown(value)}, it should be a mapping")
        value = {kind.short: value}
    made = kind.__new__(kind)
    made.options, made._made = Options(**beside), None
    made.settings = kind.read(value, f"{where}, {kind.name}", place)
    return made


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _with(entry: Entry, **options: Any) -> Entry:
    other = copy.copy(entry)
    other.options = dataclasses.replace(entry.options, **options)
    return other


def _plain(value: Any) -> Any:
    """What YAML holds: tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def template_of(lm: LanguageModel) -> str:
    """The digest of a model's chat template; empty where it has none."""
    return lm.template_digest or ""


# The kinds


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
        given = {key: place.text(v) if isinstance(v, str) else _plain(v) for key, v in self.settings.given.items()}
        return self._short({"name": self.settings.name, **given})

    def edits(self, lm: LanguageModel) -> Mapping[str, Edit]:
        found = preset(self.settings.name).build(lm, **self.settings.given)
        if isinstance(found, SteeringVector):
            return Steerer(lm).vector(found).edits
        if isinstance(found, Mapping):
            return found
        made = preset(self.settings.name).makes
        raise SteersmanError(f"preset {self.settings.name!r} makes {made}: a recipe holds edits and vectors alone")
