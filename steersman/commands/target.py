"""`steersman target`."""

import json
import math
from dataclasses import dataclass

from steersman.commands.options import ComputeOptions, LabelOptions, PrintOptions, as_json, on_kernels
from steersman.errors import SteersmanError
from steersman.sae import FeatureLabels
from steersman.sae.feature_labels import named_feature
from steersman.steer import EffectMap, parse_features, read_labels
from steersman.steer.effects.fgaa import fgaa_targets
from steersman.steer.effects.map import WEAK
from steersman.steer.effects.verify import check_verifiable
from steersman.text import read_texts


@dataclass(frozen=True, kw_only=True)
class TargetCommand(ComputeOptions, LabelOptions, PrintOptions):
    """Make the steering vector that raises chosen features and little else, from an effect map (SAE-TS)."""

    effects: str
    """Folder of `steersman effects`, or the file of a map."""
    out: str
    """File for the vector (.safetensors)."""
    feature: tuple[str, ...] = ()
    """Target features: an id, or id=weight; several may be given."""
    positive: str | None = None
    """Instead of features: text that shows what is wanted (with --negative, --model and --sae), as FGAA does."""
    negative: str | None = None
    """Text that does not."""
    n_positive: int = 8
    """Of the text's features, how many that rise are targets."""
    n_negative: int = 0
    """And how many that fall."""
    max_density: float = 0.01
    """Features denser than this are no targets taken from text."""
    ridge: float = math.inf
    """How much of the effects' interplay to leave out: inf is SAE-TS, 0 the pseudo-inverse."""
    metric: bool = False
    """In place of that, the vector that raises the targets most at its KL, from a map measured by gradients."""
    bias_weight: float = 1.0
    """Fraction of the general effect of steering that is worked against."""
    min_signal: float = WEAK
    """Signal against noise that a target must have in the map."""
    rotation: bool = False
    """Rotate the features' decoder rows instead (needs --sae): for features that the map measured badly."""
    verify: bool = False
    """Steer with the vector and compare its effect with the prediction (needs --model and --sae)."""
    text: str | None = None
    """Held-out text for --verify, where the map's scale rule needs it."""
    scale: float | None = None
    """Scale for --verify; found by the map's rule if not given."""
    rollouts: int | None = None
    """Texts for --verify; four times those of a measured vector if not given."""
    model: str | None = None
    """Folder or hub id of the model."""
    sae: str | None = None
    """Folder of the map's SAE."""
    seed: int = 1
    """Seed of the texts for --verify."""


@on_kernels
def run(config: TargetCommand) -> None:
    """`steersman target`."""
    from_texts = config.positive is not None or config.negative is not None
    if from_texts == bool(config.feature):
        raise SteersmanError("name targets with --feature id=weight, or by --positive and --negative text")
    if from_texts and (config.positive is None or config.negative is None):
        raise SteersmanError("targets from text need both --positive and --negative")
    needs_model = config.verify or from_texts
    if needs_model and config.model is None:
        raise SteersmanError(f"--{'verify' if config.verify else 'positive'} needs --model")
    if (needs_model or config.rotation) and config.sae is None:
        raise SteersmanError(
            f"--{'rotation' if config.rotation else 'verify' if config.verify else 'positive'} needs --sae"
        )
    if config.metric and config.rotation:
        raise SteersmanError("give --metric or --rotation: they are two ways to make the vector")
    targets = parse_features(config.feature) if config.feature else {}
    effect_map = EffectMap.load(config.effects)
    if config.metric and effect_map.metric is None:
        raise SteersmanError("this effect map has no metric: it was measured by steering, not by gradients")
    sae = None if config.sae is None else config.load_sae(config.sae, config.labels)
    labels = sae.labels if sae is not None else read_labels(config.labels) if config.labels else FeatureLabels()
    if sae is not None:
        effect_map.check_sae(sae)
    texts = [] if config.text is None else read_texts(config.text, 4096)
    if config.verify:
        check_verifiable(effect_map, texts, scale=config.scale, rollouts=config.rollouts)
    lm = None
    if needs_model:
        lm = config.load_model(str(config.model))
    if from_texts:
        assert lm is not None
        assert sae is not None
        sides = [read_texts(str(source), 4096) for source in (config.positive, config.negative)]
        keep = {name: getattr(config, name) for name in ("max_density", "n_positive", "n_negative")}
        targets = fgaa_targets(lm, sae, sides[0], sides[1], **keep)
        told = ", ".join(f"{j} ({w:+.3f}) {labels.text(j)}".rstrip() for j, w in targets.items())
        config.note(f"targets: {told}")
    if config.rotation:
        assert sae is not None
        vector = effect_map.solve_rotated(targets, sae, min_signal=config.min_signal)
    else:
        settings = {"ridge": config.ridge, "bias_weight": config.bias_weight, "min_signal": config.min_signal}
        vector = effect_map.solve(targets, metric=config.metric, **settings)
    vector.save(config.out)
    predicted = effect_map.predict(vector)
    for j in list(targets)[:8]:
        signal = float(effect_map.signal[j])
        told = f"predicted effect {float(predicted[j]):+.4f}, signal {signal:.1f} x noise"
        config.note(f"{named_feature(j, labels.text(j))}: {told}")
    scale = vector.metadata["median_scale"]
    config.note(f"{config.out}: {vector.method}, unit norm; a scale to start from is {scale:.4g}")
    effects = {
        j: {
            "weight": w,
            "predicted": float(predicted[j]),
            "signal": float(effect_map.signal[j]),
            "label": labels.text(j),
        }
        for j, w in targets.items()
    }
    record = {"out": config.out, "method": vector.method, "targets": effects, "median_scale": scale}
    if config.verify:
        assert lm is not None
        assert sae is not None
        options = {"scale": config.scale, "rollouts": config.rollouts, "seed": config.seed}
        verified = effect_map.verify(lm, sae, vector, targets, texts=texts, **options)
        config.note(verified.to_text())
        record["verified"] = json.loads(verified.to_json())
    if config.json:
        print(as_json(record))
