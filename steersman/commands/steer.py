"""`steersman steer`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path

from steersman.commands.options import ComputeOptions, LabelOptions, PrintOptions, hook_point, on_kernels
from steersman.config import part_of
from steersman.conversations import Document
from steersman.errors import SteersmanError
from steersman.files import write_json
from steersman.sae import SAE
from steersman.sae.feature_labels import named_feature
from steersman.steer import (
    EditSet,
    Recipe,
    SteerConfig,
    SteeringVector,
    load_steering,
    parse_features,
    steer_and_compare,
)
from steersman.steer.compare import DEFAULT_PROMPTS, Comparison
from steersman.steer.steer_file import run_digest, steer_to_file
from steersman.text import iter_documents, read_documents

Compare = Callable[[SteerConfig, Sequence[Document]], Comparison]


@dataclass(frozen=True, kw_only=True)
class SteerCommand(SteerConfig, ComputeOptions, LabelOptions, PrintOptions):
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
    """File of prompts, one per line (or .jsonl with text or messages), beside those of --prompt."""
    layer: int | None = None
    """Layer in place of --hook: the state after it, counted from 0; -1 is the last."""
    out: str | None = None
    """Also write texts and figures to this JSON file. To a .jsonl file they go batch by batch, a line for each prompt,
    and nothing but a summary is printed; run again, it goes on where it stopped."""


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
    hook = hook_point(config.hook, config.layer, config.model, config.revision)
    settings = replace(part_of(SteerConfig, config), hook=hook)
    sae = None if config.sae is None or not config.feature else config.load_sae(config.sae, config.labels)
    lines = config.out is not None and Path(config.out).suffix == ".jsonl"
    prompts = settings.apply(config.prompt)
    if config.prompts is not None and not lines:
        prompts += read_documents(config.prompts, chat=settings)
    lm = config.load_model(config.model)
    if lines:
        _write_lines(config, settings, prompts, lambda s, given: steer_and_compare(lm, sae, s, vectors, recipe, given))
        return
    found = steer_and_compare(lm, sae, settings, vectors, recipe, prompts or None)
    if sae is not None and config.units == "raw" and config.mode in ("add", "clamp", "floor"):
        for line in _in_largest_activations(sae, parse_features(config.feature)):
            config.note(line)
    config.show(found.to_text, found)
    if config.out is not None:
        write_json(config.out, asdict(found), ensure_ascii=False)
        config.note(f"written to {config.out}")


def _write_lines(config: SteerCommand, settings: SteerConfig, prompts: list[Document], compare: Compare) -> None:
    out = str(config.out)
    files = [text for text in (config.recipe, *(_file_of(text) for text in config.vector)) if text is not None]
    own = {f.name for f in fields(SteerConfig)} - {"prompt", "batch_size"}
    known = {name: value for name, value in asdict(settings).items() if name in own}
    run = run_digest(known, config.model, config.revision, config.sae, *(Path(file).read_bytes() for file in files))
    prompts = prompts if prompts or config.prompts is not None else settings.apply(DEFAULT_PROMPTS)
    more = () if config.prompts is None else iter_documents(config.prompts, chat=settings)
    rows = steer_to_file(compare, settings, chain(prompts, more), out, run=run)
    config.show(lambda: f"{out}: {rows} rows", {"out": out, "rows": rows, "run": run})


def _file_of(text: str) -> str:
    """The file of `FILE` or `FILE=scale`."""
    return text.rpartition("=")[0] if "=" in text and not Path(text).exists() else text


def _in_largest_activations(sae: SAE, features: dict[int, float]) -> list[str]:
    """How large raw strengths are, beside what the features do by themselves."""
    if sae.feature_stats is None:
        return []
    largest = {j: float(sae.feature_stats.max_act[j]) for j in features}
    return [
        f"{named_feature(j, sae.labels.text(j))}: strength {strength:g} is {strength / largest[j]:.2g} times its "
        "largest activation"
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
