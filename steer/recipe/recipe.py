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
read from the recipe's folder. See `steersman.steer.recipe.kinds` for the kinds.

A recipe has a strength, `scale`, that multiplies every edit's, so `calibrate` and `evaluate_steering` take it as they
take a vector.
"""

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from steersman.config import parse_yaml, typed
from steersman.errors import SteersmanError
from steersman.files import make_folder, write_text
from steersman.lm import LanguageModel
from steersman.lm.origin import same_model
from steersman.lm.unwinding import Opened, Unwinding
from steersman.reading import read_text
from steersman.steer.calibrate import calibrate, refuse_unmet
from steersman.steer.dose import Dose, as_steerer
from steersman.steer.recipe.entry import Entry, Options, Place, default_of, entry_of, plain
from steersman.steer.steerer import Steerer
from steersman.steer.steering import Steering

log = logging.getLogger(__name__)

_BYTES = 1 << 20


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
        return cls.parse(read_text(path, limit=_BYTES), str(path), Place(path.parent))

    @classmethod
    def parse(cls, text: str, where: str, place: Place) -> Self:
        """A recipe from the text of its file, which errors call `where` and whose paths are read from `place`."""
        content = parse_yaml(text, where)
        if not isinstance(content, dict):
            raise SteersmanError(f"{where} must hold a mapping with `edits`, a list")
        head = typed(content, _File, where)
        edits = [entry_of(entry, place, f"{where}: edit {i}") for i, entry in enumerate(head.pop("edits", []), 1)]
        if not edits:
            raise SteersmanError(f"{where} holds no edit: give `edits`, a list")
        return cls(edits, **head)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe whole; paths relative to its folder."""
        path = Path(path)
        make_folder(path.parent)
        write_text(path, self.to_yaml(Place(path.parent)))

    def to_yaml(self, place: Place) -> str:
        """The text of its file; paths as `place` writes them."""
        head = {f.name: getattr(self, f.name) for f in dataclasses.fields(_File) if f.name != "edits"}
        kept = {
            f.name: plain(head[f.name])
            for f in dataclasses.fields(_File)
            if f.name != "edits" and head[f.name] != default_of(f)
        }
        kept["edits"] = []
        for entry in self.edits:
            options = {
                f.name: plain(getattr(entry.options, f.name))
                for f in dataclasses.fields(Options)
                if getattr(entry.options, f.name) != f.default
            }
            kept["edits"].append({entry.name: entry.written(place), **options})
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)

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


def _with(entry: Entry, **options: Any) -> Entry:
    other = copy.copy(entry)
    other.options = dataclasses.replace(entry.options, **options)
    return other


def template_of(lm: LanguageModel) -> str:
    """The digest of a model's chat template; empty where it has none."""
    return lm.template_digest or ""
