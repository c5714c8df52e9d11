"""An entry of a recipe: what it may say, how it is read from the file and written back, and how it is opened.

A kind of entry is a subclass of `Entry`, found by its `name`: see `steersman.steer.recipe.kinds` for those there are.
"""

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from steersman.config import typed
from steersman.errors import SteersmanError, near_names
from steersman.lm import LanguageModel
from steersman.reading import shown
from steersman.registry import Registry
from steersman.steer.edits import Edit, EditSet, gated
from steersman.steer.scope import Scope
from steersman.steer.steerer import Steerer
from steersman.steer.steering import Steering

ENTRIES: Registry[type["Entry"]] = Registry("kind of edit")
"""Every kind of edit that a recipe may hold, by name."""


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
        needed = [f.name for f in dataclasses.fields(cls.Settings) if default_of(f) is dataclasses.MISSING]
        if missing := [name for name in needed if name not in settings]:
            raise SteersmanError(f"{where} needs {' and '.join(missing)}")
        return cls.Settings(**settings)

    def written(self, place: Place) -> Any:
        """The settings as the file holds them."""
        said = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.Settings)}
        kept = {
            f.name: place.text(said[f.name]) if f.name in self.paths and said[f.name] else plain(said[f.name])
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


def entry_of(content: Any, place: Place, where: str) -> Entry:
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


def default_of(f: "dataclasses.Field[Any]") -> Any:
    """What a setting is where it is left out; `MISSING` where it must be said."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def plain(value: Any) -> Any:
    """What YAML holds: tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value
