"""`steersman evaluate`."""

from dataclasses import dataclass

from steersman.commands.options import ComputeOptions, PrintOptions, examples_of, on_kernels
from steersman.config import part_of
from steersman.conversations import ChatOptions
from steersman.steer import EvaluationConfig, evaluate_steering, load_steering
from steersman.steer.evaluation.evaluate import check_request
from steersman.steer.feature_values import feature_ids
from steersman.steer.methods import Examples
from steersman.text import read_documents


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluationConfig, ChatOptions, ComputeOptions, PrintOptions):
    """Measure what a vector does to text, over scales, against a random direction, diffmean, prompting and nothing."""

    model: str
    """Folder or hub id of the model."""
    vector: str
    """File of a vector, or of edits."""
    prompts: str
    """File of prompts, one per line (or .jsonl with text or messages)."""
    out: str
    """Folder for evaluation.json, evaluation.txt and curves.png."""
    word: tuple[str, ...] = ()
    """Word that should become more frequent; may be repeated."""
    text: str | None = None
    """File of held-out texts, for the loss while steering."""
    data: str | None = None
    """JSONL file of examples, for the diffmean baseline; those with a prompt also as continuations."""
    positive: str | None = None
    """File of positive texts, for the diffmean baseline."""
    negative: str | None = None
    """File of negative texts."""
    prompt_prefix: str | None = None
    """What the prompting baseline puts before each prompt; by default the first positive example."""
    sae: str | None = None
    """SAE folder, for target rise, side effects and specificity."""
    feature: tuple[str, ...] = ()
    """Features that should rise."""


@on_kernels
def run(config: EvaluateCommand) -> None:
    """`steersman evaluate`."""
    features = feature_ids(config.feature)
    v = load_steering(config.vector)
    prompts = read_documents(config.prompts, chat=config)
    texts = [] if config.text is None else read_documents(config.text, chat=config)
    examples = examples_of(config.data, config.positive, config.negative, config) or Examples(positive=[], negative=[])
    check_request(v, prompts, texts, has_sae=config.sae is not None, features=features)
    sae = None if config.sae is None else config.load_sae(config.sae)
    pairs = zip(examples.positive, examples.negative)
    found = evaluate_steering(
        config.load_model(config.model),
        v,
        prompts,
        words=config.word,
        texts=texts,
        continuations=[(p.prompt, p.answer, n.answer) for p, n in pairs if p.prompt == n.prompt != ""],
        positive=examples.positive,
        negative=examples.negative,
        prompt_prefix=config.prompt_prefix,
        sae=sae,
        features=features,
        config=part_of(EvaluationConfig, config),
    )
    found.save(config.out)
    config.show(found.to_text, found.to_json())
    config.note(f"written to {config.out}")
