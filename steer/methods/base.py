"""What a method is, and the way that the streamed ones share: read, accumulate, then look at what came out.

A streamed method keeps sums at each hook point and no states. Examples are dealt to two halves, each with sums of its
own: the vector is that of both together, and the vectors of the halves show whether it would come out again
(`split_half`) and whether it separates examples it was not made from (see `diagnostics`).

A direction from a principal component or a classifier has neither sign nor length. All streamed methods give theirs the
sign and the length of the difference of the means along it: v = (u . (mean+ - mean-)) u for a unit direction u. Scale 1
is then as far as the two sides of the examples lie apart along v, whatever the method.

Shape letters: N samples, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.config import check_types
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.registry import Registry
from steersman.steer.methods.diagnostics import Agreement, Projections, half_of
from steersman.steer.methods.examples import Examples
from steersman.steer.methods.moments import RunningMean
from steersman.steer.methods.reading import Order, Reader, check_positions

ROUNDING = 1e-5
"""Fraction of the states' length up to which a difference of states is rounding."""


@renamed_fields(tokens="positions")
@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """How a vector is made from examples."""

    method: str = "diffmean"
    """actadd, caa, diffmean, mean_centred, pca, lat, probe or optimised."""
    positions: str | None = None
    """Which tokens are read: all, mean, last, answer or index:N; by default what the method's paper reads."""
    batch_size: int = 16
    """Examples (or pairs of them) per forward pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""
    diagnostics: bool = True
    """Read the examples a second time and report how well the vector separates them."""
    seed: int = 0
    """Seed of what is random: the pairs of `lat`."""
    l2: float = 0.01
    """probe: weight of |w|^2 / 2 beside the mean log-loss, for states scaled to unit variance per dimension."""
    steps: int = 60
    """optimised: gradient steps."""
    max_norm_frac: float = 0.5
    """optimised: bound of the vector's norm, as a fraction of the median norm of the residual stream."""
    suppress: float = 1.0
    """optimised: weight of making the negative completions unlikely; 0 only raises the positive ones."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a method made."""

    directions: dict[str, Tensor]
    """Hook point -> [D], or [P, D]."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    """Hook point -> figures that predict whether steering will work."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else should be known about how it was made."""


METHODS: Registry[type["Method"]] = Registry("method")
"""Every way to make a vector from examples, by name."""


class Method(ABC):
    """A way to make a vector from examples. A subclass is found by its `name`."""

    name: ClassVar[str]
    """What `ContrastConfig.method` calls it."""
    source: ClassVar[str]
    """Paper."""
    positions: ClassVar[str]
    """Which tokens it reads where the settings do not say."""
    needs_negative: ClassVar[bool] = True
    """Whether it can do nothing without negative examples."""
    takes_means: ClassVar[bool] = False
    """Whether the states' means may stand in for negative examples."""

    def __init_subclass__(cls) -> None:
        METHODS.register(cls, cls)

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        """Raise SteersmanError for what cannot be made, as far as this can be known before a model is loaded.

        A subclass that asks for more calls this first. `has_means`: the states' means stand in for negatives.
        """
        if not examples.positive:
            raise SteersmanError("there are no positive examples")
        if not examples.negative and not has_means and self.needs_negative:
            raise SteersmanError(f"there are no negative examples, and method {self.name!r} needs some")
        for name in ("batch_size", "max_length"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise SteersmanError(f"{name} must be at least 1, got {value}")

    @abstractmethod
    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        """The vector at every hook point. `means` are the states' means in place of negative examples."""


class Estimator(ABC):
    """Sums at one hook point over one half of the examples. Every one keeps the means of both sides."""

    def __init__(self, config: ContrastConfig) -> None:
        self.config = config
        self.positive, self.negative = RunningMean(), RunningMean()

    def update(self, x: Tensor, positive: Tensor) -> None:
        """Take in samples x [n, D] with their sides [n] bool, in the method's order."""
        self.positive.add(x[positive])
        self.negative.add(x[~positive])

    def merged(self, other: Any) -> Any:
        """The sums over both halves, as a new estimator."""
        both = type(self)(self.config)
        both.positive, both.negative = (
            self.positive.merged(other.positive),
            self.negative.merged(other.negative),
        )
        return both

    def difference(self) -> Tensor:
        """mean+ - mean-, [D] float64."""
        return self.positive.mean - self.negative.mean

    def along(self, u: Tensor) -> Tensor:
        """The part of the difference of the means along a direction u [D]: its sign and length for u."""
        u = u / u.norm()
        return (u @ self.difference()) * u

    @abstractmethod
    def direction(self) -> Tensor:
        """The vector [D] float64."""

    def notes(self) -> dict[str, Any]:
        """What else the estimator can say of its direction."""
        return {}


class StreamedMethod(Method):
    """A method whose vector comes from sums over the samples."""

    order: ClassVar[Order]
    estimator: ClassVar[type[Estimator]]

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        positions = config.positions or self.positions
        check_positions(positions)
        if self.order == "pairs":
            examples.check_pairs(self.name)
            if positions == "all":
                raise SteersmanError(
                    f"method {self.name!r} compares pairs and needs one state per text: not positions='all'"
                )
        if positions == "answer":
            examples.check_answers(self.name)

    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        positions = config.positions or self.positions
        reader = Reader(
            lm, hooks, positions=positions, batch_size=config.batch_size, max_length=config.max_length, seed=config.seed
        )
        halves = {hook: (self.estimator(config), self.estimator(config)) for hook in hooks}
        agreement = {hook: Agreement() for hook in hooks}
        for batch in reader.samples(examples, self.order):
            for hook, x in batch.states.items():
                for half, estimator in enumerate(halves[hook]):
                    mine = half_of(batch.unit) == half
                    estimator.update(x[mine], batch.positive[mine])
                if self.order == "pairs":
                    agreement[hook].add(x[0::2] - x[1::2])
        if means is not None:
            for hook, (even, odd) in halves.items():
                even.negative.add(means[hook][None])
                odd.negative.add(means[hook][None])
        whole = {hook: even.merged(odd) for hook, (even, odd) in halves.items()}
        for hook, estimator in whole.items():
            size = max(float(side.mean.norm()) for side in (estimator.positive, estimator.negative))
            check_differ(estimator.difference(), size, self.name, hook)
        directions = {hook: _checked(estimator.direction(), self.name, hook) for hook, estimator in whole.items()}
        notes: dict[str, Any] = {"tokens": positions}
        for hook, estimator in whole.items():
            if estimator.notes():
                notes.setdefault("found", {})[hook] = estimator.notes()
        figures = {}
        if config.diagnostics:
            projections = {
                hook: Projections(directions[hook], _half_directions(halves[hook], examples)) for hook in hooks
            }
            for batch in reader.samples(examples, self.order):
                for hook, x in batch.states.items():
                    projections[hook].add(x, batch.positive, batch.unit)
            for hook in hooks:
                figures[hook] = projections[hook].figures(paired=self.order == "pairs") | agreement[hook].figures()
        return Made(directions=directions, diagnostics=figures, notes=notes)


def _half_directions(halves: tuple[Estimator, Estimator], examples: Examples) -> tuple[Tensor, Tensor] | None:
    """The vectors of the two halves, or None where one of them has too few examples to make one."""
    if min(len(examples.positive), max(len(examples.negative), 2)) < 2:
        return None
    try:
        directions = halves[0].direction(), halves[1].direction()
    except SteersmanError:
        return None
    return directions if all(bool(v.isfinite().all()) and float(v.norm()) > 0 for v in directions) else None


def check_differ(difference: Tensor, size: float, method: str, hook: str) -> None:
    """Raise SteersmanError when the `difference` of states whose length is `size` is nothing but rounding.

    Equal texts in one batch may come out a few bits apart: how a processor sums depends on the row.
    """
    if float(difference.norm()) <= ROUNDING * size:
        raise SteersmanError(
            f"{method} gives a zero vector at {hook}: the positive and the negative examples have the same states there"
        )


def _checked(direction: Tensor, method: str, hook: str) -> Tensor:
    if not bool(direction.isfinite().all()):
        raise SteersmanError(f"{method} gives NaN or infinite values at {hook}")
    if not float(direction.norm()) > 0:
        raise SteersmanError(f"{method} gives a zero vector at {hook}: its direction is at right angles to the means'")
    return direction.to(torch.float32)
