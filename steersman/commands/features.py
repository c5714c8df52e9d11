"""`steersman features`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steersman.commands.options import on_kernels
from steersman.device import pick_device
from steersman.kernels import Implementation
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.sae import SAE
from steersman.sae.formats.saelens import save_statistics
from steersman.train import ActivationStore
from steersman.train.reports.features import (
    check_same_origin,
    describe_features,
    features_to_json,
    features_to_text,
    summarize_store,
)


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


@on_kernels
def run(config: FeaturesCommand) -> None:
    """`steersman features`."""
    device = pick_device(config.device)
    sae, store = SAE.load(config.sae, device), ActivationStore.open(config.store)
    hook = check_same_origin(sae, store)
    lm = LanguageModel.load(config.model, device=device)
    check_sae_fits(lm, sae, hook)
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
