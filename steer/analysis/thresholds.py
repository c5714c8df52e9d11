"""Where to draw a line along a direction: percentiles for caps, thresholds for conditions, probes with their sides.

Shape letters: n texts or tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import HookName
from steersman.steer.edits.conditions import Condition, Prompt
from steersman.steer.edits.direction import DirectionEdit
from steersman.steer.edits.reads import Probe, Projection
from steersman.steer.methods.examples import Examples, ExamplesLike, as_examples
from steersman.steer.methods.logistic import fit_logistic
from steersman.steer.methods.reading import Reader
from steersman.steer.vectors.vector import SteeringVector

Pool = Literal["mean", "last"]


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


def best_threshold(positive: Tensor, negative: Tensor, *, only_above: bool = False) -> Threshold:
    """The line with the largest F1 of the positive side, in either direction unless `only_above`; of equal ones the one
    with most room.

    >>> best_threshold(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
    Threshold(value=2.0, above=True, f1=1.0)
    """
    values = torch.cat([positive, negative]).double()
    label = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    found: Threshold | None = None
    best = (-1.0, -1.0)
    for above in (True,) if only_above else (True, False):
        order = values.argsort(descending=above, stable=True)
        x, y = values[order], label[order]
        room = (x[:-1] - x[1:]).abs()
        f1 = 2 * y.cumsum(0)[:-1] / (torch.arange(1, len(y)) + len(positive))
        f1 = torch.where(room > 0, f1, -1.0)
        widest = torch.where(f1 == f1.max(), room, -1.0) if len(room) else room
        i = int((widest == widest.max()).nonzero()[0]) if len(room) else -1
        if i >= 0 and float(room[i]) > 0 and (float(f1[i]), float(room[i])) > best:
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
    """In units of h . v / |v| of the prompt's mean state (or its last)."""
    heldout_f1: float
    """F1 on the half of the prompts that chose nothing."""
    null_f1: float
    """What chance finds: the 95th percentile of the same when the labels are permuted and the same search is made."""
    layers: dict[str, float]
    """Hook point -> the best F1 there, on the half that chose."""
    pool: Pool = "mean"
    """Which of a prompt's states is read."""

    def gate(self, prompt: Prompt = "later_layers") -> Condition:
        """The gate of the rows that meet it; `prompt` says what becomes of the prompt: see `Condition`."""
        read, line = Projection(self.vector), self.threshold
        return Condition(self.vector.hook_name, read, line.value, above=line.above, pool=self.pool, prompt=prompt)


def find_condition(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    hooks: HookName | Sequence[HookName] | None = None,
    method: Literal["diffmean", "pca", "probe"] = "diffmean",
    positions: Pool = "mean",
    batch_size: int = 16,
    n_null: int = 20,
    seed: int = 0,
) -> FoundCondition:
    """The condition of CAST (arXiv 2409.05907): layer, threshold and direction by F1.

    Directions are made from the even prompts of each side, which also choose; the odd ones report. `method` is the
    difference of the means, CAST's first principal component of the states of pairs about their middles (prompt i of
    either side; the sign is that of most pairs), or the weight of a logistic regression. By default the input of every
    block is searched. Raises SteersmanError for fewer than four prompts a side.
    """
    if min(len(positive), len(negative)) < 4:
        raise SteersmanError("a condition needs at least 4 prompts of each side: half of them are held out")
    if positions not in ("mean", "last"):
        raise SteersmanError(f"a condition reads the mean state of a prompt or its last, not {positions!r}")
    names = lm.resolve_hooks(hooks if hooks is not None else [f"blocks.{i}.hook_resid_pre" for i in range(lm.n_layers)])
    states = states_of(lm, [*positive, *negative], names, positions=positions, batch_size=batch_size)
    sides = torch.arange(len(positive) + len(negative)) < len(positive)
    chooses = torch.cat([torch.arange(len(side)) % 2 == 0 for side in (positive, negative)])

    def search(labels: Tensor) -> tuple[dict[str, Threshold], str, Tensor, float]:
        """The best line at each hook point, the best hook point, the direction there, and its F1 on the other half."""
        lines: dict[str, Threshold] = {}
        found: dict[str, Tensor] = {}
        for hook, x in states.items():
            mine = x[chooses]
            found[hook] = v = _direction(method, mine[labels[chooses]], mine[~labels[chooses]], hook)
            rho = mine @ v
            lines[hook] = best_threshold(rho[labels[chooses]], rho[~labels[chooses]])
        hook = max(names, key=lambda name: lines[name].f1)
        rho, other = states[hook][~chooses] @ found[hook], labels[~chooses]
        return lines, hook, found[hook], f1_score(rho[other], rho[~other], lines[hook])

    lines, hook, v, heldout = search(sides)
    generator = torch.Generator().manual_seed(seed)
    nulls = [search(sides[torch.randperm(len(sides), generator=generator)])[3] for _ in range(max(1, n_null))]
    about = {"source": "arXiv 2409.05907", "positions": positions}
    return FoundCondition(
        vector=SteeringVector.of(v, hook_name=hook, model_name=lm.name, method=method, metadata=about),
        threshold=lines[hook],
        heldout_f1=heldout,
        null_f1=float(torch.tensor(nulls, dtype=torch.float64).quantile(0.95)),
        layers={name: line.f1 for name, line in lines.items()},
        pool=positions,
    )


def _direction(method: str, yes: Tensor, no: Tensor, hook: str) -> Tensor:
    """[D] fp32 of unit length, from states of the two sides [n, D]."""
    difference = yes.double().mean(0) - no.double().mean(0)
    if method == "diffmean":
        v = difference
    elif method == "pca":
        n = min(len(yes), len(no))
        pairs = yes[:n].double() - no[:n].double()  # a pair centred on its middle is half of this, with either sign
        v = torch.linalg.svd(pairs, full_matrices=False).Vh[0]
        v = v if int((pairs @ v > 0).sum()) * 2 >= n else -v
    elif method == "probe":
        v = _probe(yes, no, l2=0.1)[0]
    else:
        raise SteersmanError(f"unknown method {method!r} of a condition: use diffmean, pca or probe")
    if not float(v.norm()) > 0:
        raise SteersmanError(f"both sides have the same states at {hook}: nothing there can tell them apart")
    return (v / v.norm()).float()


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedSides:
    """A logistic probe between two sides and where the sides lie along it, for StTP and StMP (arXiv 2604.08169)."""

    direction: SteeringVector
    """w / |w|, at its hook point."""
    middle: float
    """m = -b / |w|: where the probe decides, in units of the projection."""
    steepness: float
    """|w|: the probe's logit is steepness (projection - middle)."""
    mean: float
    """Mean projection of the positive side."""
    sd: float
    """Its standard deviation."""
    negative_mean: float
    """Mean projection of the negative side."""
    tokens_below: float | None
    """Share of the positive side's TOKENS that lie below m. The probe is fitted on means of texts, and tokens scatter
    more than their mean: all of those are moved too."""
    accuracy: float
    """Share of the texts on their own side of the middle, each by the probe of the half it does not belong to."""
    null_accuracy: float
    """The same with the labels permuted."""

    @property
    def probe(self) -> Probe:
        """The probe, to read or gate by."""
        v = self.direction
        weight, bias = self.steepness * v.vector, -self.steepness * self.middle
        return Probe(weight, bias, model_name=v.model_name, hook_name=v.hook_name)

    def lifting(self, strength: float = 0.0) -> DirectionEdit:
        """StTP: what lies below the middle goes to mean + strength sd of the positive side. It jumps at the middle."""
        target = self.mean + strength * self.sd
        return DirectionEdit(self.direction, rule="set_if_below", value=target, threshold=self.middle)

    def mirroring(self, strength: float = 1.0) -> DirectionEdit:
        """StMP: what lies below the middle goes to its other side, `strength` times as far; 1/2 lands on it."""
        return DirectionEdit(self.direction, rule="mirror", value=strength, threshold=self.middle)


def probe_sides(
    lm: LanguageModel,
    positive: ExamplesLike,
    negative: ExamplesLike,
    *,
    hook: HookName,
    positions: str = "mean",
    l2: float = 0.01,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbedSides:
    """Fit the probe on one state a text (by default their mean; "answer" for the mean over a response's tokens).

    Features are standardised one by one for the fit, and the probe is folded back to the states as they are. The edits
    are meant for all positions, the prompt among them: on the response alone they have about half the effect.
    """
    name = lm.resolve_hook(hook)
    yes, no = (
        states_of(lm, side, [name], positions=positions, batch_size=batch_size)[name] for side in (positive, negative)
    )
    w, b = _probe(yes, no, l2)
    length = float(w.norm())
    unit = w / length
    rho, other = yes.double() @ unit, no.double() @ unit
    tokens = states_of(lm, positive, [name], positions="all", batch_size=batch_size)[name].double() @ unit
    middle = -b / length
    about: dict[str, Any] = {"source": "arXiv 2604.08169", "positions": positions, "l2": l2}
    mixed = torch.cat([yes, no])[torch.randperm(len(yes) + len(no), generator=torch.Generator().manual_seed(seed))]
    return ProbedSides(
        direction=SteeringVector.of(unit.float(), hook_name=name, model_name=lm.name, method="probe", metadata=about),
        middle=middle,
        steepness=length,
        mean=float(rho.mean()),
        sd=float(rho.std()) if len(rho) > 1 else 0.0,
        negative_mean=float(other.mean()),
        tokens_below=float((tokens < middle).double().mean()),
        accuracy=_crossed(yes, no, l2),
        null_accuracy=_crossed(mixed[: len(yes)], mixed[len(yes) :], l2),
    )


def _probe(yes: Tensor, no: Tensor, l2: float) -> tuple[Tensor, float]:
    """w [D] float64 and b of a logistic regression on features standardised one by one, for the states as they are."""
    x = torch.cat([yes, no]).double()
    label = torch.arange(len(x)) < len(yes)
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 0, std, 1.0)
    z = ((x - mean) / std)[:, None]
    fitted = fit_logistic(lambda: [(z, label)], l2=l2)
    w = fitted.weight[0] / std
    return w, float(fitted.bias[0] - w @ mean)


def _crossed(yes: Tensor, no: Tensor, l2: float) -> float:
    """Share of the states that the probe of the other half puts on their side; nan for too few to halve."""
    if min(len(yes), len(no)) < 2:
        return float("nan")
    hits = 0
    for half in (0, 1):
        w, b = _probe(yes[half::2], no[half::2], l2)
        for side, sign in ((yes, 1), (no, -1)):
            hits += int((sign * (side[1 - half :: 2].double() @ w + b) > 0).sum())
    return hits / (len(yes) + len(no))
