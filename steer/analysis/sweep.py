"""At which layer a kind of vector steers best: every layer at equal cost, beside what chance finds.

For each hook point a vector is made from one set of examples and calibrated to the same KL(steered || base) per token
on other texts, for each budget. Its effect on held-out items is the rise of the margin: log-likelihood per token of the
positive continuation less that of the negative one, steered less unsteered. One half of the items (the even ones)
chooses the layer, the other half reports what it does, with an interval over items.

An argmax over layers finds something in noise too. So the same is done with vectors that know nothing: random ones of
equal norm, and vectors of the same examples with their labels permuted, each calibrated to the same KL, each with its
own choice of a layer. `p_value` is the share of these nulls, the vector itself counted in, that do at least as well on
the reporting half.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from steersman.config import check_types, differences, merged
from steersman.conversations import Document
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.progress import progress
from steersman.reading import read_json_object
from steersman.steer.calibrate import calibrate
from steersman.steer.dose import steered
from steersman.steer.evaluation.bootstrap import Estimate, bootstrap
from steersman.steer.evaluation.forced import ContinuationLike, Continuations, as_continuations, likelihoods
from steersman.steer.evaluation.rollouts import Arm, unsteered
from steersman.steer.measures import CostMeter
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.contrast import check_contrast, contrast
from steersman.steer.methods.examples import Example, Examples, ExamplesLike, as_examples
from steersman.steer.vectors.vector import SteeringVector

log = logging.getLogger(__name__)

BUDGETS = (0.1, 0.3)
_LARGEST = 1 << 28


@dataclass(frozen=True, kw_only=True)
class LayerSweepConfig:
    """What is swept, and how it is measured."""

    method: str = "diffmean"
    """Vector method; optimised and actadd as well, though their vectors take longer or have positions."""
    positions: str | None = None
    """Which tokens the method reads: all, mean, last, answer or index:N; by default what its paper reads."""
    target_kl: tuple[float, ...] = ()
    """KL(steered || base) in nats per token at which layers are compared; without any, 0.1 and 0.3."""
    nulls: int = 4
    """Random vectors, and as many vectors of permuted labels, at every hook point; 0 for none."""
    scope: str = "all"
    """Tokens to steer: all, prompt, generation, last_prompt, a window such as 2:10, or tokens:15,27."""
    batch_size: int = 16
    """Rows per forward pass."""
    max_length: int = 128
    """Texts of the budget are cut to this many tokens."""
    tolerance: float = 0.1
    """Fraction of the budget by which a calibration may miss it."""
    max_evaluations: int = 8
    """Scales to try per calibration."""
    seed: int = 0
    """Seed of the nulls, the intervals and the texts that the model writes itself."""

    def __post_init__(self) -> None:
        check_types(self)
        if not all(0 < budget < float("inf") for budget in self.target_kl):
            raise SteersmanError(f"target_kl must be numbers above 0, got {list(self.target_kl)}")
        if self.nulls < 0:
            raise SteersmanError(f"nulls must not be negative, got {self.nulls}")

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets, rising."""
        return tuple(sorted(set(self.target_kl or BUDGETS)))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One vector at one hook point and budget."""

    hook_name: str
    """The hook point."""
    budget: float
    """KL asked for, in nats per token."""
    kind: str
    """vector, random or permuted."""
    draw: int
    """Which of the nulls; 0 for the vector."""
    scale: float
    """Multiple of the vector."""
    kl: float
    """KL measured."""
    converged: bool
    """Whether the budget was met. A cell that did not is never chosen."""
    effects: list[float]
    """Rise of each item's margin, in nats per token."""

    def half(self, half: int) -> float:
        """Mean effect on the even (0: choosing) or the odd (1: reporting) items."""
        return float(np.mean(self.effects[half::2]))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layer that one half of the items chose, and what it does on the other."""

    hook_name: str
    """The hook point."""
    budget: float
    """Its KL budget."""
    scale: float
    """Multiple of the vector there."""
    effect: Estimate
    """Effect on the reporting half, with its interval over items."""
    null_mean: float | None
    """Mean over the nulls of the same, each with its own choice of a layer; None without nulls."""
    null_largest: float | None
    """Largest over the nulls."""
    p_value: float | None
    """(1 + nulls that do at least as well) / (1 + nulls)."""
    random_here: float | None
    """Mean effect of the random vectors at the chosen hook point itself."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every layer at every budget, and what was chosen."""

    cells: list[Cell]
    """The vector's and the nulls'."""
    choices: dict[float, Choice]
    """By budget; one that no layer met is left out."""
    vectors: SteeringVector
    """The vectors that were swept, at scale 1, one part a hook point."""
    hooks: list[str]
    """The hook points, in the model's order."""
    seed: int
    """Seed of the intervals."""

    def cell(self, hook: str, budget: float) -> Cell:
        """The vector's cell."""
        return next(c for c in self.cells if (c.hook_name, c.budget, c.kind) == (hook, budget, "vector"))

    def effect(self, hook: str, budget: float) -> Estimate:
        """The vector's effect on the reporting half at one hook point."""
        found = bootstrap(self.cell(hook, budget).effects[1::2], self.seed)
        assert found is not None
        return found

    def vector(self, budget: float | None = None) -> SteeringVector:
        """The chosen vector, scaled to the budget (by default the largest that was met)."""
        if not self.choices:
            raise SteersmanError("no layer met a budget: ask for a smaller or larger target_kl")
        choice = self.choices[max(self.choices) if budget is None else budget]
        notes = {"budget": choice.budget, "hooks_tried": len(self.hooks), "p_value": choice.p_value}
        part = self.vectors.at(choice.hook_name) * choice.scale
        return SteeringVector(
            directions=part.directions, model_name=part.model_name, method=part.method,
            metadata={**part.metadata, "sweep": notes},
        )  # fmt: skip

    def to_text(self) -> str:
        """A table: a hook point a line, a budget a column; then the choices."""
        budgets = sorted({c.budget for c in self.cells})
        width = max(len(hook) for hook in self.hooks)
        head = "".join(f" {f'KL {budget:g}':<26} {'null':<8}" for budget in budgets)
        lines = [f"{'effect on held-out items':<{max(width, 24)}}{head}"]
        for hook in self.hooks:
            shown = ""
            for budget in budgets:
                cell = self.cell(hook, budget)
                nulls = [
                    c.half(1) for c in self.cells if (c.hook_name, c.budget) == (hook, budget) and c.kind != "vector"
                ]
                mark = "*" if budget in self.choices and self.choices[budget].hook_name == hook else ""
                value = str(self.effect(hook, budget)) + mark if cell.converged else f"KL {cell.kl:.3g} at its limit"
                shown += f" {value:<26} {f'{max(nulls):.3g}' if nulls else '-':<8}"
            lines.append(f"{hook:<{max(width, 24)}}{shown}")
        for budget, c in sorted(self.choices.items()):
            null = (
                "" if c.p_value is None else f"; nulls that chose alike reach {c.null_largest:.3g}, p {c.p_value:.3g}"
            )
            lines.append(f"KL {budget:g}: {c.hook_name} at scale {c.scale:.4g}, effect {c.effect}{null}")
        lines.append("effect: rise of the margin in nats per token, 95 % interval; null: the largest of the hook point")
        return "\n".join(lines)


def sweep_layers(
    lm: LanguageModel,
    positive: ExamplesLike,
    negative: ExamplesLike,
    *,
    items: Sequence[ContinuationLike] = (),
    hooks: HookName | Sequence[HookName] | None = None,
    texts: Sequence[Document] | None = None,
    out: str | PathLike[str] | None = None,
    config: LayerSweepConfig | None = None,
    **settings: Any,
) -> Sweep:
    """Sweep a vector method over hook points (by default the output of every block) at equal KL.

    Args:
        lm: the model.
        positive, negative: examples as for `contrast`.
        items: held-out (prompt, positive, negative) continuations, at least four. Without them every second pair of
            the examples is held out, and the vectors are made from the others.
        hooks: hook points.
        texts: texts to measure the KL on; without them the model writes its own.
        out: JSON file that is written after every vector. The same call with the same file goes on after those that
            are in it.
        config: the settings; `**settings` are fields of it, over those of `config`.

    Raises SteersmanError for what `contrast` and `calibrate` refuse, too few items, and a file of another sweep.
    """
    config = merged(LayerSweepConfig, config, settings)
    examples = Examples(positive=as_examples(positive, "positive"), negative=as_examples(negative, "negative"))
    heldout = as_continuations(items)
    if not heldout:
        examples, heldout = held_out(examples)
    if len(heldout) < 4:
        raise SteersmanError(f"at least 4 held-out items are needed, got {len(heldout)}: half of them choose the layer")
    method = ContrastConfig(
        method=config.method, positions=config.positions, batch_size=config.batch_size, diagnostics=False,
        seed=config.seed,
    )  # fmt: skip
    check_contrast(examples, method)
    names = lm.resolve_hooks(
        hooks if hooks is not None else [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]
    )
    names = sorted(dict.fromkeys(names), key=lm.hook_point)
    identity = {
        **asdict(config), "target_kl": list(config.budgets), "hooks": names, "model": lm.digest(),
        "examples": _hash([*examples.positive, "", *examples.negative]), "items": _hash(heldout),
        "texts": _hash(texts or []),
    }  # fmt: skip
    record = _Record(out, identity)

    def made(given: Examples) -> SteeringVector:
        return contrast(lm, given.positive, given.negative, hook=names, config=method)

    vectors = made(examples)
    meter = CostMeter(lm, texts, batch_size=config.batch_size, max_length=config.max_length, seed=config.seed)
    base: np.ndarray | None = None

    def margins(arm: Arm) -> np.ndarray:
        logp, n = likelihoods(lm, heldout, arm, config.batch_size)
        return (logp / np.maximum(n, 1)) @ np.array([1.0, -1.0])

    todo = [("vector", 0), *((kind, i) for kind in ("random", "permuted") for i in range(config.nulls))]
    with progress(total=len(todo) * len(names) * len(config.budgets), desc="sweeping layers") as bar:
        for kind, draw in todo:
            keys = [(hook, budget, kind, draw) for hook in names for budget in config.budgets]
            if all(key in record.cells for key in keys):
                bar.update(len(keys))
                continue
            if kind == "vector":
                v = vectors
            elif kind == "random":
                v = vectors.random_like(config.seed + draw)
            else:
                v = made(permuted(examples, config.seed + draw))
            for hook, budget, *_ in keys:
                if (hook, budget, kind, draw) not in record.cells:
                    if base is None:
                        base = margins(unsteered)
                    part = v.at(hook)
                    search = calibrate(
                        part, lm, texts=meter, target_kl=budget, scope=config.scope, tolerance=config.tolerance,
                        max_evaluations=config.max_evaluations,
                    ).search  # fmt: skip
                    arm = _arm(lm, part, search.scale, config.scope)
                    effects = [round(float(x), 6) for x in margins(arm) - base]
                    record.add(
                        Cell(hook_name=hook, budget=budget, kind=kind, draw=draw, scale=search.scale, kl=search.value,
                             converged=search.converged, effects=effects)
                    )  # fmt: skip
                bar.update()
    cells = list(record.cells.values())
    choices = {
        budget: choice for budget in config.budgets if (choice := choose(cells, budget, config.seed)) is not None
    }
    return Sweep(cells=cells, choices=choices, vectors=vectors, hooks=names, seed=config.seed)


def choose(cells: Iterable[Cell], budget: float, seed: int = 0) -> Choice | None:
    """The hook point that the even items choose at a budget, with its figures on the odd ones; None where no vector met
    the budget."""
    here = [cell for cell in cells if cell.budget == budget and cell.converged]

    def best(kind: str, draw: int) -> Cell | None:
        own = [cell for cell in here if (cell.kind, cell.draw) == (kind, draw)]
        return max(own, key=lambda cell: cell.half(0), default=None)

    found = best("vector", 0)
    if found is None:
        return None
    effect = bootstrap(found.effects[1::2], seed)
    assert effect is not None
    others = sorted({(cell.kind, cell.draw) for cell in here if cell.kind != "vector"})
    nulls = [cell.half(1) for key in others if (cell := best(*key)) is not None]
    random_here = [cell.half(1) for cell in here if (cell.kind, cell.hook_name) == ("random", found.hook_name)]
    return Choice(
        hook_name=found.hook_name,
        budget=budget,
        scale=found.scale,
        effect=effect,
        null_mean=float(np.mean(nulls)) if nulls else None,
        null_largest=max(nulls) if nulls else None,
        p_value=(1 + sum(x >= effect.mean for x in nulls)) / (1 + len(nulls)) if nulls else None,
        random_here=float(np.mean(random_here)) if random_here else None,
    )


def held_out(examples: Examples) -> tuple[Examples, list[Continuations]]:
    """Every second pair of examples as an item, and the examples without them. Raises SteersmanError unless they are
    pairs of a shared prompt, or of whole texts."""
    examples.check_pairs("sweep_layers without items")
    items = []
    for p, n in zip(examples.positive[1::2], examples.negative[1::2]):
        if p.prompt != n.prompt:
            raise SteersmanError("without items, the two sides of a pair must share their prompt: give items=")
        items.append(Continuations(prompt=p.prompt, positive=p.answer, negative=n.answer))
    return Examples(positive=examples.positive[0::2], negative=examples.negative[0::2]), items


def permuted(examples: Examples, seed: int) -> Examples:
    """The examples with labels that mean nothing: the sides of half of the pairs exchanged, or, where the sides have
    different lengths, all dealt anew."""
    rng = random.Random(seed)
    positive, negative = list(examples.positive), list(examples.negative)
    if len(positive) == len(negative):
        for i in rng.sample(range(len(positive)), len(positive) // 2):
            positive[i], negative[i] = negative[i], positive[i]
    else:
        both: list[Example] = [*positive, *negative]
        rng.shuffle(both)
        positive, negative = both[: len(positive)], both[len(positive) :]
    return Examples(positive=positive, negative=negative)


def _arm(lm: LanguageModel, v: SteeringVector, scale: float, scope: str) -> Arm:
    return lambda _rows: steered(v, lm, scale=scale, scope=scope)


class _Record:
    """The cells that are done, in memory and in a file."""

    def __init__(self, out: str | PathLike[str] | None, identity: dict[str, Any]) -> None:
        self.path = None if out is None else Path(out)
        self.identity = identity
        self.cells: dict[tuple[str, float, str, int], Cell] = {}
        if self.path is None or not self.path.exists():
            return
        content = read_json_object(self.path, limit=_LARGEST)
        try:
            told, cells = content["sweep"], [Cell(**cell) for cell in content["cells"]]
        except (KeyError, TypeError) as error:
            raise SteersmanError(f"{self.path} is no file of a sweep: choose another") from error
        if found := differences(told, identity):
            raise SteersmanError(f"{self.path} is of another sweep ({found}): choose another file, or remove it")
        self.cells = {(cell.hook_name, cell.budget, cell.kind, cell.draw): cell for cell in cells}

    def add(self, cell: Cell) -> None:
        self.cells[cell.hook_name, cell.budget, cell.kind, cell.draw] = cell
        if self.path is not None:
            write_json(self.path, {"sweep": self.identity, "cells": [asdict(c) for c in self.cells.values()]}, indent=0)


def _hash(entries: Sequence[Any]) -> str:
    plain = [entry if isinstance(entry, str) else asdict(entry) for entry in entries]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
