"""`steersman decompose`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.commands.options import ComputeOptions, PrintOptions, as_json, hook_point, on_kernels
from steersman.config import part_of
from steersman.errors import SteersmanError
from steersman.figures import save_figure
from steersman.files import write_json
from steersman.sae import SAE, FeatureLabels
from steersman.steer import (
    DecomposeConfig,
    EffectMap,
    SteeringVector,
    decompose,
    measure_retention,
    read_labels,
)
from steersman.steer.decompose import Decomposition, plot_decompositions
from steersman.steer.decompose.api import check_given
from steersman.text import read_texts
from steersman.train import ActivationStore, HookView
from steersman.visible import visible

RETENTION_TEXTS = 64


@dataclass(frozen=True, kw_only=True)
class DecomposeCommand(DecomposeConfig, ComputeOptions, PrintOptions):
    """Take steering vectors apart into signed features of an SAE, with what must be known to believe it."""

    vector: tuple[str, ...]
    """Vector file (safetensors or GGUF); several are taken apart together."""
    sae: str
    """Folder, file or hub id of the SAE, of the vectors' hook point."""
    hook: str = ""
    """Hook point, for an SAE that records none."""
    layer: int | None = None
    """Layer in place of --hook: the state after it, counted from 0; -1, the last, with --model."""
    labels: str | None = None
    """Labels of the SAE's features, over those beside it: a labels.jsonl of `steersman label`, an export of
    Neuronpedia's explanations, JSON as {id: name}, or what `steersman features` wrote; a feature without one is named
    by features.json in the SAE's folder, else with --model by the tokens that it promotes."""
    model: str | None = None
    """Folder or hub id of the model: for contrast, behaviour and retention."""
    positive: str | None = None
    """File of texts that the vector points towards, for contrast: one per line, or .jsonl with text."""
    negative: str | None = None
    """File of texts that it points away from."""
    store: str | None = None
    """Store of activations at the hook point, for response."""
    effects: str | None = None
    """Effect map that `steersman effects` wrote (its folder or file), for effect."""
    text: str | None = None
    """File of held-out texts, one per line: for behaviour, and to measure --retention on."""
    retention: bool = False
    """Also steer with the reconstruction, at equal norm and at equal KL, and the residual: needs --model and --text."""
    strength: float = 1.0
    """Multiples of the vector at which the retention is measured."""
    out: str | None = None
    """Write everything as JSON to this file."""
    plot: str | None = None
    """Draw explained variance against the number of features to this PNG file."""


@on_kernels
def run(config: DecomposeCommand) -> None:
    """`steersman decompose`."""
    if not config.vector:
        raise SteersmanError("no vector to take apart: give --vector FILE")
    if config.retention and (config.model is None or config.text is None):
        raise SteersmanError("--retention needs --model and --text: what to steer, and the texts to measure on")
    if config.text is not None and not (config.retention or config.method == "behaviour"):
        raise SteersmanError("--text is read by --retention and by --method behaviour only")
    hook = hook_point(config.hook, config.layer, config.model, config.revision) or ""
    named = {
        "lm": config.model,
        "texts": config.text if config.method == "behaviour" else None,
        "positive": config.positive,
        "negative": config.negative,
        "activations": config.store,
        "effect_map": config.effects,
    }
    check_given(config.method, named)
    vectors = [SteeringVector.load(path) for path in config.vector]
    sae = config.load_sae(config.sae, config.labels)
    labels = _labels(config, sae)
    texts = None if config.text is None else read_texts(config.text, RETENTION_TEXTS)
    given: dict[str, Any] = {
        "texts": texts if config.method == "behaviour" else None,
        "positive": None if config.positive is None else read_texts(config.positive),
        "negative": None if config.negative is None else read_texts(config.negative),
        "activations": None if config.store is None else _activations(config.store, sae),
        "effect_map": None if config.effects is None else EffectMap.load(config.effects),
    }
    lm = None if config.model is None else config.load_model(config.model)
    settings = part_of(DecomposeConfig, config)
    found: list[Decomposition] = decompose(vectors, sae, config=settings, labels=labels, lm=lm, hook=hook, **given)
    records: list[dict[str, Any]] = []
    for path, one in zip(config.vector, found):
        records.append({"vector": path, **one.to_dict()})
        config.note(f"{path}\n{visible(one.to_text(), newline=chr(10))}")
        if config.retention and lm is not None and texts is not None:
            kept = measure_retention(one, lm, texts, scale=config.strength, hook=hook)
            records[-1]["retention"] = kept.to_dict()
            config.note(kept.to_text())
        config.note("")
    if config.plot is not None:
        names = {Path(path).stem if len(set(config.vector)) > 1 else config.method: one
                 for path, one in zip(config.vector, found)}  # fmt: skip
        save_figure(plot_decompositions(names), config.plot)
        config.note(f"curves drawn to {config.plot}")
    if config.out is not None:
        write_json(config.out, records, indent=1, ensure_ascii=False)
        config.note(f"written to {config.out}")

    if config.json:
        print(as_json(records))


def _labels(config: DecomposeCommand, sae: SAE) -> FeatureLabels:
    """The SAE's labels over what its features.json says of the others."""
    beside = Path(config.sae) / "features.json"
    if config.labels is not None or not beside.is_file():
        return sae.labels
    return read_labels(beside, sae.cfg).merged(sae.labels)


def _activations(path: str, sae: SAE) -> HookView:
    store = ActivationStore.open(path)
    return HookView(store, store.hook_of(sae))
