"""`steersman steer`."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from steersman.commands.options import ComputeOptions, PrintOptions, hook_point, on_kernels
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.sae import SAE
from steersman.steer import (
    EditSet,
    Recipe,
    SteerConfig,
    SteeringVector,
    load_steering,
    parse_features,
    steer_and_compare,
)
from steersman.text import read_texts


@dataclass(frozen=True, kw_only=True)
class SteerCommand(SteerConfig, ComputeOptions, PrintOptions):
    """Continue prompts steered, by an SAE's features or by vectors or both, and unsteered, side by side, with what the
    steering cost."""

    model: str
    """Folder or hub id of the model."""
    sae: str | None = None
    """Folder, file or hub id of the SAE, for --feature."""
    vector: tuple[str, ...] = ()
    """Vector file to add, or file of edits, as FILE or FILE=scale; several at once, and with what --feature does."""
    recipe: str | None = None
    """Recipe file (YAML) of several edits, each with its own scope; opened behind what --feature and --vector do."""
    prompts: str | None = None
    """File of prompts, one per line (or .jsonl with text), beside those of --prompt."""
    layer: int | None = None
    """Layer in place of --hook: the state after it, counted from 0; -1 is the last."""
    out: str | None = None
    """Also write texts and figures to this JSON file."""


@on_kernels
def run(config: SteerCommand) -> None:
    """`steersman steer`."""
    if not config.feature and not config.vector and config.recipe is None:
        raise SteersmanError(
            "nothing to steer by: give --feature id=strength with --sae, --vector FILE or --recipe FILE"
        )
    if config.feature and config.sae is None:
        raise SteersmanError("--feature needs --sae: the SAE whose features they are")
    vectors = [_scaled(text) for text in config.vector]
    recipe = None if config.recipe is None else Recipe.load(config.recipe)
    prompts = () if config.prompts is None else tuple(read_texts(config.prompts))
    hook = hook_point(config.hook, config.layer, config.model, config.revision)
    settings = replace(part_of(SteerConfig, config), prompt=(*config.prompt, *prompts), hook=hook)
    sae = None if config.sae is None or not config.feature else config.load_sae(config.sae)
    found = steer_and_compare(config.load_model(config.model), sae, settings, vectors, recipe)
    if sae is not None and config.units == "raw" and config.mode in ("add", "clamp", "floor"):
        for line in _in_largest_activations(sae, parse_features(config.feature)):
            config.note(line)
    config.show(found.to_text, found)
    if config.out is not None:
        write_json(config.out, asdict(found), ensure_ascii=False)
        config.note(f"written to {config.out}")


def _in_largest_activations(sae: SAE, features: dict[int, float]) -> list[str]:
    """How large raw strengths are, beside what the features do by themselves."""
    if sae.feature_stats is None:
        return []
    largest = {j: float(sae.feature_stats.max_act[j]) for j in features}
    return [
        f"feature {j}: strength {strength:g} is {strength / largest[j]:.2g} times its largest activation"
        for j, strength in features.items()
        if largest[j] > 0
    ]


def _scaled(text: str) -> tuple[SteeringVector | EditSet, float]:
    """The vector or edits, and the scale of `FILE` or `FILE=scale`."""
    path, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return load_steering(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        raise SteersmanError(f"--vector {text}: {scale!r} is no scale; write FILE or FILE=scale") from None
    if not math.isfinite(number):
        raise SteersmanError(f"--vector {text}: the scale must be a finite number")
    return load_steering(path), number
