"""What a preset is: a published system as settings of a mechanism that is here.

A preset says where it comes from, what its authors set, what it needs, how surely that was checked, which mistakes of
the published code it does not repeat, and what it does not cover. It holds no arithmetic of its own.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steersman.errors import SteersmanError, near_names
from steersman.lm import LanguageModel
from steersman.registry import Registry
from steersman.sae import SAE
from steersman.steer.edits import Edit, EditSet
from steersman.steer.methods import read_examples
from steersman.steer.vectors.vector import SteeringVector

PRESETS: Registry["Preset"] = Registry("preset")
"""Every published system, by name."""

CODE = "authors' code read"
PAPER = "paper's text read"
NOTES = "from detailed notes on the paper, its text not read"
REIMPLEMENTED = "a re-implementation read, not the authors' code"


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something that a preset cannot be built without."""

    what: str
    """What it is."""
    how: str
    """How to make it."""


@dataclass(frozen=True)
class Decoder:
    """A way to decode: `decoder(prompts, max_new_tokens=...)`."""

    name: str
    """Of the preset."""
    run: Callable[..., Any]
    """(prompts, **settings) -> what the decoder returns."""

    def __call__(self, prompts: str | Sequence[str], **settings: Any) -> Any:
        return self.run(prompts, **settings)


class Preset:
    """A published system. A subclass says what it is, and `make`s it from what it needs."""

    name: ClassVar[str] = ""
    """Short name, such as `cast`."""
    title: ClassVar[str]
    """What it is called where it was published."""
    source: ClassVar[str]
    """Paper and code."""
    mechanism: ClassVar[str]
    """The mechanism here that it is a setting of."""
    certainty: ClassVar[str]
    """How surely its values and formula were checked."""
    values: ClassVar[Mapping[str, Any]] = {}
    """The authors' values, for their models."""
    needs: ClassVar[Mapping[str, Need]] = {}
    """What `build` must be given, by argument."""
    makes: ClassVar[str] = "edits"
    """What `build` returns."""
    traps: ClassVar[tuple[str, ...]] = ()
    """Mistakes of the published code, or of reading it, that are not repeated here."""
    not_covered: ClassVar[str] = ""
    """What of the system is not here."""
    available: ClassVar[bool] = True
    """Whether it can be built at all."""
    make: Callable[..., Any]
    """(lm, **given) -> what steers. A preset that can be built defines it."""

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("name"):
            PRESETS.register(cls, cls())

    def __repr__(self) -> str:
        return f"preset({self.name!r}): {self.title} ({self.source})"

    def build(self, lm: LanguageModel, **given: Any) -> Any:
        """What steers as the system does: see `makes`. `given` are what it needs, and settings over the authors'.

        Raises SteersmanError, in one line, for a system that is not covered, for what is missing and how to make it,
        and for a setting that it does not have.
        """
        if not self.available:
            raise SteersmanError(f"preset {self.name!r} cannot be built: {self.not_covered}")
        missing = [name for name in self.needs if given.get(name) is None]
        if missing:
            told = "; ".join(f"{name}, {self.needs[name].what} ({self.needs[name].how})" for name in missing)
            raise SteersmanError(f"preset {self.name!r} needs {told}")
        known = self.arguments()
        kinds = {parameter.kind for parameter in inspect.signature(self.make).parameters.values()}
        for name in given:
            if name not in known and inspect.Parameter.VAR_KEYWORD not in kinds:
                near = near_names(name, known, 3)
                raise SteersmanError(f"preset {self.name!r} has no setting {name!r}; near it: {near}")
        return self.make(lm, **given)

    def arguments(self) -> list[str]:
        """The arguments of `build`."""
        return [name for name in inspect.signature(self.make).parameters if name != "lm"]

    def settings(self) -> dict[str, Any]:
        """Settings of `build` beside what it needs, with their defaults: the authors' values where those are for any
        model."""
        parameters = inspect.signature(self.make).parameters
        return {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty and name != "lm"
        }

    def record(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "mechanism": self.mechanism,
            "certainty": self.certainty,
            "available": self.available,
            "makes": self.makes if self.available else None,
            "needs": {name: {"what": need.what, "how": need.how} for name, need in self.needs.items()},
            "settings": {name: _plain(value) for name, value in self.settings().items()} if self.available else {},
            "values": {name: _plain(value) for name, value in self.values.items()},
            "traps": list(self.traps),
            "not_covered": self.not_covered,
        }


def preset(name: str) -> Preset:
    """The preset of a published system: `preset("cast").build(lm, condition=..., vector=...)`.

    Raises SteersmanError for an unknown name, naming the nearest.
    """
    return PRESETS[name]


def at(lm: LanguageModel, fraction: float, kind: str = "hook_resid_post") -> str:
    """The hook point at a fraction of the model's depth: what a layer of the authors' model is in another one."""
    return f"blocks.{min(lm.n_layers - 1, round(fraction * (lm.n_layers - 1)))}.{kind}"


def everywhere(lm: LanguageModel, kind: str) -> list[str]:
    """A hook point of every layer."""
    return [f"blocks.{layer}.{kind}" for layer in range(lm.n_layers)]


def kept(
    lm: LanguageModel,
    edits: Mapping[str, Edit],
    made_by: Preset,
    *,
    scope: str = "all",
    include_bos: bool = False,
    **notes: Any,
) -> EditSet:
    """Edits with their scope and where they come from."""
    return EditSet(
        edits=dict(edits), scope=scope, include_bos=include_bos, model_name=lm.name, method=made_by.name,
        metadata={"source": made_by.source, **notes},
    )  # fmt: skip


def vector_of(given: Any) -> SteeringVector:
    """A vector, or what the file of one holds."""
    return given if isinstance(given, SteeringVector) else SteeringVector.load(given)


def saes_of(given: Any) -> list[SAE]:
    """One SAE or several, or their folders."""
    entries = [given] if isinstance(given, SAE | str) else list(given)
    return [one if isinstance(one, SAE) else SAE.load(one) for one in entries]


def sides_of(given: Any) -> tuple[list[Any], list[Any]]:
    """(positive, negative) examples: as they are given, or what a JSONL file holds."""
    if isinstance(given, str):
        found = read_examples(given)
        return list(found.positive), list(found.negative)
    positive, negative = given
    return list(positive), list(negative)


VECTOR = Need(
    what="a steering vector",
    how="SteeringVector.contrast(lm, positive, negative, hook=...), or `steersman vector make`",
)
PAIRS = Need(
    what="(positive, negative) examples", how="two lists of texts or of (prompt, answer), or a JSONL file of pairs"
)

SAE_NEED = Need(what="an SAE of the model", how="SAE.load(...), or train_sae(store, ...)")
SAES_NEED = Need(what="SAEs at several hook points", how="a list of SAE.load(...)")
TEXTS_NEED = Need(what="(positive, negative) texts", how="two lists, or a JSONL file of pairs or of text and label")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
