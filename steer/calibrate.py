"""How strong a vector may be: the scale at which steering costs a given amount.

Budgets, all measured on the same texts with the vector applied in the same scope:

- `kl`: mean over the predicted tokens of KL(steered || base), in nats, teacher-forced;
- `loss`: rise of the mean negative log-likelihood of the texts' tokens, in nats;
- `norm`: |scale v| as a fraction of the median norm of the residual stream at its hook point.

The search is that of `scale_search`: every figure it returns was measured. The loss budget is the rule of SAE-TS (arXiv
2411.02193, section 3.1).
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal

from steersman.config import check_types, merged
from steersman.conversations import Document
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.dose import D, Dosed, as_steerer, scaled, steered
from steersman.steer.measures import CostMeter
from steersman.steer.scale_search import MAX_EVALUATIONS, TOLERANCE, ScaleSearch, search_scale
from steersman.steer.steerer import Steerer
from steersman.steer.vectors.vector import SteeringVector

log = logging.getLogger(__name__)

START_NORM, LOW_NORM, HIGH_NORM = 0.5, 1e-3, 8.0
"""|scale v| to start from, and the least and greatest tried, as fractions of the median norm of the residual stream."""
HIGH_SCALE = 256.0
"""The greatest scale tried of what is no vector, whose size is not known."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """A budget (exactly one of the three) and how it is measured."""

    target_kl: float | None = None
    """Mean KL(steered || base) per token, in nats."""
    target_loss: float | None = None
    """Rise of the loss on the texts, in nats per token."""
    target_norm: float | None = None
    """|scale v| as a fraction of the median norm of the residual stream."""
    scope: str | None = None
    """Tokens to steer: all, prompt, generation, last_prompt, a window such as 2:10, tokens:15,27, or several joined by
    +; by default all, or those that edits of a file are meant for."""
    batch_size: int = 16
    """Texts per forward pass."""
    max_length: int = 128
    """Texts are cut to this many tokens."""
    max_evaluations: int = MAX_EVALUATIONS
    """Scales to try at most."""
    tolerance: float = TOLERANCE
    """Fraction of the budget by which the result may miss it."""
    seed: int = 0
    """Seed of the texts that the model writes itself where none are given."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Calibration(Generic[D]):
    """A calibrated vector, or other way of steering, and how its scale was found."""

    vector: D
    """What was given, times the scale: steering with it at scale 1 costs what was measured."""
    budget: Literal["kl", "loss", "norm"]
    """What was budgeted."""
    search: ScaleSearch
    """The search, in multiples of what was given."""
    n_tokens: int
    """Predicted tokens that each evaluation is a mean over; 0 for a norm."""

    def __str__(self) -> str:
        s = self.search
        unit = "of the median norm" if self.budget == "norm" else "nats per token"
        state = "converged" if s.converged else f"NOT converged ({s.reason})"
        return (
            f"{self.budget} {s.value:.4g} {unit} at scale {s.scale:.4g} (asked {s.target:.4g}): {state} in "
            f"{len(s.evaluations)} evaluations"
        )

    def __repr__(self) -> str:
        return f"Calibration({self})"


def calibrate(
    v: D,
    st: Steerer | LanguageModel,
    *,
    texts: Sequence[Document] | CostMeter | None = None,
    config: CalibrateConfig | None = None,
    **settings: Any,
) -> Calibration[D]:
    """The scale at which steering by `v` meets a budget: `calibrate(v, st, target_kl=0.5)`.

    Args:
        v: a vector, {hook point: edit}, a recipe, or a function from a scale to a context manager; its sign is kept.
        st: the steerer (or the model) it is for.
        texts: held-out texts or conversations to measure on. Without them the model writes its own, seeded, unsteered:
            16 of 48 tokens. Many calibrations on the same texts share a `CostMeter` of them.
        config: the settings; `**settings` are fields of it, over those of `config`.

    A budget that cannot be met is no error here: see `converged` and `reason` of the search. What is no vector has no
    norm: its scales are tried from 1, down to 1/500 and up to 256. Raises SteersmanError for none or several budgets, a
    zero vector, a norm budget for anything else, and what `Steerer.vector` refuses.
    """
    steerer = as_steerer(st)
    config = merged(CalibrateConfig, config, settings)
    budget, target = check_budget(config, v)
    vector = _as_vector(v)
    steered(v, steerer, scope=config.scope)  # refuses what does not fit before anything is run
    given = {"batch_size": config.batch_size, "max_length": config.max_length, "seed": config.seed}
    meter = texts if isinstance(texts, CostMeter) else CostMeter(steerer.lm, texts, **given)
    norm = START_NORM if vector is None else _norm_frac(vector, meter.norms(vector.hook_names))
    if budget == "norm":
        scale = target / norm
        search = ScaleSearch(
            scale=scale, value=scale * norm, target=target, converged=True, reason="converged", evaluations=[]
        )
    else:
        search = search_scale(
            lambda scale: meter.cost(budget, lambda: steered(v, steerer, scale=scale, scope=config.scope)),
            target,
            start=START_NORM / norm,
            low=LOW_NORM / norm,
            high=HIGH_SCALE if vector is None else HIGH_NORM / norm,
            max_evaluations=config.max_evaluations,
            tolerance=config.tolerance,
        )
    n_tokens = 0 if budget == "norm" else meter.n_tokens
    record = {
        "budget": budget,
        "scope": config.scope or getattr(v, "scope", "all"),
        "n_tokens": n_tokens,
        **dataclasses.asdict(search),
    }
    if meter.has_chats:
        record["chat_template"] = steerer.lm.template_digest
    calibration = Calibration(
        vector=scaled(v, search.scale, calibration=record), budget=budget, search=search, n_tokens=n_tokens
    )
    if not search.converged:
        log.warning("calibration: %s", calibration)
    return calibration


def calibrated(v: D, st: Steerer | LanguageModel, *, texts: Sequence[Document] | None = None, **settings: Any) -> D:
    """`v` times the scale at which steering costs a budget, such as `target_kl=0.5` (nats per token).

    Budgets and settings as for `calibrate`, whose record is in a resulting vector's metadata. Raises SteersmanError
    when no scale meets the budget; a search that ran out of evaluations is only logged, and recorded as
    `converged: false`.
    """
    return refuse_unmet(calibrate(v, st, texts=texts, **settings))


def refuse_unmet(calibration: Calibration[D]) -> D:
    """What was calibrated. Raises SteersmanError when the budget is out of reach at every scale allowed."""
    s = calibration.search
    has_norm = _as_vector(calibration.vector) is not None
    if s.reason == "unreachable":
        limit = f" ({HIGH_NORM:g} times the median norm of the residual stream)" if has_norm else ""
        raise SteersmanError(
            f"the {calibration.budget} budget of {s.target:g} is not reached: at scale {s.scale:.4g}, the largest "
            f"allowed{limit}, it is {s.value:.4g}; ask for less, or steer in a wider scope"
        )
    if s.reason == "exceeded":
        limit = f" ({LOW_NORM:g} median norms of the residual stream)" if has_norm else ""
        raise SteersmanError(
            f"the {calibration.budget} budget of {s.target:g} is exceeded at every scale: at scale {s.scale:.4g}, the "
            f"smallest tried{limit}, it is {s.value:.4g}; ask for more"
        )
    return calibration.vector


def _as_vector(what: Dosed) -> SteeringVector | None:
    return what if isinstance(what, SteeringVector) else None


def check_budget(config: CalibrateConfig, v: Dosed) -> tuple[Literal["kl", "loss", "norm"], float]:
    """The budget and its size. Raises SteersmanError for none, several or one that `v` cannot be given."""
    given = {"kl": config.target_kl, "loss": config.target_loss, "norm": config.target_norm}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        raise SteersmanError("give exactly one budget: target_kl, target_loss or target_norm")
    name, value = next(iter(asked.items()))
    if not (value > 0 and math.isfinite(value)):
        raise SteersmanError(f"target_{name} must be a number above 0, got {value}")
    if config.max_evaluations < 1 or not 0 < config.tolerance < 1:
        raise SteersmanError("max_evaluations must be at least 1, and the tolerance between 0 and 1")
    vector = _as_vector(v)
    if vector is not None:
        vector.check_not_zero("a scale for it")
    elif name == "norm":
        raise SteersmanError("target_norm is for vectors: give target_kl or target_loss for any other way of steering")
    return name, float(value)  # pyright: ignore[reportReturnType]


def _norm_frac(v: SteeringVector, norms: Mapping[str, float]) -> float:
    """|v| in median norms: the largest over hook points, and over positions where there are several."""
    return max(float(d.norm(dim=-1).max()) / norms[hook] for hook, d in v.directions.items())
