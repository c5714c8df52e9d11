"""`steersman effects | target`."""

import math
import os
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Literal

from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer.effects.collect import collect_effects
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.fgaa import fgaa_targets
from steersman.steer.effects.map import WEAK, EffectMap
from steersman.steer.effects.map_file import NAME
from steersman.steer.vectors.vector import SteeringVector
from steersman.text import open_text

__all__ = ["EffectsCommand", "TargetCommand"]


@dataclass(frozen=True, kw_only=True)
class EffectsCommand(EffectsConfig):
    """Measure what many steering vectors do to an SAE's features, and fit the map from vectors to effects."""

    out: str = field()  # a field of its own: the one of EffectsConfig has a default
    """Folder for the effects and the map. Run again, it goes on where it stopped."""
    model: str
    """Folder or hub id of the model."""
    sae: str
    """Folder of the SAE whose features are measured."""
    text: str | None = None
    """File, folder or dataset id of held-out text, for the scale rules loss and kl."""
    rows_of: str | None = None
    """Folder of another SAE at the same hook point, to take decoder rows from."""
    vector_files: tuple[str, ...] = ()
    """Measure the vectors in these files instead of made ones."""
    fit: Literal["closed", "adam", "none"] = "closed"
    """Fit the map in closed form, by Adam, or not."""
    ridge: float | None = None
    """Ridge of the closed form; chosen by cross-validation if not given."""
    heldout: float = 0.1
    """Share of the vectors kept out of the fit, for its scores."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ... Under torchrun auto takes each process's own GPU."""
    dtype: str | None = None
    """Dtype of the model; float32 on the CPU and the checkpoint's own elsewhere if not given."""


def run_effects(config: EffectsCommand) -> None:
    """`steersman effects`."""
    device = pick_device(config.device)
    sae = SAE.load(config.sae, device)
    rows_of = None if config.rows_of is None else SAE.load(config.rows_of, device)
    lm = LanguageModel.load(config.model, device=device, dtype=config.dtype)
    settings = EffectsConfig(**{f.name: getattr(config, f.name) for f in fields(EffectsConfig)})
    given = [SteeringVector.load(path) for path in config.vector_files] or None
    effects = collect_effects(lm, sae, _texts(config.text, settings), settings, vectors=given, rows_of=rows_of)
    if int(os.environ.get("RANK", "0")):
        return
    print(effects.to_text())
    if config.fit == "none":
        print(f"{config.out}: effects")
        return
    ridge = {"ridge": config.ridge} if config.fit == "closed" else {}
    fitted = effects.fit(method=config.fit, heldout=config.heldout, seed=config.seed, **ridge)
    fitted.save(Path(config.out) / NAME)
    print(fitted.to_text())
    print(f"{config.out}: effects and {NAME}")


def _texts(source: str | None, config: EffectsConfig) -> list[str]:
    if not config.needs_texts:
        return []
    if source is None:
        raise SteersmanError(f"scale_rule {config.scale_rule!r} needs --text: held-out text; or use norm or fixed")
    return _read(source, 4 * config.heldout_texts)


def _read(source: str, limit: int) -> list[str]:
    return list(islice(open_text(source).documents(0), limit))


@dataclass(frozen=True, kw_only=True)
class TargetCommand:
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
    bias_weight: float = 1.0
    """Share of the general effect of steering that is worked against."""
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
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    dtype: str | None = None
    """Dtype of the model."""


def run_target(config: TargetCommand) -> None:
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
    targets = parse_targets(config.feature) if config.feature else {}
    effect_map = EffectMap.load(config.effects)
    device = pick_device(config.device)
    sae = None if config.sae is None else SAE.load(config.sae, device)
    if sae is not None:
        effect_map.check_sae(sae)
    lm = None
    if needs_model:
        lm = LanguageModel.load(str(config.model), device=device, dtype=config.dtype)
    if from_texts:
        assert lm is not None
        assert sae is not None
        texts = [_read(str(source), 4096) for source in (config.positive, config.negative)]
        keep = {name: getattr(config, name) for name in ("max_density", "n_positive", "n_negative")}
        targets = fgaa_targets(lm, sae, texts[0], texts[1], **keep)
        print("targets: " + ", ".join(f"{j} ({w:+.3f})" for j, w in targets.items()))
    if config.rotation:
        assert sae is not None
        vector = effect_map.solve_rotated(targets, sae, min_signal=config.min_signal)
    else:
        settings = {"ridge": config.ridge, "bias_weight": config.bias_weight, "min_signal": config.min_signal}
        vector = effect_map.solve(targets, **settings)
    vector.save(config.out)
    predicted = effect_map.predict(vector)
    for j in list(targets)[:8]:
        signal = float(effect_map.signal[j])
        print(f"feature {j}: predicted effect {float(predicted[j]):+.4f}, signal {signal:.1f} x noise")
    scale = effect_map.median_scale
    print(f"{config.out}: {vector.method}, unit norm; the map's vectors had a median scale of {scale:.4g}")
    if config.verify:
        assert sae is not None
        texts = _read(config.text, 4096) if config.text is not None else []
        options = {"scale": config.scale, "rollouts": config.rollouts, "seed": config.seed}
        print(effect_map.verify(lm, sae, vector, targets, texts=texts, **options).to_text())


def parse_targets(given: tuple[str, ...]) -> dict[int, float]:
    """Target weights from `id` and `id=weight` texts.

    >>> parse_targets(("12", "40=-0.5"))
    {12: 1.0, 40: -0.5}
    """
    targets: dict[int, float] = {}
    for text in given:
        head, mark, tail = text.partition("=")
        try:
            feature, weight = int(head), float(tail) if mark else 1.0
        except ValueError:
            message = f"target {text!r} is not of the form id or id=weight, such as 12 or 40=-0.5"
            raise SteersmanError(message) from None
        if feature in targets:
            raise SteersmanError(f"target {feature} is given twice")
        targets[feature] = weight
    return targets
