"""The way that the streamed methods share: read, accumulate, then look at what came out.

A streamed method keeps sums at each hook point and no states. Examples are dealt to two halves, each with sums of its
own: the vector is that of both together, and the vectors of the halves show whether it would come out again
(`split_half`) and whether it separates examples it was not made from (see `diagnostics`).

A direction from a principal component or a classifier has neither sign nor length. All streamed methods give theirs the
sign and the length of the difference of the means along it: v = (u . (mean+ - mean-)) u for a unit direction u. Scale 1
is then as far as the two sides of the examples lie apart along v, whatever the method.

Shape letters: N samples, D width.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.methods.base import METHODS, ContrastConfig, Made, Method, check_differ
from steersman.steer.methods.diagnostics import Agreement, Projections, half_of
from steersman.steer.methods.examples import Examples
from steersman.steer.methods.moments import RunningMean
from steersman.steer.methods.reading import Order, Part, Reader, check_positions

log = logging.getLogger(__name__)


class Estimator(ABC):
    """Sums at one hook point over one half of the examples. Every one keeps the means of both sides."""

    def __init__(self, config: ContrastConfig) -> None:
        self.config = config
        self.positive, self.negative = RunningMean(), RunningMean()

    def observe(self, part: Part) -> None:
        """Take in samples with all that is known of them; the weights are 1 unless the method takes others."""
        self.update(part.x, part.positive)

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

    def check(self, method: str, hook: str) -> None:
        """Raise SteersmanError where the examples hold nothing that a direction could come from."""
        size = max(float(side.mean.norm()) for side in (self.positive, self.negative))
        check_differ(self.difference(), size, method, hook)

    def notes(self) -> dict[str, Any]:
        """What else the estimator can say of its direction."""
        return {}


class StreamedMethod(Method):
    """A method whose vector comes from sums over the samples: at each hook point, or (`joint`) over the states of all
    of them side by side. With `table` in the settings there are sums for every generated step."""

    order: ClassVar[Order]
    estimator: ClassVar[type[Estimator]]
    joint: ClassVar[bool] = False
    """Whether the states at all hook points are one sample, their direction cut into parts in the end."""
    per_step: ClassVar[bool] = False
    """Whether it can make a table of generated steps: the mean of what is there at each of them."""

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
        if config.table is not None:
            self._check_table(examples, config, has_means)
        elif positions == "answer":
            examples.check_answers(self.name)

    def _check_table(self, examples: Examples, config: ContrastConfig, has_means: bool) -> None:
        if not self.per_step:
            able = ", ".join(m.name for m in METHODS.values() if getattr(m, "per_step", False))
            raise SteersmanError(f"method {self.name!r} makes no table of steps; {able} do")
        if config.table is not None and config.table < 1:
            raise SteersmanError(f"table must be at least 1 step, got {config.table}")
        if config.positions is not None or has_means:
            raise SteersmanError("a table of steps reads every step of the answers: leave out positions and means")
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
            lm,
            hooks,
            positions=positions,
            steps=config.table,
            batch_size=config.batch_size,
            max_length=config.max_length,
            seed=config.seed,
        )
        whole_stream = tuple(hooks)
        places = [whole_stream] if self.joint else list(hooks)
        tables = {place: _Table(self, config, examples) for place in places}
        for batch in reader.samples(examples, self.order):
            for place, table in tables.items():
                table.add(batch.at(place))
        if means is not None:
            for hook in hooks:
                tables[hook].add_mean(means[hook])
        for place, table in tables.items():
            table.finish(_shown(place))
        figures: dict[str, Any] = {}
        if config.diagnostics:
            for batch in reader.samples(examples, self.order):
                for place, table in tables.items():
                    table.project(batch.at(place))
            figures = {hook: table.figures() for place, table in tables.items() for hook in _hooks(place)}
        directions: dict[str, Tensor] = {}
        for place, table in tables.items():
            widths = [lm.hook_width(hook) for hook in _hooks(place)]
            directions |= dict(zip(_hooks(place), table.direction.split(widths, dim=-1)))
        notes: dict[str, Any] = {"tokens": positions if config.table is None else "steps"}
        for place, table in tables.items():
            if found := table.notes():
                notes.setdefault("found", {})[_shown(place)] = found
        return Made(
            directions=directions, diagnostics=figures, notes=notes, per="position" if config.table is None else "step"
        )


def _hooks(place: str | tuple[str, ...]) -> tuple[str, ...]:
    return (place,) if isinstance(place, str) else place


def _shown(place: str | tuple[str, ...]) -> str:
    return ", ".join(_hooks(place))


class _Table:
    """What one hook point (or all of them together) gives: the sums of both halves at every step, then the vector and
    its figures. Without a table of steps everything is at step 0."""

    def __init__(self, method: StreamedMethod, config: ContrastConfig, examples: Examples) -> None:
        self.method, self.config, self.examples = method, config, examples
        self.tabled = config.table is not None
        self.halves: list[tuple[Estimator, Estimator]] = []
        self.agreement = Agreement()
        self.paired = method.order == "pairs" and not self.tabled
        self._projections: list[Projections | None] = []

    def add(self, part: Part) -> None:
        """Take in the samples of a batch."""
        for step in range(int(part.step.max()) + 1):
            if step == len(self.halves):
                self.halves.append((self.method.estimator(self.config), self.method.estimator(self.config)))
            at = part.of(part.step == step) if self.tabled else part
            for half, estimator in enumerate(self.halves[step]):
                estimator.observe(at.of(half_of(at.unit) == half))
        if self.paired:
            self.agreement.add(part.x[0::2] - part.x[1::2])

    def add_mean(self, mean: Tensor) -> None:
        """Take in a corpus' mean [D] in place of negative examples."""
        for estimator in self.halves[0]:
            estimator.negative.add(mean[None])

    def finish(self, where: str) -> None:
        """Make the vector, or the table up to the last step that both sides reach."""
        self.whole = [even.merged(odd) for even, odd in self.halves]
        if self.tabled:
            both = next((i for i, e in enumerate(self.whole) if not (e.positive.n and e.negative.n)), len(self.whole))
            if both < (self.config.table or 0):
                log.warning("%s: only %d steps have examples of both sides: the table ends there", where, both)
            self.whole, self.halves = self.whole[:both], self.halves[:both]
        rows, refused = [], None
        for estimator in self.whole:
            try:
                estimator.check(self.method.name, where)
                rows.append(_checked(estimator.direction(), self.method.name, where))
            except SteersmanError as error:  # a step at which the sides are alike, as behind one prompt, is not steered
                refused = error
                rows.append(None)
        made = next((row for row in rows if row is not None), None)
        if refused is not None and (made is None or not self.tabled):
            raise refused
        if made is None:
            raise SteersmanError(f"{where}: no step of a table has examples of both sides")
        filled = [torch.zeros_like(made) if row is None else row for row in rows]
        self.direction = torch.stack(filled) if self.tabled else filled[0]
        self._of_halves = [_half_directions(pair, self.examples) for pair in self.halves]
        if self.config.diagnostics:
            self._projections = [
                None if row is None else Projections(row, halves) for row, halves in zip(rows, self._of_halves)
            ]

    def project(self, part: Part) -> None:
        """Take in the samples once more, for the figures."""
        for step, projections in enumerate(self._projections):
            at = part.of(part.step == step) if self.tabled else part
            if projections is not None and len(at.x):
                projections.add(at.x, at.positive, at.unit)

    def figures(self) -> dict[str, Any]:
        """What predicts whether steering works; of a table the mean over its steps, `split_half` of it as a whole."""
        found = [
            projections.figures(paired=self.paired) for projections in self._projections if projections is not None
        ]
        if not self.tabled:
            return found[0] | self.agreement.figures()
        joined: dict[str, Any] = {"steps": len(self._projections), "heldout": all(each["heldout"] for each in found)}
        for name in ("auroc", "d_prime"):
            known = [each[name] for each in found if isinstance(each.get(name), float)]
            if known:
                joined[name] = sum(known) / len(known)
        halves = [pair for pair in self._of_halves if pair is not None]
        if halves:
            a, b = (torch.cat([pair[i] for pair in halves]) for i in (0, 1))
            joined["split_half"] = float(a @ b / (a.norm() * b.norm()))
        return joined

    def notes(self) -> dict[str, Any]:
        """What the estimators say, and how many samples each step of a table had."""
        if self.tabled:
            return {"samples_per_step": [[e.positive.n, e.negative.n] for e in self.whole]}
        return self.whole[0].notes()


def _half_directions(halves: tuple[Estimator, Estimator], examples: Examples) -> tuple[Tensor, Tensor] | None:
    """The vectors of the two halves, or None where one of them has too few examples to make one."""
    if min(len(examples.positive), max(len(examples.negative), 2)) < 2:
        return None
    try:
        directions = halves[0].direction(), halves[1].direction()
    except SteersmanError:
        return None
    return directions if all(bool(v.isfinite().all()) and float(v.norm()) > 0 for v in directions) else None


def _checked(direction: Tensor, method: str, hook: str) -> Tensor:
    if not bool(direction.isfinite().all()):
        raise SteersmanError(f"{method} gives NaN or infinite values at {hook}")
    if not float(direction.norm()) > 0:
        raise SteersmanError(f"{method} gives a zero vector at {hook}: its direction is at right angles to the means'")
    return direction.to(torch.float32)
