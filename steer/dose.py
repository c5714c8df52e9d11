"""What can be given in doses: a vector, edits at hook points, or any function from a scale to a context manager.

Calibration and evaluation ask nothing else of a way of steering than that it has a strength.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.edits import Edit, EditSet, PerRow
from steersman.steer.edits.file import FORMAT as EDITS_FORMAT
from steersman.steer.scope import Scope, ScopeLike
from steersman.steer.steerer import Steerer
from steersman.steer.steering import Steering
from steersman.steer.vectors.vector import SteeringVector
from steersman.tensor_files import load_tensors


class Dose(ABC):
    """A way of steering that has a strength of its own, such as a recipe."""

    @abstractmethod
    def opened(self, st: Steerer, scale: PerRow = 1.0, **options: Any) -> AbstractContextManager[Any]:
        """The context in which `scale` times it steers; `options` (scope, ...) where it says none itself."""

    @abstractmethod
    def times(self, factor: float, **notes: Any) -> Self:
        """`factor` times it, with `notes` about it where it keeps any."""

    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"method": type(self).__name__}


Dosed = SteeringVector | Mapping[str, Edit] | Dose | Callable[[Any], AbstractContextManager[Any]]
"""A vector, {hook point: edit}, a `Dose`, or a function that opens the steering of a given scale."""

D = TypeVar("D", bound=Dosed)


def as_steerer(st: Steerer | LanguageModel) -> Steerer:
    """A steerer for what may be a model."""
    return st if isinstance(st, Steerer) else Steerer(st)


def load_steering(path: str | PathLike[str]) -> SteeringVector | EditSet:
    """The vector (safetensors or GGUF) or the edits in a file. Raises SteersmanError that names it."""
    path = Path(path)
    if path.suffix.lower() != ".gguf" and path.is_file() and load_tensors(path)[1].get("format") == EDITS_FORMAT:
        return EditSet.load(path)
    return SteeringVector.load(path)


def steered(
    what: Dosed, st: Steerer | LanguageModel, *, scale: PerRow = 1.0, scope: ScopeLike | None = None, **options: Any
) -> AbstractContextManager[Any]:
    """The context in which a model is steered by `scale` times `what`; `options` as for `Steerer.vector`.

    Without a `scope` it is the one that an `EditSet` is meant for, else every token. A function opens what it will:
    `scope` and `options` are for vectors and edits.
    """
    if isinstance(what, EditSet):
        scope, options = what.scope if scope is None else scope, {"include_bos": what.include_bos, **options}
    if isinstance(what, Dose):
        return what.opened(as_steerer(st), scale, scope=scope, **options)
    scope = "all" if scope is None else scope
    if isinstance(what, SteeringVector):
        return as_steerer(st).vector(what, scale=scale, scope=scope, **options)
    if isinstance(what, Mapping) and not all(isinstance(edit, Edit) for edit in what.values()):
        raise SteersmanError(
            f"a mapping steers by {{hook point: edit}}, and this {type(what).__name__} holds no edits: of features "
            "give .edits(saes)"
        )
    if isinstance(what, Mapping):
        edits = {hook: edit.scaled(scale) for hook, edit in what.items()}
        if isinstance(what, EditSet):
            what.check_fits(as_steerer(st).lm)
        return Steering(as_steerer(st).lm, edits, Scope.of(scope, **options))
    return what(scale)


def scaled(what: D, factor: float, **notes: Any) -> D:
    """`factor` times `what`: at scale 1 it does what `what` does at scale `factor`. A vector or
    an `EditSet` keeps `notes` about it."""
    if isinstance(what, SteeringVector):
        part = what * factor
        return replace(part, metadata={**what.metadata, **notes})  # pyright: ignore[reportReturnType]
    if isinstance(what, Dose):
        return what.times(factor, **notes)  # pyright: ignore[reportReturnType]
    if isinstance(what, EditSet):
        about = {**what.metadata, **notes}
        part = what.with_edits({hook: edit.scaled(factor) for hook, edit in what.items()})
        return replace(part, metadata=about)  # pyright: ignore[reportReturnType]
    if isinstance(what, Mapping):
        return {hook: edit.scaled(factor) for hook, edit in what.items()}  # pyright: ignore[reportReturnType]
    return lambda scale: what(factor * scale)  # pyright: ignore[reportReturnType]
