"""`steersman find`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steersman.commands.options import (
    ComputeOptions,
    LabelOptions,
    PrintOptions,
    examples_of,
    features_file,
    on_kernels,
)
from steersman.config import part_of
from steersman.conversations import ChatOptions
from steersman.errors import SteersmanError
from steersman.lm.origin import Origin, check_same_origin
from steersman.sae import SAE, Neighbour, nearest_features
from steersman.sae.neighbours import Sides, Sign
from steersman.steer import FindConfig, SteeringVector, find_features
from steersman.steer.analysis.find import check_sides
from steersman.train.reports.search import WordMatch, read_feature_records, search_features
from steersman.visible import visible


@dataclass(frozen=True, kw_only=True)
class FindCommand(FindConfig, ChatOptions, ComputeOptions, LabelOptions, PrintOptions):
    """Find features: by words in their labels or contexts, by texts that should and should not activate them, or by a
    direction."""

    sae: str
    """Folder, file or hub id of the SAE."""
    words: str | None = None
    """Words to look for in the features' labels, tokens and contexts: all of them, in any case."""
    features: str | None = None
    """File of contexts that `steersman features` wrote, for --words; by default features.json in the SAE's folder."""
    model: str | None = None
    """Folder or hub id of the model, to read texts with."""
    positive: str | None = None
    """File of texts that should activate the feature, one per line (or .jsonl with text or messages); about 20."""
    negative: str | None = None
    """File of texts that should not: as like the others as can be in all else."""
    data: str | None = None
    """Instead of both, a JSONL file of examples: positive and negative (with or without prompt), or text (or messages)
    and label."""
    vector: str | None = None
    """Vector file: the features whose decoder rows are nearest it."""
    by: Sides = "decoder"
    """For --vector, which rows are compared with it: decoder (what features write) or encoder (what they read)."""
    sign: Sign = "positive"
    """For --vector, which come first: those that point with it, against it (negative), or either (both)."""


@on_kernels
def run(config: FindCommand) -> None:
    """`steersman find`."""
    by_texts = config.positive is not None or config.negative is not None or config.data is not None
    ways = [name for name, given in (("words", config.words), ("vector", config.vector)) if given is not None]
    ways += ["positive"] if by_texts else []
    if len(ways) != 1:
        raise SteersmanError(
            "find by one of: --words, --positive and --negative (or --data), --vector"
            + (f"; got {' and '.join('--' + way for way in ways)}" if ways else "")
        )
    if config.features is not None and config.words is None:
        raise SteersmanError("--features is searched for --words only")
    if config.words is not None:
        _by_words(config, config.words)
    elif config.vector is not None:
        _by_direction(config, config.vector)
    else:
        _by_texts(config)


def _by_words(config: FindCommand, words: str) -> None:
    sae = config.load_sae(config.sae, config.labels)
    path = features_file(config.sae, config.features)
    if path is None and not sae.labels:
        raise SteersmanError(
            f"{config.sae} has neither labels nor contexts to search: run `steersman features` on it, or name the file "
            "it wrote with --features"
        )
    records = [] if path is None else read_feature_records(path)
    found = search_features(words, records, sae.labels, config.top)
    config.show(lambda: _matches(found, words), found)


def _matches(found: Sequence[WordMatch], words: str) -> str:
    if not found:
        return f"no feature has {words!r} in its label, tokens or contexts"
    lines = []
    for match in found:
        tokens = " ".join(f"'{visible(token)}'" for token in match.fires_on)
        lines.append(f"{match.feature:>8}  in {', '.join(match.where)}   {visible(match.label) or tokens}".rstrip())
        lines += [f"{'':>8}  {visible(match.context)}"] if match.context else []
    return "\n".join(lines)


def _by_direction(config: FindCommand, path: str) -> None:
    vector = SteeringVector.load(path)
    vector.check_not_zero("finding features by it")
    sae = config.load_sae(config.sae, config.labels)
    hook = sae.cfg.hook_name
    if len(vector.directions) > 1:
        if hook not in vector.directions:
            raise SteersmanError(f"{path} has no direction at {hook}, where the SAE is: {', '.join(vector.hook_names)}")
        vector = vector.at(hook)
    if (vector.positions or 1) > 1:
        vector = vector.mean_over_positions()
    origin = Origin(vector.model_name, vector.hook_name, vector.vector.shape[-1])
    check_same_origin(path, origin, "this SAE", Origin.of_sae(sae))
    found = nearest_features(sae, vector.vector, config.top, by=config.by, sign=config.sign).of(0)
    config.show(lambda: neighbours_to_text(found, sae), neighbours_record(found, sae))


def _by_texts(config: FindCommand) -> None:
    examples = examples_of(config.data, config.positive, config.negative, config)
    if examples is None or not examples.negative:
        raise SteersmanError("--positive needs --negative: texts that should not activate the feature")
    check_sides(len(examples.positive), len(examples.negative))
    if config.model is None:
        raise SteersmanError("finding by texts needs --model: what reads them")
    sae, lm = config.load_sae(config.sae, config.labels), config.load_model(config.model)
    found = find_features(lm, sae, examples.positive, examples.negative, part_of(FindConfig, config))
    config.show(found.to_text, found.to_json() if config.json else None)


def neighbours_to_text(found: Sequence[Neighbour], sae: SAE) -> str:
    """Features near something, one a line."""
    lines = [f"{'feature':>8}  {'cosine':>7}  label"]
    for near in found:
        lines.append(f"{near.feature:>8}  {near.cosine:>7.3f}  {visible(sae.labels.text(near.feature))}".rstrip())
    return "\n".join(lines)


def neighbours_record(found: Sequence[Neighbour], sae: SAE) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [{**asdict(near), "label": sae.labels.text(near.feature)} for near in found]
