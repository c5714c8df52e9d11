"""`steersman features`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steersman.commands.options import ComputeOptions, PrintOptions, on_kernels
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.sae import SAE
from steersman.sae.formats.saelens import save_statistics
from steersman.steer.feature_values import feature_ids
from steersman.train import ActivationStore
from steersman.train.reports.feature_file import load_features, save_features, source_of
from steersman.train.reports.features import Feature, features_to_text, summarize_features


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(ComputeOptions, PrintOptions):
    """See what features fire on and which tokens they promote, from one pass over a store; the same again is read from
    the file that it wrote."""

    sae: str
    """Folder of the SAE."""
    store: str
    """Folder of a store of the SAE's hook point."""
    model: str
    """Folder or hub id of the model, for its tokenizer and output weights."""
    feature: tuple[str, ...] = ()
    """Feature ids to show; the `top` ones if none are given."""
    top: int = 20
    """How many features to show when none are named."""
    sort: Literal["typical", "max_act", "density", "id"] = "typical"
    """What the shown ones are the first by: typical is the tenth largest activation, which a few odd tokens do not
    raise; or the largest activation, the density, or the id."""
    contexts: int = 5
    """Contexts of each feature."""
    out: str | None = None
    """File of all features as JSON, written or, where it has what is asked for, read; by default features.json in the
    SAE's folder."""


@on_kernels
def run(config: FeaturesCommand) -> None:
    """`steersman features`."""
    asked = feature_ids(config.feature)
    sae, store = config.load_sae(config.sae), ActivationStore.open(config.store)
    hook = store.hook_of(sae)
    lm = config.load_model(config.model)
    check_sae_fits(lm, sae, hook)
    for feature in asked:
        sae.check_feature(feature)
    out = Path(config.out) if config.out is not None else Path(config.sae) / "features.json"
    source = source_of(sae, store, lm, config.contexts)
    stored = load_features(out, source) if sae.feature_stats is not None else None
    described = stored or _found(config, sae, store, lm)
    if stored is None:
        save_features(out, described, source)
    key = {
        "typical": lambda i: -described[i].typical_act,
        "max_act": lambda i: -described[i].max_act,
        "density": lambda i: -described[i].density,
        "id": lambda i: i,
    }
    shown = asked or sorted(range(len(described)), key=key[config.sort])[: config.top]
    chosen = [described[i] for i in shown]
    config.show(lambda: features_to_text(chosen).rstrip("\n"), chosen)
    config.note(f"{len(described)} features {'written to' if stored is None else 'read from'} {out}")


def _found(config: FeaturesCommand, sae: SAE, store: ActivationStore, lm: LanguageModel) -> list[Feature]:
    """All features, from a pass over the store."""
    report = summarize_features(sae, store, lm, contexts=config.contexts)
    if sae.feature_stats is None:  # an SAE made elsewhere: max_act units can be used from now on
        save_statistics(report.stats, Path(config.sae))
    return report.features
