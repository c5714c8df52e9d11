"""`steersman cache | train | eval | features | steer`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from steersman.errors import SteersmanError
from steersman.kernels import Implementation, using
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.sae.checkpoint import save_statistics
from steersman.steer import SteerConfig, steer_and_compare
from steersman.train import (
    ActivationStore,
    ActivationStream,
    CacheConfig,
    HookView,
    TrainConfig,
    cache_activations,
    train_sae,
)
from steersman.train.parallel import launched
from steersman.train.reports.evaluate import evaluate_sae
from steersman.train.reports.features import (
    check_same_origin,
    describe_features,
    features_to_json,
    features_to_text,
    summarize_store,
)
from steersman.train.run.trainer import pick_device
from steersman.train.text import TextSource, open_text

__all__ = ["CacheConfig", "EvalCommand", "FeaturesCommand", "SteerConfig", "TrainCommand"]


def _on_kernels(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """A command that computes with the implementation that its `kernels` asks for, or fails at once."""

    @wraps(run)
    def run_with(config: Any) -> None:
        with using(config.kernels, pick_device(config.device)):
            run(config)

    return run_with


def run_cache(config: CacheConfig) -> None:
    """`steersman cache`."""
    store = cache_activations(config=config)
    if launched()[0]:
        return  # one of several ranks speaks
    print(f"{store.path}: {store.n_rows:,} rows of {', '.join(store.hook_names)} from {store.model_name}")
    for hook in store.hook_names:
        stats = store.stats(hook)
        print(f"  {hook}: width {store.width(hook)}, mean |x| {stats.mean_norm:.4g}, median {stats.median_norm:.4g}")


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig):
    """Train an SAE on a store (--store), or straight from a model and text with nothing written (--model, --text,
    --hook)."""

    out: str
    """Run folder. A run that was interrupted goes on; a finished one is left as it is."""
    store: str | None = None
    """Folder of a store that `steersman cache` wrote."""
    hook: str | None = None
    """Hook point: which of the store's, or where to read the model."""
    model: str | None = None
    """Without a store: folder or hub id of the model."""
    text: str | None = None
    """Without a store: file, folder or dataset id of the text."""
    revision: str | None = None
    """Without a store: revision of the model on the hub."""
    buffer_rows: int = 65_536
    """Without a store: rows of the buffer that activations are shuffled in."""


def run_train(config: TrainCommand) -> None:
    """`steersman train`."""
    settings = TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})
    sae = train_sae(_source(config), settings, config.out)
    if launched()[0]:
        return  # one of several ranks speaks
    heldout = sae.cfg.metadata["heldout"]
    measured = f"FVU {heldout['fvu']:.4f}, L0 {heldout['l0']:.1f}, dead {100 * heldout['dead_share']:.2f} %"
    print(f"{config.out}: {sae.cfg.d_sae} features at {sae.cfg.hook_name}; held out: {measured}")


def _source(config: TrainCommand) -> Any:
    if config.store is not None:
        if config.model or config.text:
            raise SteersmanError("give either --store, or --model with --text and --hook, not both")
        store = ActivationStore.open(config.store)
        return store if config.hook is None else HookView(store, config.hook)
    if not (config.model and config.text and config.hook):
        raise SteersmanError("nothing to train on: give --store, or --model with --text and --hook")
    model, text, hook = config.model, config.text, config.hook

    def stream() -> ActivationStream:
        lm = LanguageModel.load(model, device=config.device, revision=config.revision)
        return ActivationStream(lm, text, hook=hook, buffer_rows=config.buffer_rows)

    return stream


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Measure an SAE on a store's held-out rows and, with --model and --text, its effect on the model's loss."""

    sae: str
    """Folder of the SAE."""
    store: str
    """Folder of a store of the SAE's hook point."""
    split: Literal["heldout", "train", "all"] = "heldout"
    """Which rows: those of the last documents, the others, or all."""
    heldout_fraction: float = 0.05
    """Share of the rows that is held out."""
    model: str | None = None
    """Folder or hub id of the model; without it only the reconstruction is measured."""
    text: str | None = None
    """Text to measure the model's loss on. Of the store's own text, the held-out documents are used."""
    documents: int = 200
    """Documents of the text, at most."""
    out: str | None = None
    """Also write the figures to this JSON file."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    kernels: Implementation = "auto"
    """Implementation of the SAE's arithmetic: triton (NVIDIA GPUs), torch, or auto, the faster that the device has."""


@_on_kernels
def run_eval(config: EvalCommand) -> None:
    """`steersman eval`."""
    device = pick_device(config.device)
    sae, store = SAE.load(config.sae, device), ActivationStore.open(config.store)
    hook = check_same_origin(sae, store)
    lm, texts = None, None
    if config.model is not None:
        if config.text is None:
            raise SteersmanError("--model needs --text: the text to measure its loss on")
        lm = LanguageModel.load(config.model, device=device)
        lm.resolve_hook(hook)
        _check_model(sae, lm)
        source = open_text(config.text)
        texts = list(islice(source.documents(_first_document(store, source, config)), config.documents))
    result = evaluate_sae(sae, store, lm, texts, split=config.split, heldout_fraction=config.heldout_fraction)
    print(result.to_text())
    if config.out is not None:
        _write(Path(config.out), json.dumps(result.to_json(), indent=2) + "\n")


def _check_model(sae: SAE, lm: LanguageModel) -> None:
    if sae.cfg.model_name and not lm.matches(sae.cfg.model_name):
        raise SteersmanError(f"the SAE was trained on {sae.cfg.model_name}, the model given is {lm.name}")


def _first_document(store: ActivationStore, text: TextSource, config: EvalCommand) -> int:
    """Of the text a store was made from, the first document held out from training; of another text, the first."""
    if store.manifest.config.get("text") != text.identity():
        return 0
    start, stop = store.split_rows("heldout", config.heldout_fraction)
    return int(store.tokens(start, min(start + 1, stop)).doc_ids[0]) if stop > start else 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise SteersmanError(f"{path} could not be written: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand:
    """See what features fire on and which tokens they promote, from one pass over a store."""

    sae: str
    """Folder of the SAE."""
    store: str
    """Folder of a store of the SAE's hook point."""
    model: str
    """Folder or hub id of the model, for its tokenizer and output weights."""
    feature: tuple[int, ...] = ()
    """Feature ids to show; the `top` ones if none are given."""
    top: int = 20
    """How many features to show when none are named."""
    sort: Literal["max_act", "density", "id"] = "max_act"
    """What the shown ones are the first by: largest activation, density, or id."""
    contexts: int = 5
    """Contexts of each feature."""
    out: str | None = None
    """Write all features as JSON to this file; by default features.json in the SAE's folder."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, ..."""
    kernels: Implementation = "auto"
    """Implementation of the SAE's arithmetic: triton (NVIDIA GPUs), torch, or auto, the faster that the device has."""


@_on_kernels
def run_features(config: FeaturesCommand) -> None:
    """`steersman features`."""
    device = pick_device(config.device)
    sae, store = SAE.load(config.sae, device), ActivationStore.open(config.store)
    check_same_origin(sae, store)
    lm = LanguageModel.load(config.model, device=device)
    _check_model(sae, lm)
    for feature in config.feature:
        sae.check_feature(feature)
    summary = summarize_store(sae, store)
    ids = list(range(sae.cfg.d_sae))
    described = describe_features(sae, store, lm, summary, ids, config.contexts)
    out = Path(config.out) if config.out is not None else Path(config.sae) / "features.json"
    features_to_json(described, out)
    if sae.feature_stats is None:  # an SAE made elsewhere: max_act units can be used from now on
        save_statistics(summary.stats, Path(config.sae))
    key = {"max_act": lambda i: -described[i].max_act, "density": lambda i: -described[i].density, "id": lambda i: i}
    shown = list(config.feature) or sorted(ids, key=key[config.sort])[: config.top]
    print(features_to_text([described[i] for i in shown]), end="")
    print(f"{len(described)} features written to {out}")


@_on_kernels
def run_steer(config: SteerConfig) -> None:
    """`steersman steer`."""
    device = pick_device(config.device)
    sae = SAE.load(config.sae, device)
    lm = LanguageModel.load(config.model, device=device, dtype=config.dtype)
    print(steer_and_compare(lm, sae, config).to_text())
