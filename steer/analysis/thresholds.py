"""Where to draw a line along a direction: percentiles for caps, thresholds for conditions, probes with their sides.

Shape letters: n texts or tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.methods.contrast import contrast
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.logistic import fit_logistic
from steersman.steer.methods.reading import Reader
from steersman.steer.vectors.vector import SteeringVector


def states_of(
    lm: LanguageModel, texts: ExamplesLike, hooks: Sequence[str], *, positions: str = "mean", batch_size: int = 16
) -> dict[str, Tensor]:
    """Hook point -> [n, D] fp32: the states of texts, one each or, for positions "all", one a token without the BOS."""
    examples = Examples(positive=as_examples(texts, "positive"), negative=[])
    if not examples.positive:
        raise SteersmanError("there are no texts to read")
    reader = Reader(lm, hooks, positions=positions, batch_size=batch_size)
    found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for batch in reader.samples(examples, "sides"):
        for hook, x in batch.states.items():
            found[hook].append(x)
    return {hook: torch.cat(parts) for hook, parts in found.items()}


def projections(
    lm: LanguageModel, texts: ExamplesLike, v: SteeringVector, *, positions: str = "all", batch_size: int = 16
) -> dict[str, Tensor]:
    """Hook point -> [n]: h . v / |v| of texts, at each hook point of the vector."""
    v.check_not_zero("a projection on it")
    states = states_of(lm, texts, v.hook_names, positions=positions, batch_size=batch_size)
    return {hook: x @ (v.directions[hook] / v.directions[hook].norm()) for hook, x in states.items()}


def percentile_limits(
    lm: LanguageModel,
    texts: ExamplesLike,
    v: SteeringVector,
    percentile: float,
    *,
    positions: str = "all",
    batch_size: int = 16,
) -> dict[str, float]:
    """Hook point -> the percentile (0 to 100) of h . v / |v| there: limits for `floor` and `cap`.

    Measured layer by layer, as the states' size grows with depth. With limits at neighbouring layers, the later ones
    act on states that the earlier ones have changed.
    """
    if not 0 < percentile < 100:
        raise SteersmanError(f"a percentile lies between 0 and 100, got {percentile}")
    found = projections(lm, texts, v, positions=positions, batch_size=batch_size)
    return {hook: float(x.double().quantile(percentile / 100)) for hook, x in found.items()}


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A line between two sides of a number."""

    value: float
    """Where it lies: half-way between two neighbours."""
    above: bool
    """Whether the positive side lies above it."""
    f1: float
    """F1 of the positive side, on the numbers it was drawn from."""


def best_threshold(positive: Tensor, negative: Tensor) -> Threshold:
    """The line with the largest F1 of the positive side, in either direction; of equal ones the one with most room.

    >>> best_threshold(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
    Threshold(value=2.0, above=True, f1=1.0)
    """
    values = torch.cat([positive, negative]).double()
    label = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    found: Threshold | None = None
    best = (-1.0, -1.0)
    for above in (True, False):
        order = values.argsort(descending=above, stable=True)
        x, y = values[order], label[order]
        hits, taken = y.cumsum(0), torch.arange(1, len(y) + 1)
        f1 = 2 * hits / (taken + len(positive))
        room = torch.cat([(x[:-1] - x[1:]).abs(), torch.ones(1)])
        for i in range(len(x) - 1):
            if float(room[i]) > 0 and (float(f1[i]), float(room[i])) > best:
                best = float(f1[i]), float(room[i])
                found = Threshold(value=float(x[i] + x[i + 1]) / 2, above=above, f1=float(f1[i]))
    if found is None:
        raise SteersmanError("the two sides read the same number everywhere: no threshold tells them")
    return found


def f1_score(positive: Tensor, negative: Tensor, threshold: Threshold) -> float:
    """F1 of the positive side at a given threshold."""
    inside = [(x > threshold.value) == threshold.above for x in (positive, negative)]
    hits = float(inside[0].sum())
    return 2 * hits / max(1.0, float(inside[0].sum() + inside[1].sum()) + len(positive)) if hits else 0.0


@dataclass(frozen=True, kw_only=True)
class FoundCondition:
    """A layer, a direction and a threshold that tell prompts that should be steered from others."""

    vector: SteeringVector
    """The direction that is read, at its hook point."""
    threshold: Threshold
    """In units of h . v / |v| of the prompt's mean state."""
    heldout_f1: float
    """F1 on the half of the prompts that chose nothing."""
    null_f1: float
    """The same when the labels are permuted and the same search is made: what chance finds."""


def find_condition(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    hooks: HookName | Sequence[HookName] | None = None,
    method: str = "diffmean",
    positions: str = "mean",
    batch_size: int = 16,
    seed: int = 0,
) -> FoundCondition:
    """The condition of CAST (arXiv 2409.05907): layer, threshold and direction by F1.

    Vectors are made from the even prompts of each side, which also choose; the odd ones report. By default the input of
    every block is searched. Raises SteersmanError for fewer than four prompts a side.
    """
    if min(len(positive), len(negative)) < 4:
        raise SteersmanError("a condition needs at least 4 prompts of each side: half of them are held out")
    names = lm.resolve_hooks(hooks if hooks is not None else [f"blocks.{i}.hook_resid_pre" for i in range(lm.n_layers)])

    def search(yes: Sequence[str], no: Sequence[str]) -> FoundCondition:
        v = contrast(
            lm, list(yes[0::2]), list(no[0::2]), hook=names, method=method, positions=positions, diagnostics=False,
            batch_size=batch_size,
        )  # fmt: skip
        rho_yes, rho_no = (projections(lm, list(side), v, positions=positions, batch_size=batch_size)
                           for side in (yes, no))  # fmt: skip
        lines = {hook: best_threshold(rho_yes[hook][0::2], rho_no[hook][0::2]) for hook in names}
        hook = max(names, key=lambda name: lines[name].f1)
        heldout = f1_score(rho_yes[hook][1::2], rho_no[hook][1::2], lines[hook])
        return FoundCondition(vector=v.at(hook), threshold=lines[hook], heldout_f1=heldout, null_f1=0.0)

    found = search(positive, negative)
    both = [*positive, *negative]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [both[i] for i in order]
    null = search(mixed[: len(positive)], mixed[len(positive) :]).heldout_f1
    return FoundCondition(vector=found.vector, threshold=found.threshold, heldout_f1=found.heldout_f1, null_f1=null)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedSides:
    """A logistic probe between two sides and where the sides lie along it, for StTP and StMP (arXiv 2604.08169)."""

    direction: SteeringVector
    """w / |w|, at its hook point."""
    middle: float
    """m = -b / |w|: where the probe decides, in units of the projection."""
    mean: float
    """Mean projection of the positive side."""
    sd: float
    """Its standard deviation."""
    negative_mean: float
    """Mean projection of the negative side."""
    tokens_below: float | None
    """Share of the positive side's TOKENS that lie below m. The probe is fitted on means of texts, and tokens scatter
    more than their mean: all of those are moved too."""


def probe_sides(
    lm: LanguageModel,
    positive: ExamplesLike,
    negative: ExamplesLike,
    *,
    hook: HookName,
    positions: str = "mean",
    l2: float = 0.01,
    batch_size: int = 16,
) -> ProbedSides:
    """Fit the probe on one state a text (by default their mean; "answer" for the mean over a response's tokens)."""
    name = lm.resolve_hook(hook)
    yes, no = (
        states_of(lm, side, [name], positions=positions, batch_size=batch_size)[name] for side in (positive, negative)
    )
    x, label = torch.cat([yes, no]), torch.cat([torch.ones(len(yes)), torch.zeros(len(no))]).bool()
    fitted = fit_logistic(lambda: [(x[:, None], label)], l2=l2)
    w, b = fitted.weight[0], float(fitted.bias[0])
    length = float(w.norm())
    unit = w / length
    rho, other = yes.double() @ unit, no.double() @ unit
    tokens = states_of(lm, positive, [name], positions="all", batch_size=batch_size)[name].double() @ unit
    middle = -b / length
    about: dict[str, Any] = {"source": "arXiv 2604.08169", "positions": positions, "l2": l2}
    return ProbedSides(
        direction=SteeringVector.of(unit.float(), hook_name=name, model_name=lm.name, method="probe", metadata=about),
        middle=middle,
        mean=float(rho.mean()),
        sd=float(rho.std()) if len(rho) > 1 else 0.0,
        negative_mean=float(other.mean()),
        tokens_below=float((tokens < middle).double().mean()),
    )
