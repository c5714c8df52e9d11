"""`steersman vector make | show | calibrate | convert` and `steersman evaluate`."""

import dataclasses
import json
from dataclasses import dataclass, fields
from typing import Any

import torch

from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer import (
    CalibrateConfig,
    ContrastConfig,
    EvaluationConfig,
    Steerer,
    SteeringVector,
    contrast,
    evaluate_steering,
)
from steersman.steer.calibrate import calibrate, refuse_unmet
from steersman.steer.methods import Examples, as_examples, read_examples
from steersman.steer.methods.diagnostics import warnings
from steersman.text import read_texts


def _part(config: Any, kind: type[Any]) -> Any:
    """The fields of a command that belong to the dataclass it extends."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})


def _model(config: Any) -> LanguageModel:
    return LanguageModel.load(config.model, device=pick_device(config.device), dtype=config.dtype)


def _examples(data: str | None, positive: str | None, negative: str | None) -> Examples | None:
    if data is not None:
        if positive or negative:
            raise SteersmanError("give either --data, or --positive and --negative, not both")
        return read_examples(data)
    if positive is None and negative is None:
        return None
    if positive is None:
        raise SteersmanError("--negative needs --positive")
    sides = [as_examples(read_texts(path), side) if path else [] for path, side in
             ((positive, "positive"), (negative, "negative"))]  # fmt: skip
    return Examples(positive=sides[0], negative=sides[1])


@dataclass(frozen=True, kw_only=True)
class VectorMakeCommand(ContrastConfig):
    """Make a steering vector: from examples (--data, or --positive and --negative), or a feature's direction (--sae,
    --feature)."""

    out: str
    """File to write: .safetensors, or .gguf for a control vector."""
    model: str | None = None
    """Folder or hub id of the model; needed for examples."""
    hook: tuple[str, ...] = ()
    """Hook point, such as blocks.12.hook_resid_post; several make one vector at all of them."""
    data: str | None = None
    """JSONL file of examples: positive and negative (with or without prompt), or text and label."""
    positive: str | None = None
    """File of positive texts, one per line (or .jsonl with text)."""
    negative: str | None = None
    """File of negative texts."""
    sae: str | None = None
    """SAE folder, for the direction of --feature."""
    feature: int | None = None
    """Feature whose decoder direction is the vector."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    dtype: str | None = None
    """Dtype of the model: float32, bfloat16, ...; by default float32 on the CPU and the checkpoint's own elsewhere."""


def run_vector_make(config: VectorMakeCommand) -> None:
    """`steersman vector make`."""
    examples = _examples(config.data, config.positive, config.negative)
    if (examples is None) == (config.sae is None):
        raise SteersmanError("make it from examples (--data, or --positive and --negative) or from --sae and --feature")
    if config.sae is not None:
        if config.feature is None or len(config.hook) > 1:
            raise SteersmanError("--sae needs --feature, and --hook once at most")
        sae = SAE.load(config.sae, pick_device(config.device))
        v = SteeringVector.of_feature(sae, config.feature, hook_name=config.hook[0] if config.hook else "")
    else:
        assert examples is not None
        if config.model is None or not config.hook:
            raise SteersmanError("examples need --model and --hook: where to read them")
        lm = _model(config)
        v = contrast(lm, examples.positive, examples.negative, hook=config.hook, config=_part(config, ContrastConfig))
    v.save(config.out)
    print(describe(v))
    print(f"written to {config.out}")


def describe(v: SteeringVector) -> str:
    """What is known of a vector, for a terminal."""
    lines = [repr(v)]
    for hook, direction in v.directions.items():
        lines.append(f"  {hook}: |v| {float(direction.norm()):.4g}, largest entry {float(direction.abs().max()):.4g}")
        figures = v.metadata.get("diagnostics", {}).get(hook)
        if figures:
            named = [f"{k} {x:.3f}" for k, x in figures.items() if isinstance(x, float)]
            lines.append("    " + ", ".join(named) + ("" if figures.get("heldout") else " (in sample)"))
            lines += [f"    warning: {text}" for text in warnings(figures)]
    calibration = v.metadata.get("calibration")
    if calibration:
        state = "converged" if calibration["converged"] else f"not converged ({calibration['reason']})"
        lines.append(f"  calibrated: {calibration['budget']} {calibration['value']:.4g}, {state}")
    rest = {k: x for k, x in v.metadata.items() if k not in ("diagnostics", "calibration", "settings")}
    lines += [f"  {k}: {x if isinstance(x, str) else json.dumps(x)}" for k, x in rest.items()]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class VectorShowCommand:
    """Show vectors: shape, norm, where they come from, the cosines between several, and the tokens they promote."""

    vector: tuple[str, ...]
    """Vector file; several are compared."""
    model: str | None = None
    """Folder or hub id of the model, to show the tokens that each vector promotes (logit lens)."""
    top: int = 10
    """Tokens to show."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    dtype: str | None = None
    """Dtype of the model."""


def run_vector_show(config: VectorShowCommand) -> None:
    """`steersman vector show`."""
    if not config.vector:
        raise SteersmanError("no vector to show: give --vector FILE")
    vectors = [SteeringVector.load(path) for path in config.vector]
    lm = None if config.model is None else _model(config)
    for path, v in zip(config.vector, vectors):
        print(f"{path}: {describe(v)}")
        if lm is not None:
            Steerer(lm).vector(v)  # refuses one of another model
            for hook, direction in v.directions.items():
                raised, lowered = _promoted(lm, direction if direction.ndim == 1 else direction.mean(0), config.top)
                print(f"  {hook} promotes {raised}\n  {hook} suppresses {lowered}")
    if len(vectors) > 1:
        print("cosines:")
        for a, name in zip(vectors, config.vector):
            row = " ".join(f"{a.cosine(b):>7.3f}" if a.norm() and b.norm() else "      -" for b in vectors)
            print(f"  {row}  {name}")


@torch.no_grad()
def _promoted(lm: LanguageModel, direction: torch.Tensor, top: int) -> tuple[str, str]:
    """The tokens whose logits the direction raises and lowers most, past the final norm's gain."""
    W_U, norm = lm.unembed()
    gain = getattr(norm, "weight", torch.ones((), device=W_U.device))
    logits = (direction.to(W_U.device) * gain.float()) @ W_U.float()
    sides = (logits.topk(min(top, len(logits))).indices, (-logits).topk(min(top, len(logits))).indices)
    raised, lowered = (" ".join(repr(lm.tokenizer.decode([i])) for i in ids.tolist()) for ids in sides)
    return raised, lowered


@dataclass(frozen=True, kw_only=True)
class VectorCalibrateCommand(CalibrateConfig):
    """Scale a vector so that steering with it costs a budget: --target-kl, --target-loss or --target-norm."""

    vector: str
    """Vector file."""
    model: str
    """Folder or hub id of the model."""
    out: str
    """File to write the scaled vector to."""
    text: str | None = None
    """File of held-out texts, one per line (or .jsonl with text); without it the model writes its own."""
    texts: int = 64
    """Texts to use, at most."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    dtype: str | None = None
    """Dtype of the model."""


def run_vector_calibrate(config: VectorCalibrateCommand) -> None:
    """`steersman vector calibrate`."""
    v = SteeringVector.load(config.vector)
    texts = None if config.text is None else read_texts(config.text)[: config.texts]
    found = calibrate(v, _model(config), texts=texts, config=_part(config, CalibrateConfig))
    refuse_unmet(found).save(config.out)
    for scale, value in found.search.evaluations:
        print(f"  scale {scale:.4g}: {found.budget} {value:.4g}")
    print(f"{found}\nwritten to {config.out}")


@dataclass(frozen=True, kw_only=True)
class VectorConvertCommand:
    """Convert a vector between safetensors and a GGUF control vector (llama.cpp, repeng), by the files' endings."""

    vector: str
    """File to read."""
    out: str
    """File to write: .safetensors or .gguf."""
    model_type: str | None = None
    """For GGUF: the model's type, such as llama or gemma2, where the vector does not record it."""


def run_vector_convert(config: VectorConvertCommand) -> None:
    """`steersman vector convert`."""
    v = SteeringVector.load(config.vector)
    if config.model_type is not None:
        v = dataclasses.replace(v, metadata={**v.metadata, "model_type": config.model_type})
    v.save(config.out)
    print(f"{v!r}\nwritten to {config.out}")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluationConfig):
    """Measure what a vector does to text, over scales, against a random direction, diffmean, prompting and nothing."""

    model: str
    """Folder or hub id of the model."""
    vector: str
    """Vector file."""
    prompts: str
    """File of prompts, one per line (or .jsonl with text)."""
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
    feature: tuple[int, ...] = ()
    """Features that should rise."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    dtype: str | None = None
    """Dtype of the model."""


def run_evaluate(config: EvaluateCommand) -> None:
    """`steersman evaluate`."""
    v = SteeringVector.load(config.vector)
    prompts = read_texts(config.prompts)
    texts = [] if config.text is None else read_texts(config.text)
    examples = _examples(config.data, config.positive, config.negative) or Examples(positive=[], negative=[])
    sae = None if config.sae is None else SAE.load(config.sae, pick_device(config.device))
    pairs = zip(examples.positive, examples.negative)
    found = evaluate_steering(
        _model(config),
        v,
        prompts,
        words=config.word,
        texts=texts,
        continuations=[
            (p.prompt, p.text[len(p.prompt) :], n.text[len(n.prompt) :]) for p, n in pairs if p.prompt == n.prompt != ""
        ],
        positive=examples.positive,
        negative=examples.negative,
        prompt_prefix=config.prompt_prefix,
        sae=sae,
        features=config.feature,
        config=_part(config, EvaluationConfig),
    )
    found.save(config.out)
    print(found.to_text())
    print(f"written to {config.out}")
