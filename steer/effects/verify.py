"""Does a vector do what its effect map says? Steer with it, measure its effect afresh, compare (2411.02193, sec. 4).

With y the measured effect and t the target weights, the specificity is t . y / (|t| |y|): for one target y_j / |y|, the
fraction of all that happened which was asked for. 1 would be the target and nothing else.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_fits, check_sae_fits
from steersman.sae import SAE
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.map import EffectMap, Targets
from steersman.steer.effects.rollouts import RolloutMeter
from steersman.steer.effects.scales import ScaleRule
from steersman.steer.vectors.vector import VectorLike


class FeatureEffect(NamedTuple):
    """What happened to one feature."""

    feature: int
    """Its id."""
    predicted: float
    """Effect that the map predicts: a difference of average activations."""
    measured: float
    """Effect that was measured."""
    standard_error: float
    """Of the measured effect, the unsteered average's error included."""
    label: str = ""
    """What the SAE's labels say of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """Predicted against measured effects of one vector."""

    targets: list[FeatureEffect]
    """The target features, largest weight first; empty when none were named."""
    side_effects: list[FeatureEffect]
    """The other features that moved most, largest first."""
    predicted: Tensor
    """[L] fp32."""
    measured: Tensor
    """[L] fp32."""
    standard_error: Tensor
    """[L] fp32."""
    scale: float
    """The norm of what was added."""
    achieved: float
    """What the map's scale rule measured there; NaN where a scale was given or the rule measures nothing."""
    reached: bool
    """Whether the rule's target was reached."""
    specificity: float
    """t . y / (|t| |y|) of the measured effect; NaN without targets."""
    predicted_specificity: float
    """The same of the predicted effect."""
    correlation: float
    """Correlation of predicted and measured effect over all features."""
    slope: float
    """Least-squares slope of the measured on the predicted effect: below 1 where the vector reaches the rule's target
    at a smaller scale than the map's vectors did, or its effect saturates."""
    r2: float
    """1 - |measured - predicted|^2 / |measured - mean|^2 over all features."""
    rollouts: int
    """Texts that were measured."""

    def to_text(self) -> str:
        """The comparison as a table."""
        lines = [f"scale {self.scale:.4g}, {self.rollouts} texts" + ("" if self.reached else "; target NOT reached")]
        lines.append(
            f"predicted against measured: correlation {self.correlation:.3f}, slope {self.slope:.3f}, R2 {self.r2:.3f}"
        )
        if self.targets:
            lines.append(f"specificity: measured {self.specificity:.3f}, predicted {self.predicted_specificity:.3f}")
        lines.append(f"{'':<12} {'feature':>8} {'predicted':>10} {'measured':>10} {'+-':>8}")
        for kind, rows in (("target", self.targets), ("side effect", self.side_effects)):
            for r in rows:
                line = f"{kind:<12} {r.feature:>8} {r.predicted:>10.4f} {r.measured:>10.4f} {r.standard_error:>8.4f}"
                lines.append(f"{line}  {r.label}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything but the whole effect vectors, as one JSON object; what is not a number is null."""
        fields = (
            "scale",
            "achieved",
            "reached",
            "specificity",
            "predicted_specificity",
            "correlation",
            "slope",
            "r2",
            "rollouts",
        )
        data: dict[str, Any] = {name: getattr(self, name) for name in fields}
        data = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
        data |= {name: [row._asdict() for row in getattr(self, name)] for name in ("targets", "side_effects")}
        return json.dumps(data, indent=2)


def verify_effect(
    effect_map: EffectMap,
    lm: LanguageModel,
    sae: SAE,
    vector: Tensor | VectorLike,
    targets: Targets | None = None,
    *,
    texts: Sequence[str] = (),
    scale: float | None = None,
    rollouts: int | None = None,
    seed: int = 1,
    side_effects: int = 10,
    batch_rows: int = 1024,
) -> Verification:
    """Steer with `vector` as the map's vectors were steered, on texts of their own, and compare with the prediction.

    The vector of a map of gradients is steered with at the map's `median_scale`.

    `targets` as for `EffectMap.solve`; None takes those that a solved vector carries. `scale` None finds the scale by
    the map's own rule, on the held-out `texts` where the rule needs them. `rollouts` None takes four times as many as
    the map's vectors had. Raises SteersmanError for a vector, SAE or model that is not the map's.
    """
    effect_map.check_sae(sae)
    check_sae_fits(lm, sae)
    place = {"hook_name": effect_map.hook_name, "width": effect_map.d_in}
    check_fits(lm, what="this effect map", model_name=effect_map.model_name, **place)
    x = effect_map.direction(vector)
    config = check_verifiable(effect_map, texts, scale=scale, rollouts=rollouts, batch_rows=batch_rows)
    rollouts = 4 * config.rollouts if rollouts is None else rollouts
    t = _targets(effect_map, vector, targets)
    achieved, reached = math.nan, True
    if scale is None:
        rule = ScaleRule(lm, effect_map.hook_name, config, effect_map.baseline.median_norm, texts)
        scales = rule.find(x[None])
        scale, achieved, reached = float(scales.scale[0]), float(scales.achieved[0]), bool(scales.reached[0])
    meter = RolloutMeter(lm, sae, effect_map.hook_name, config)
    averages = meter.measure(x[None], torch.tensor([scale]), [0], rollouts, seed=config.seed + 0x5EED + seed)
    base = effect_map.baseline
    measured = averages.mean[0] - base.mean.double()
    error = (averages.standard_error[0].square() + base.standard_error.double().square()).sqrt()
    predicted = effect_map.predict(x).double()
    rest = measured.abs().clone()
    rest[t != 0] = -1
    others = rest.topk(min(side_effects, len(rest))).indices.tolist()
    named = sorted(t.nonzero()[:, 0].tolist(), key=lambda j: -abs(float(t[j])))

    def row(j: int) -> FeatureEffect:
        return FeatureEffect(j, float(predicted[j]), float(measured[j]), float(error[j]), sae.labels.text(j))

    spread = (measured - measured.mean()).square().sum()
    return Verification(
        targets=[row(j) for j in named],
        side_effects=[row(j) for j in others if rest[j] >= 0],
        predicted=predicted.float(),
        measured=measured.float(),
        standard_error=error.float(),
        scale=scale,
        achieved=achieved,
        reached=reached,
        specificity=_cosine(t, measured),
        predicted_specificity=_cosine(t, predicted),
        correlation=_cosine(measured - measured.mean(), predicted - predicted.mean()),
        slope=float((measured @ predicted) / predicted.square().sum().clamp_min(1e-300)),
        r2=float(1 - (measured - predicted).square().sum() / spread) if float(spread) > 0 else math.nan,
        rollouts=rollouts,
    )


def check_verifiable(
    effect_map: EffectMap,
    texts: Sequence[str],
    *,
    scale: float | None = None,
    rollouts: int | None = None,
    batch_rows: int = 1024,
) -> EffectsConfig:
    """The settings that the map's vectors were measured with. Raises SteersmanError for what `verify_effect` cannot do,
    as far as this can be known before a model is loaded."""
    settings = dict(effect_map.provenance.get("effects", {}))
    if "prompts" not in settings:
        raise SteersmanError("this effect map was not measured by rollouts: there is no setting to measure under")
    if settings.get("vectors") == "gradients":  # no scale was looked for: the map predicts at the one that it carries
        settings |= {"vectors": "random", "scale_rule": "fixed", "scale_target": effect_map.median_scale}
    elif settings.get("vectors") == "given":
        settings |= {"vectors": "random"}
    config = EffectsConfig.from_identity(settings, batch_rows=batch_rows)
    if rollouts is not None and rollouts < 2:
        raise SteersmanError(f"rollouts must be at least 2, got {rollouts}")
    if scale is not None and not math.isfinite(scale):
        raise SteersmanError(f"the scale must be a finite number, got {scale}")
    if scale is None and config.needs_texts and not any(text.strip() for text in texts):
        raise SteersmanError(
            f"the map's scale rule {config.scale_rule!r} measures on held-out text: give texts, or a scale"
        )
    return config


def _targets(effect_map: EffectMap, vector: Tensor | VectorLike, targets: Targets | None) -> Tensor:
    known = getattr(vector, "metadata", {})
    if targets is None and "targets_of" not in known:
        targets = {int(j): w for j, w in known.get("targets", {}).items()}
    if not isinstance(targets, Tensor | int) and not targets:
        return torch.zeros(effect_map.d_sae, dtype=torch.float64)
    return effect_map.targets(targets, min_signal=-math.inf)


def _cosine(a: Tensor, b: Tensor) -> float:
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else math.nan
