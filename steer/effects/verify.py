"""Does a vector do what its effect map says? Steer with it, measure its effect afresh, compare (2411.02193, sec. 4).

With y the measured effect and t the target weights, the specificity is t . y / (|t| |y|): for one target y_j / |y|, the
share of all that happened which was asked for. 1 would be the target and nothing else.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_fits, check_sae_fits
from steersman.sae import SAE
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.rollouts import RolloutMeter
from steersman.steer.effects.scales import ScaleRule
from steersman.steer.effects.targets import Targets
from steersman.steer.effects.verification import FeatureEffect, Verification
from steersman.steer.vectors.vector import VectorLike


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

    `targets` as for `EffectMap.solve`; None takes those that a solved vector carries. `scale` None finds the scale by
    the map's own rule, on the held-out `texts` where the rule needs them. `rollouts` None takes four times as many as
    the map's vectors had. Raises SteersmanError for a vector, SAE or model that is not the map's.
    """
    effect_map.check_sae(sae)
    check_sae_fits(lm, sae)
    place = {"hook_name": effect_map.hook_name, "width": effect_map.d_in}
    check_fits(lm, what="this effect map", model_name=effect_map.model_name, **place)
    settings = dict(effect_map.provenance.get("effects", {}))
    if "prompts" not in settings:
        raise SteersmanError("this effect map was not measured by rollouts: there is no setting to measure under")
    settings |= {"vectors": "random"} if settings["vectors"] == "given" else {}
    config = EffectsConfig.from_identity(settings, batch_rows=batch_rows)
    rollouts = 4 * config.rollouts if rollouts is None else rollouts
    if rollouts < 2:
        raise SteersmanError(f"rollouts must be at least 2, got {rollouts}")
    x = effect_map.direction(vector)
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
        return FeatureEffect(j, float(predicted[j]), float(measured[j]), float(error[j]))

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
