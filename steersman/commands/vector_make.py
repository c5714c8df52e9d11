"""`steersman vector make`."""

from dataclasses import dataclass

from steersman.commands.options import ComputeOptions, PrintOptions, examples_of, hook_points, on_kernels
from steersman.commands.vector_show import describe, edits_record, record
from steersman.config import part_of
from steersman.conversations import ChatOptions
from steersman.errors import SteersmanError
from steersman.steer import (
    AFFINE_METHODS,
    AffineConfig,
    ContrastConfig,
    SteeringVector,
    contrast,
    fit_affine,
    parse_features,
)
from steersman.steer.methods import Examples
from steersman.steer.methods.contrast import check_contrast
from steersman.steer.training.edit_method import EDIT_METHODS, edit_from_examples
from steersman.steer.training.sae_ssv import CONFIG as SAE_SSV
from steersman.steer.training.sae_ssv import sae_ssv
from steersman.steer.training.settings import loop_settings


@dataclass(frozen=True, kw_only=True)
class VectorMakeCommand(ContrastConfig, ChatOptions, ComputeOptions, PrintOptions):
    """Make a steering vector: from examples (--data, or --positive and --negative), or a feature's direction (--sae,
    --feature). The methods loreft and psr make an edit in its place, and sae_ssv needs --sae beside the examples; mean,
    mimic, leace and leace_shift make the affine map from the negative to the positive examples."""

    out: str
    """File to write: .safetensors, or .gguf for a control vector; an edit is .safetensors."""
    model: str | None = None
    """Folder or hub id of the model; needed for examples."""
    hook: tuple[str, ...] = ()
    """Hook point, such as blocks.12.hook_resid_post; several make one vector at all of them."""
    layer: tuple[int, ...] = ()
    """Layer in place of a hook point: the state after it, counted from 0; -1 is the last."""
    data: str | None = None
    """JSONL file of examples: positive and negative (with or without prompt), or text (or messages) and label."""
    positive: str | None = None
    """File of positive texts, one per line (or .jsonl with text)."""
    negative: str | None = None
    """File of negative texts."""
    sae: str | None = None
    """SAE folder, for the direction of --feature."""
    feature: tuple[str, ...] = ()
    """Feature whose decoder direction is the vector, as id or id=weight; of several the weighted sum."""
    shrinkage: float = 0.0
    """mimic, leace, leace_shift: a of (1 - a) S + a tr(S)/D I; needed where there are no more samples than
    dimensions."""


@on_kernels
def run(config: VectorMakeCommand) -> None:
    """`steersman vector make`."""
    examples = examples_of(config.data, config.positive, config.negative, config)
    if config.method == "sae_ssv" or config.method in EDIT_METHODS:
        _trained(config, examples)
        return
    if config.method in AFFINE_METHODS:
        _affine(config, examples)
        return
    if (examples is None) == (config.sae is None):
        raise SteersmanError("make it from examples (--data, or --positive and --negative) or from --sae and --feature")
    hooks = hook_points(config.hook, config.layer, config.model, config.revision)
    if config.sae is not None:
        if not config.feature or len(hooks) > 1:
            raise SteersmanError("--sae needs --feature, and --hook or --layer once at most")
        weights, hook = parse_features(config.feature), hooks[0] if hooks else ""
        sae = config.load_sae(config.sae)
        parts = [(SteeringVector.of_feature(sae, j, hook_name=hook), weight) for j, weight in weights.items()]
        first, *others = [part if weight == 1 else part * weight for part, weight in parts]
        v = sum(others, start=first)
    else:
        assert examples is not None
        if config.model is None or not hooks:
            raise SteersmanError("examples need --model, and --hook or --layer: where to read them")
        check_contrast(examples, part_of(ContrastConfig, config))
        lm = config.load_model(config.model)
        v = contrast(lm, examples.positive, examples.negative, hook=hooks, config=part_of(ContrastConfig, config))
    v.save(config.out)
    config.show(lambda: describe(v), record(v))
    config.note(f"written to {config.out}")


def _affine(config: VectorMakeCommand, examples: Examples | None) -> None:
    """The affine map from the negative to the positive side."""
    hooks = hook_points(config.hook, config.layer, config.model, config.revision)
    if examples is None or config.model is None or not hooks:
        raise SteersmanError(f"method {config.method!r} needs examples (--data), --model and --hook or --layer")
    settings = AffineConfig(
        method=config.method,
        shrinkage=config.shrinkage,
        positions=config.positions or AffineConfig.positions,
        batch_size=config.batch_size,
        max_length=config.max_length,
        diagnostics=config.diagnostics,
    )
    _check_edit_file(config)
    lm = config.load_model(config.model)
    made = fit_affine(lm, examples.negative, examples.positive, hook=hooks, config=settings)
    made.save(config.out)
    config.show(lambda: repr(made), edits_record(made))
    config.note(f"written to {config.out}")


def _check_edit_file(config: VectorMakeCommand) -> None:
    if not config.out.lower().endswith(".safetensors"):
        raise SteersmanError(f"{config.out}: method {config.method!r} makes an edit, whose file is .safetensors")


def _trained(config: VectorMakeCommand, examples: Examples | None) -> None:
    """What is trained from examples and is no method of `contrast`."""
    hooks = hook_points(config.hook, config.layer, config.model, config.revision)
    needed = "--sae" if config.method == "sae_ssv" else "--hook or --layer"
    if examples is None or config.model is None or not (config.sae if config.method == "sae_ssv" else hooks):
        raise SteersmanError(f"method {config.method!r} needs examples (--data), --model and {needed}")
    settings = part_of(ContrastConfig, config)
    if config.method == "sae_ssv":
        sae, lm = config.load_sae(config.sae or ""), config.load_model(config.model)
        v = sae_ssv(
            lm,
            sae,
            examples.positive,
            examples.negative,
            hook=hooks[0] if hooks else None,
            config=loop_settings(SAE_SSV, settings),
        )
        v.save(config.out)
        config.show(lambda: describe(v), record(v))
    else:
        EDIT_METHODS[config.method]().check(examples, settings)
        _check_edit_file(config)
        lm = config.load_model(config.model)
        made = edit_from_examples(lm, examples.positive, examples.negative, hook=hooks, config=settings)
        made.save(config.out)
        config.show(lambda: repr(made), edits_record(made))
    config.note(f"written to {config.out}")
