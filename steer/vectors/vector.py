"""`SteeringVector`: a direction in the residual stream, at one hook point or several, and where it came from.

A vector at several hook points is one element of the direct sum of their residual streams: it is added, scaled and
compared as a whole, and its norm is that of all parts together. A part is [D], the same at every token, or a table
[P, D]: row p is added at absolute position p only (position 0 is the beginning-of-sequence token, where there is one)
or, where the vector says `per="step"`, at generated step p only (step 0 is the last token of the prompt).

Shape letters: D width, P positions or steps.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steersman.conversations import Document
from steersman.errors import SteersmanError, near_names
from steersman.files import make_folder
from steersman.html import card
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.lm.origin import canonical_hook, same_model
from steersman.reading import check_regular, one_error
from steersman.sae import SAE
from steersman.steer.vectors import file as vector_file
from steersman.steer.vectors.gguf import read_gguf, write_gguf

if TYPE_CHECKING:
    from steersman.steer.methods.examples import ExamplesLike


@runtime_checkable
class VectorLike(Protocol):
    """A direction that says where it belongs (and may have a `model_name`): accepted where a `SteeringVector` is."""

    @property
    def hook_name(self) -> str:
        """Its hook point."""
        ...

    @property
    def vector(self) -> Tensor:
        """[D]."""
        ...


class Steers(Protocol):
    """What a `Steerer` is to a vector."""

    lm: LanguageModel
    """The model that it steers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringVector:
    """What is added to the residual stream, with its provenance. `SteeringVector.of` makes one from a tensor.

    The directions are kept as they were made, in the units of the residual stream: `scale` when steering multiplies
    them. Raises SteersmanError when a direction is not finite or has no width.

    >>> v = SteeringVector.of(torch.tensor([3.0, 4.0]), hook_name="blocks.2.hook_resid_post")
    >>> v.norm(), (2 * v).vector.tolist(), round(v.cosine(-v), 6)
    (5.0, [6.0, 8.0], -1.0)
    """

    directions: dict[str, Tensor]
    """Hook point -> direction, fp32 on the CPU: [D], or [P, D] for one that is added position by position, or step by
    step (`per`)."""
    model_name: str = ""
    """The model it belongs to; empty when unknown."""
    method: str = ""
    """How it was made, such as `diffmean`; empty when unknown."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Provenance: whatever JSON can hold."""
    per: str = "position"
    """What row p of a part [P, D] is for: the absolute `position` p, or the generated `step` p."""

    def __post_init__(self) -> None:
        if self.per not in ("position", "step"):
            raise SteersmanError(f"the rows of a vector are per position or per step, got {self.per!r}")
        if not self.directions:
            raise SteersmanError("a steering vector needs at least one hook point")
        parts = {str(hook): _direction(hook, direction) for hook, direction in self.directions.items()}
        object.__setattr__(self, "directions", parts)
        try:
            object.__setattr__(self, "metadata", json.loads(json.dumps(dict(self.metadata))))
        except (TypeError, ValueError, RecursionError) as error:
            raise SteersmanError(f"the metadata of a steering vector must be what JSON can hold: {error}") from None

    @classmethod
    def of(
        cls,
        direction: Any,
        *,
        hook_name: str,
        model_name: str = "",
        method: str = "",
        metadata: Mapping[str, Any] | None = None,
        per: str = "position",
    ) -> "SteeringVector":
        """A vector at one hook point from a tensor (or list) [D], or [P, D] for one added position by position, or step
        by step (`per="step"`)."""
        if not hook_name:
            raise SteersmanError(
                "name the hook point of the vector with hook_name=, such as 'blocks.2.hook_resid_post'"
            )
        parts = {hook_name: torch.as_tensor(direction)}
        return cls(directions=parts, model_name=model_name, method=method, metadata=dict(metadata or {}), per=per)

    @classmethod
    def of_feature(cls, sae: SAE, feature: int, *, hook_name: str = "") -> "SteeringVector":
        """A feature's decoder row, as it is: the vector that `Steerer.features` adds in mode `add` at strength 1."""
        sae.check_feature(feature)
        sae.cfg.check_one_hook("the vector of a feature")
        hook = hook_name or sae.cfg.hook_name
        if not hook:
            raise SteersmanError("this SAE records no hook point: name the one it was trained at with hook_name=")
        return cls.of(
            sae.W_dec[feature].detach(),
            hook_name=hook,
            model_name=sae.cfg.model_name,
            method="feature",
            metadata={"feature": int(feature), "d_sae": sae.cfg.d_sae},
        )

    def random_like(self, seed: int = 0) -> "SteeringVector":
        """A random direction of the same shape and, at each hook point, the same norm: the null to compare with."""
        generator = torch.Generator().manual_seed(seed)
        parts = {}
        for hook, direction in self.directions.items():
            noise = torch.randn(direction.shape, generator=generator)
            parts[hook] = noise * (direction.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        metadata = {"seed": seed, "norm_of": self.method}
        return replace(self, directions=parts, method="random", metadata=metadata)

    # What it is

    @property
    def hook_names(self) -> list[str]:
        """Its hook points."""
        return list(self.directions)

    @property
    def hook_name(self) -> str:
        """Its hook point. Raises SteersmanError when there are several."""
        if len(self.directions) > 1:
            raise SteersmanError(
                f"this vector has {len(self.directions)} hook points ({', '.join(self.directions)}): use .directions, "
                "or take one with .at(hook)"
            )
        return next(iter(self.directions))

    @property
    def vector(self) -> Tensor:
        """Its direction [D]. Raises SteersmanError when there are several hook points or one vector per position."""
        direction = self.directions[self.hook_name]
        if direction.ndim != 1:
            raise SteersmanError(
                f"this vector has one direction for each of {len(direction)} {self.per}s: use .directions, "
                "or .mean_over_positions()"
            )
        return direction

    @property
    def positions(self) -> int | None:
        """P when it is added position by position or step by step (the largest of its hook points), None otherwise."""
        lengths = [len(d) for d in self.directions.values() if d.ndim == 2]
        return max(lengths) if lengths else None

    def at(self, hook: str) -> "SteeringVector":
        """The part at one of its hook points, as a vector of its own."""
        if hook not in self.directions:
            near = near_names(hook, self.hook_names)
            raise SteersmanError(f"this vector has nothing at {hook!r}; its hook points are {near}")
        return self._with({hook: self.directions[hook]})

    def layers(self, start: int, stop: int) -> "SteeringVector":
        """The parts in blocks `start` to `stop - 1`, as `range` counts, as a vector of its own: what a vector that was
        trained on some layers needs where its file holds a direction for each (repeng's do).

        Raises SteersmanError where no part lies there.
        """
        found = {hook: block_of(hook) for hook in self.directions}
        kept = {
            hook: self.directions[hook] for hook, block in found.items() if block is not None and start <= block < stop
        }
        if not kept:
            have = sorted(block for block in found.values() if block is not None)
            raise SteersmanError(
                f"this vector has nothing in blocks {start} to {stop - 1}; it has "
                + (f"blocks {', '.join(map(str, have))}" if have else f"only {', '.join(self.hook_names)}")
            )
        return self._with(kept, layers=[start, stop])

    def mean_over_positions(self) -> "SteeringVector":
        """The mean over positions (or steps) where it has one direction for each, without those that are all zero."""

        def mean(direction: Tensor) -> Tensor:
            return direction[direction.abs().sum(1) > 0].mean(0) if direction.ndim == 2 else direction

        if self.positions is None:
            return self
        self.check_not_zero("its mean over positions")
        return self._with({hook: mean(d) for hook, d in self.directions.items()}, mean_over_positions=self.positions)

    def norm(self) -> float:
        """The Euclidean norm of all its numbers together."""
        return math.sqrt(self.dot(self))

    def check_not_zero(self, what: str = "this") -> None:
        """Raise SteersmanError when every number is 0, so that it has no direction."""
        if self.norm() == 0:
            name = f" ({self.method})" if self.method else ""
            raise SteersmanError(f"this steering vector{name} is zero, it has no direction: {what} is not defined")

    def __repr__(self) -> str:
        parts = ", ".join(f"{hook} {list(direction.shape)}" for hook, direction in self.directions.items())
        known = f"{self.method or 'vector'} for {self.model_name or 'an unnamed model'}"
        return f"SteeringVector({known}, {parts}, norm {self.norm():.4g})"

    def _repr_html_(self) -> str:
        parts = {hook: (list(d.shape), float(d.norm()), float(d.abs().max())) for hook, d in self.directions.items()}
        rows = [[hook, str(shape), norm, largest] for hook, (shape, norm, largest) in parts.items()]
        known = [(k, v if isinstance(v, str | int | float) else json.dumps(v)) for k, v in self.metadata.items()]
        return card(repr(self), known, tables=[(["hook point", "shape", "norm", "largest entry"], rows)])

    # Arithmetic

    def _with(self, parts: dict[str, Tensor], **notes: Any) -> "SteeringVector":
        metadata = {**self.metadata, **notes}
        return replace(self, directions=parts, metadata=metadata)

    def _combine(self, other: "SteeringVector", sign: float) -> "SteeringVector":
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._check_same_model(other)
        parts = dict(self.directions)
        for hook, direction in other.directions.items():
            parts[hook] = _sum(hook, parts[hook], sign * direction) if hook in parts else sign * direction
        word = "+" if sign > 0 else "-"
        return SteeringVector(
            directions=parts,
            model_name=self.model_name or other.model_name,
            method=f"{self.method or '?'} {word} {other.method or '?'}",
            metadata={"operation": word, "of": [self.provenance(), other.provenance()]},
            per=self._common_per(other),
        )

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        return self._combine(other, 1.0)

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> "SteeringVector":
        if isinstance(factor, SteeringVector | str) or not math.isfinite(float(factor)):
            raise SteersmanError(f"a steering vector is multiplied by a finite number, got {factor!r}")
        factor = float(factor)
        parts = {hook: factor * direction for hook, direction in self.directions.items()}
        return self._with(parts, factor=factor * self.metadata.get("factor", 1.0))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVector":
        if divisor == 0:
            raise SteersmanError("a steering vector cannot be divided by 0")
        return self * (1.0 / divisor)

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def normalized(self) -> "SteeringVector":
        """The vector of norm 1 in its direction. Raises SteersmanError for a zero vector."""
        self.check_not_zero("its direction")
        return self / self.norm()

    def dot(self, other: "SteeringVector") -> float:
        """The inner product, over the hook points of both; what one of them lacks counts as 0."""
        self._check_same_model(other)
        self._common_per(other)
        total = 0.0
        for hook in self.directions.keys() & other.directions.keys():
            a, b = _aligned(hook, self.directions[hook], other.directions[hook])
            total += float((a.double() * b.double()).sum())
        return total

    def cosine(self, other: "SteeringVector") -> float:
        """Cosine of the angle between the two. Raises SteersmanError when one is zero or they share no hook point."""
        if not self.directions.keys() & other.directions.keys():
            raise SteersmanError(
                f"these vectors share no hook point: {', '.join(self.directions)} and {', '.join(other.directions)}"
            )
        self.check_not_zero("a cosine")
        other.check_not_zero("a cosine")
        return self.dot(other) / (self.norm() * other.norm())

    def project(self, onto: "SteeringVector") -> "SteeringVector":
        """The component along `onto`: (v . u / |u|^2) u. `v - v.project(u)` is what is left, orthogonal to u."""
        onto.check_not_zero("a projection onto it")
        part = onto * (self.dot(onto) / onto.dot(onto))
        notes = {"operation": "project", "of": [self.provenance(), onto.provenance()]}
        return replace(part, method=self.method, metadata=notes)

    def _common_per(self, other: "SteeringVector") -> str:
        """What the rows of both are for. Raises SteersmanError where one is per position and the other per step."""
        if self.positions is not None and other.positions is not None and self.per != other.per:
            raise SteersmanError(
                "one of these vectors has a direction per position and the other per generated step: use "
                ".mean_over_positions() first"
            )
        return self.per if other.positions is None else other.per

    def _check_same_model(self, other: "SteeringVector") -> None:
        if not same_model(self.model_name, other.model_name):
            raise SteersmanError(
                f"these vectors belong to different models: {self.model_name!r} and {other.model_name!r}"
            )

    # Use: `steersman.steer` gives the class these, whose functions need the class.

    if TYPE_CHECKING:

        @staticmethod
        def contrast(
            lm: LanguageModel,
            positive: "ExamplesLike",
            negative: "ExamplesLike | Mapping[str, Tensor]" = (),
            *,
            hook: HookName | Sequence[HookName],
            **settings: Any,
        ) -> "SteeringVector":
            """See `steersman.steer.contrast`."""
            ...

        def apply(
            self, where: Steers | LanguageModel, *, scale: float | Sequence[float] | Tensor = 1.0, **options: Any
        ) -> AbstractContextManager[Any]:
            """The steering context of this vector: see `Steerer.vector`."""
            ...

        def calibrate(
            self, st: Steers | LanguageModel, *, texts: Sequence[Document] | None = None, **settings: Any
        ) -> "SteeringVector":
            """See `steersman.steer.calibrate.calibrated`."""
            ...

    # Files

    def provenance(self) -> dict[str, Any]:
        """What is known about it besides its numbers, as JSON can hold it."""
        known = {"model_name": self.model_name, "method": self.method, "metadata": self.metadata}
        return known if self.per == "position" else {**known, "per": self.per}

    def save(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all: safetensors with its provenance, or a GGUF control vector for
        `.gguf`. Folders on the way are made."""
        path = Path(path)
        write = write_gguf if path.suffix.lower() == ".gguf" else vector_file.write
        make_folder(path.parent)
        write(vector_file.Parts(self.directions, self.provenance()), path)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a file that `save` wrote, or a GGUF control vector. Raises a one-line SteersmanError that names it."""
        path = Path(path)
        check_regular(path)
        read = read_gguf if path.suffix.lower() == ".gguf" else vector_file.read
        with one_error(path):
            directions, provenance = read(path)
            try:
                return cls(directions=directions, **provenance)
            except SteersmanError as error:
                raise SteersmanError(f"{path}: {error}") from None


def block_of(hook: str) -> int | None:
    """The block that a hook point lies in, or None."""
    match = re.match(r"blocks\.(\d+)\.", canonical_hook(hook))
    return None if match is None else int(match[1])


def _direction(hook: str, given: Any) -> Tensor:
    """A direction as it is kept: a copy, fp32 on the CPU. Raises SteersmanError for a wrong shape or value."""
    direction = torch.as_tensor(given).detach().to("cpu", torch.float32).clone().contiguous()
    if direction.ndim not in (1, 2) or direction.numel() == 0:
        raise SteersmanError(f"a direction must be [D], or [P, D] per position; {hook} got {list(direction.shape)}")
    if not bool(direction.isfinite().all()):
        raise SteersmanError(f"the steering vector at {hook} holds NaN or infinite values")
    return direction


def _aligned(hook: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts with as many positions each, the shorter one padded with zeros."""
    if a.shape[-1] != b.shape[-1]:
        raise SteersmanError(f"these vectors have different widths at {hook}: {a.shape[-1]} and {b.shape[-1]}")
    if a.ndim != b.ndim:
        raise SteersmanError(
            f"at {hook} one vector is added at every token and the other position by position: use "
            ".mean_over_positions() first"
        )
    if a.ndim == 1 or len(a) == len(b):
        return a, b
    rows = max(len(a), len(b))
    return _padded(a, rows), _padded(b, rows)


def _padded(a: Tensor, rows: int) -> Tensor:
    return torch.cat([a, a.new_zeros(rows - len(a), a.shape[1])])


def _sum(hook: str, a: Tensor, b: Tensor) -> Tensor:
    a, b = _aligned(hook, a, b)
    return a + b
