"""How strong a vector may be: the scale at which steering costs a given amount.

Budgets, all measured on the same texts with the vector applied in the same scope:

- `kl`: mean over the predicted tokens of KL(steered || base), in nats, teacher-forced;
- `loss`: rise of the mean negative log-likelihood of the texts' tokens, in nats;
- `norm`: |scale v| as a share of the median norm of the residual stream at its hook point.

The search brackets and narrows on the logarithms of scale and cost, where a cost is nearly a straight line (KL grows as
the square of a small scale). Every figure it returns was measured: nothing is extrapolated. The loss budget is the rule
of SAE-TS (arXiv 2411.02193, section 3.1).
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel, TokenBatch
from steersman.steer.measures import token_kl, token_nll
from steersman.steer.steerer import Steerer
from steersman.steer.vectors.vector import SteeringVector

log = logging.getLogger(__name__)

MAX_EVALUATIONS = 8
TOLERANCE = 0.05
"""Share of the budget by which a result may miss it."""
WIDEST = 3.0
"""Largest factor between two scales tried one after the other while the budget is not bracketed."""
START_NORM, LOW_NORM, HIGH_NORM = 0.5, 1e-3, 8.0
"""|scale v| to start from, and the least and greatest tried, as shares of the median norm of the residual stream."""
OWN_TEXTS, OWN_TOKENS = 16, 48
"""Without texts the model writes its own: how many, and how many tokens each."""
OPENINGS = ("The", "I", "In", "It", "We", "When", "My", "There")
"""What they start from where the model's family has no BOS token."""


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """What a search for a scale found. Every number in it was measured."""

    scale: float
    """The scale whose cost came closest to the budget; where the budget is out of reach, the scale at the limit."""
    value: float
    """The cost measured at that scale."""
    target: float
    """The budget."""
    converged: bool
    """Whether the cost is within the tolerance of the budget."""
    reason: str
    """`converged`; `unreachable`: below the budget even at the largest scale allowed; `exceeded`: above it even at the
    smallest; `evaluations`: bracketed, but not within the tolerance after the evaluations allowed."""
    evaluations: list[tuple[float, float]]
    """(scale, cost) in the order they were measured."""


def search_scale(
    cost: Callable[[float], float],
    target: float,
    *,
    start: float,
    low: float,
    high: float,
    max_evaluations: int = MAX_EVALUATIONS,
    tolerance: float = TOLERANCE,
) -> ScaleSearch:
    """The scale in [low, high] whose cost is `target`, for a cost that rises with the scale from 0.

    Works on x = log scale and y = log(cost / target). While the budget is not bracketed it follows the slope of the
    last two points (2 at first: a small push costs its square), by at most `WIDEST`; once it is, it takes the root of
    the inverse parabola through the three points nearest the budget where that stays near the line between the
    bracket's ends, else the line's. A cost that is not finite counts as above the budget.

    >>> found = search_scale(lambda s: s * s, 4.0, start=1.0, low=0.01, high=100.0)
    >>> found.scale, found.reason, len(found.evaluations)
    (2.0, 'converged', 2)
    """
    if not (target > 0 and math.isfinite(target)):
        raise SteersmanError(f"a budget must be a number above 0, got {target}")
    if not 0 < low <= high:
        raise SteersmanError(f"scales must satisfy 0 < lowest <= highest, got {low} and {high}")
    points: list[tuple[float, float]] = []
    scale, reason = min(max(start, low), high), "evaluations"
    while len(points) < max_evaluations and reason == "evaluations":
        value = cost(scale)
        points.append((scale, value))
        if math.isfinite(value) and abs(value - target) <= tolerance * target:
            reason = "converged"
        elif value < target and all(v < target for _, v in points) and scale >= high:
            reason = "unreachable"
        elif not value < target and not any(v < target for _, v in points) and scale <= low:
            reason = "exceeded"
        else:
            scale = min(max(_next(points, target), low), high)
    scale, value = points[-1]
    if reason == "evaluations":
        scale, value = min(points, key=lambda p: abs(_height(p[1], target)))
    return ScaleSearch(
        scale=scale, value=value, target=target, converged=reason == "converged", reason=reason, evaluations=points
    )


FLOOR = 1e-30  # stands in for a cost of 0 or below, which has no logarithm


def _height(value: float, target: float) -> float:
    """y = log(cost / target); a cost that is not finite is far above."""
    return math.log(max(value, FLOOR) / target) if math.isfinite(value) else 1e3


def _next(points: Sequence[tuple[float, float]], target: float) -> float:
    """The scale to try after `points`."""
    track = [(math.log(s), _height(v, target)) for s, v in points]
    under, over = [p for p in track if p[1] < 0], [p for p in track if p[1] >= 0]
    if under and over:
        return math.exp(_inside(track, max(under), min(over)))
    x, y = track[-1]
    slope, margin = 2.0, 1.0
    if len(track) > 1 and track[-2][0] != x:
        slope = min(max((y - track[-2][1]) / (x - track[-2][0]), 0.5), 4.0)
        margin = 1.1  # a little further, so that it brackets
    widest = math.log(WIDEST)
    return math.exp(x + min(max(-y / slope * margin, -widest), widest))


def _inside(track: Sequence[tuple[float, float]], below: tuple[float, float], above: tuple[float, float]) -> float:
    """The next x between the ends of the bracket."""
    (a, low), (b, high) = below, above
    width, middle = b - a, (a + b) / 2
    if high >= 1e3 or width <= 0:
        return middle  # nothing can be read off a cost that is not finite, or off one that falls with the scale
    line = a - width * low / (high - low)
    guess = line
    near = sorted(sorted(track, key=lambda p: abs(p[1]))[:3])
    if len(near) == 3 and near[0][1] < near[1][1] < near[2][1]:
        (x1, y1), (x2, y2), (x3, y3) = near  # Lagrange's formula for x at y = 0
        root = x1 * y2 * y3 / ((y1 - y2) * (y1 - y3)) + x2 * y1 * y3 / ((y2 - y1) * (y2 - y3))
        root += x3 * y1 * y2 / ((y3 - y1) * (y3 - y2))
        if abs(root - line) <= width / 4 and a + 0.02 * width < root < b - 0.02 * width:
            guess = root
    if len(track) > 5:
        guess = (guess + middle) / 2  # slow so far: the curve is not what it seems, so halve as well
    return min(max(guess, a + 0.02 * width), b - 0.02 * width)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """A budget (exactly one of the three) and how it is measured."""

    target_kl: float | None = None
    """Mean KL(steered || base) per token, in nats."""
    target_loss: float | None = None
    """Rise of the loss on the texts, in nats per token."""
    target_norm: float | None = None
    """|scale v| as a share of the median norm of the residual stream."""
    scope: str = "all"
    """Tokens to steer: all, prompt, generation, last_prompt, a window such as 2:10, or tokens:15,27."""
    batch_size: int = 16
    """Texts per forward pass."""
    max_length: int = 128
    """Texts are cut to this many tokens."""
    max_evaluations: int = MAX_EVALUATIONS
    """Scales to try at most."""
    tolerance: float = TOLERANCE
    """Share of the budget by which the result may miss it."""
    seed: int = 0
    """Seed of the texts that the model writes itself where none are given."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibrated vector and how it was found."""

    vector: SteeringVector
    """The vector times the scale: steering with it at scale 1 costs what was measured."""
    budget: Literal["kl", "loss", "norm"]
    """What was budgeted."""
    search: ScaleSearch
    """The search, in multiples of the vector that was given."""
    n_tokens: int
    """Predicted tokens that each evaluation is a mean over; 0 for a norm."""

    def __str__(self) -> str:
        found = self.search
        unit = "of the median norm" if self.budget == "norm" else "nats per token"
        state = "converged" if found.converged else f"NOT converged ({found.reason})"
        return (
            f"{self.budget} {found.value:.4g} {unit} at scale {found.scale:.4g} (asked {found.target:.4g}): {state} in "
            f"{len(found.evaluations)} evaluations"
        )


def calibrate(
    v: SteeringVector,
    st: Steerer | LanguageModel,
    *,
    texts: Sequence[str] | None = None,
    config: CalibrateConfig | None = None,
    **options: Any,
) -> Calibration:
    """The scale at which steering by `v` meets a budget: `calibrate(v, st, target_kl=0.5)`.

    Args:
        v: the vector; its sign is kept.
        st: the steerer (or the model) it is for.
        texts: held-out texts to measure on. Without them the model writes its own, seeded, unsteered: 16 of 48 tokens.
        config: the settings; or give them by name.

    A budget that cannot be met is no error here: see `converged` and `reason` of the search. Raises SteersmanError for
    none or several budgets, a zero vector, and what `Steerer.vector` refuses.
    """
    steerer = st if isinstance(st, Steerer) else Steerer(st)
    lm = steerer.lm
    config = _settings(config, options)
    budget, target = _budget(config)
    v.check_not_zero("a scale for it")
    steerer.vector(v, scope=config.scope)  # refuses what does not fit before anything is run
    meter = CostMeter(lm, texts, config)
    share = _norm_share(v, meter.norms(v.hook_names))
    if budget == "norm":
        scale = target / share
        search = ScaleSearch(
            scale=scale, value=scale * share, target=target, converged=True, reason="converged", evaluations=[]
        )
        n_tokens = 0
    else:
        search = search_scale(
            lambda scale: meter.cost(budget, lambda: steerer.vector(v, scale=scale, scope=config.scope)),
            target,
            start=START_NORM / share,
            low=LOW_NORM / share,
            high=HIGH_NORM / share,
            max_evaluations=config.max_evaluations,
            tolerance=config.tolerance,
        )
        n_tokens = meter.n_tokens
    record = {"budget": budget, "scope": config.scope, "n_tokens": n_tokens, **dataclasses.asdict(search)}
    scaled = dataclasses.replace(v * search.scale, metadata={**v.metadata, "calibration": record})
    found = Calibration(vector=scaled, budget=budget, search=search, n_tokens=n_tokens)
    if not search.converged:
        log.warning("calibration: %s", found)
    return found


def refuse_unmet(found: Calibration) -> SteeringVector:
    """The calibrated vector. Raises SteersmanError when the budget is out of reach at every scale allowed."""
    s = found.search
    if s.reason == "unreachable":
        raise SteersmanError(
            f"the {found.budget} budget of {s.target:g} is not reached: at scale {s.scale:.4g}, the largest allowed "
            f"({HIGH_NORM:g} times the median norm of the residual stream), it is {s.value:.4g}; ask for less, "
            "or steer in a wider scope"
        )
    if s.reason == "exceeded":
        raise SteersmanError(
            f"the {found.budget} budget of {s.target:g} is exceeded at every scale: at scale {s.scale:.4g}, the "
            f"smallest tried ({LOW_NORM:g} median norms of the residual stream), it is {s.value:.4g}; ask for more"
        )
    return found.vector


def _settings(config: CalibrateConfig | None, options: Mapping[str, Any]) -> CalibrateConfig:
    known = {f.name for f in dataclasses.fields(CalibrateConfig)}
    for name in options:
        if name not in known:
            raise SteersmanError(f"no setting {name!r} of a calibration: there are {', '.join(sorted(known))}")
    return dataclasses.replace(config or CalibrateConfig(), **options)


def _budget(config: CalibrateConfig) -> tuple[Literal["kl", "loss", "norm"], float]:
    given = {"kl": config.target_kl, "loss": config.target_loss, "norm": config.target_norm}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        raise SteersmanError("give exactly one budget: target_kl, target_loss or target_norm")
    name, value = next(iter(asked.items()))
    if not (value > 0 and math.isfinite(value)):
        raise SteersmanError(f"target_{name} must be a number above 0, got {value}")
    if config.max_evaluations < 1 or not 0 < config.tolerance < 1:
        raise SteersmanError("max_evaluations must be at least 1, and the tolerance between 0 and 1")
    return name, float(value)  # pyright: ignore[reportReturnType]


def _norm_share(v: SteeringVector, norms: Mapping[str, float]) -> float:
    """|v| in median norms: the largest over hook points, and over positions where there are several."""
    return max(float(d.norm(dim=-1).max()) / norms[hook] for hook, d in v.directions.items())


class CostMeter:
    """Texts and the unsteered model's predictions on them, to measure many ways of steering against."""

    def __init__(self, lm: LanguageModel, texts: Sequence[str] | None, config: CalibrateConfig) -> None:
        self.lm = lm
        if texts is None:
            self.batches = _batches_of_tokens(own_texts(lm, config.seed), config.batch_size)
        else:
            texts = [texts] if isinstance(texts, str) else list(texts)
            empty = next((i for i, text in enumerate(texts) if not text.strip()), None)
            if not texts or empty is not None:
                raise SteersmanError("there are no texts to measure on" if not texts else f"text {empty} is empty")
            length = min(config.max_length, lm.context_length or config.max_length)
            parts = [texts[i : i + config.batch_size] for i in range(0, len(texts), config.batch_size)]
            self.batches = [lm.encode(part, max_length=length) for part in parts]
        self.n_tokens = sum(int(b.attention_mask[:, 1:].sum()) for b in self.batches)
        if self.n_tokens == 0:
            raise SteersmanError("the texts hold no token to predict: they must be longer than one token")
        self._base: list[Tensor] | None = None

    def norms(self, hooks: Sequence[str]) -> dict[str, float]:
        """Median norm of the residual stream at each hook point, without padding and BOS."""
        return _median_norms(self.lm, self.batches, hooks)

    def cost(self, budget: str, steering: Callable[[], Any]) -> float:
        """KL or rise of the loss, in nats per predicted token, of what `steering()` opens."""
        if self._base is None:
            # Kept in the model's own dtype: one [B, S, V] per batch of texts.
            self._base = [self.lm.logits(b.input_ids, b.attention_mask) for b in self.batches]
        total = 0.0
        for batch, base in zip(self.batches, self._base):
            with steering():
                steered = self.lm.logits(batch.input_ids, batch.attention_mask)
            chosen = batch.attention_mask[:, 1:].bool()
            if budget == "kl":
                each = token_kl(steered[:, :-1], base[:, :-1])
            else:
                each = token_nll(steered, batch.input_ids) - token_nll(base, batch.input_ids)
            total += float(each[chosen].double().sum())
        return total / self.n_tokens


def own_texts(lm: LanguageModel, seed: int = 0) -> TokenBatch:
    """Texts that the unsteered model writes at temperature 1, from its BOS or from a few openings."""
    if lm.bos_token_id is None:
        prompts = [OPENINGS[i % len(OPENINGS)] for i in range(OWN_TEXTS)]
    else:
        prompts = [""] * OWN_TEXTS
    tokens = OWN_TOKENS if lm.context_length is None else min(OWN_TOKENS, lm.context_length - 8)
    made = lm.generate(prompts, max_new_tokens=max(1, tokens), do_sample=True, seed=seed)
    return TokenBatch(input_ids=made.tokens, attention_mask=made.attention_mask)


def _batches_of_tokens(whole: TokenBatch, size: int) -> list[TokenBatch]:
    ids, mask = whole.input_ids.split(size), whole.attention_mask.split(size)
    return [TokenBatch(input_ids=i, attention_mask=m) for i, m in zip(ids, mask)]


def median_norms(
    lm: LanguageModel, texts: Sequence[str], hooks: Sequence[str], *, batch_size: int = 16, max_length: int = 128
) -> dict[str, float]:
    """Median |h| at each hook point over the tokens of `texts`, padding and BOS left out."""
    length = min(max_length, lm.context_length or max_length)
    parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return _median_norms(lm, [lm.encode(part, max_length=length) for part in parts], hooks)


def _median_norms(lm: LanguageModel, batches: Sequence[TokenBatch], hooks: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for batch in batches:
        states = lm.capture(batch.input_ids, batch.attention_mask, hooks=hooks)
        real = batch.attention_mask.bool()
        if lm.bos_token_id is not None:
            real = real & (batch.input_ids != lm.bos_token_id)
        for hook, h in states.items():
            found[hook].append(h.float().norm(dim=-1)[real.to(h.device)].cpu())
    norms = {hook: float(torch.cat(parts).median()) for hook, parts in found.items()}
    for hook, norm in norms.items():
        if not (math.isfinite(norm) and norm > 0):
            raise SteersmanError(f"the states of {lm.name} at {hook} have a median norm of {norm}")
    return norms
