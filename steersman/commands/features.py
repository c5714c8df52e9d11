"""`steersman features`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from steersman.commands.options import ComputeOptions, LabelOptions, PrintOptions, on_kernels
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.sae import SAE
from steersman.sae.features import Details
from steersman.sae.formats.saelens import save_statistics
from steersman.steer import FeatureScores
from steersman.steer.feature_values import feature_ids
from steersman.train import ActivationStore, DetailedReport
from steersman.train.reports.detailed import detailed
from steersman.train.reports.feature_file import load_features, save_features, source_of
from steersman.train.reports.features import Feature, features_to_text, read_features, summarize_features
from steersman.train.reports.summary_file import load_summary, save_summary
from steersman.ui.site import ScoreColumn, check_site, write_site


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(ComputeOptions, LabelOptions, PrintOptions):
    """See what features fire on and which tokens they promote, from one pass over a store; the same again is read from
    the file that it wrote."""

    sae: str
    """Folder of the SAE."""
    store: str
    """Folder of a store of the SAE's hook point."""
    model: str
    """Folder or hub id of the model, for its tokenizer and output weights."""
    feature: tuple[str, ...] = ()
    """Feature ids to show, and to have pages in the site; the `top` ones and all if none are given."""
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
    html: str | None = None
    """Folder of a site to write: a table of the features to search and sort, and a page for each with contexts of every
    level of activation. It opens from disk; one that is there is replaced, any other folder is not."""
    scores: str | None = None
    """File of `steersman scores`, for the site's table and pages."""


@on_kernels
def run(config: FeaturesCommand) -> None:
    """`steersman features`."""
    asked = feature_ids(config.feature)
    if config.html is not None:
        check_site(config.html)
    elif config.scores is not None:
        raise SteersmanError("--scores is for the site: give --html too")
    sae, store = config.load_sae(config.sae, config.labels), ActivationStore.open(config.store)
    scores = None if config.scores is None else _score_columns(config.scores, sae)
    hook = store.hook_of(sae)
    lm = config.load_model(config.model)
    check_sae_fits(lm, sae, hook)
    for feature in asked:
        sae.check_feature(feature)
    out = Path(config.out) if config.out is not None else Path(config.sae) / "features.json"
    source = source_of(sae, store, lm, config.contexts)
    stored = load_features(out, source) if sae.feature_stats is not None else None
    report = None if config.html is None else _in_full(config, sae, store, lm, out, {**source, "contexts": 0}, stored)
    described = stored or (_found(config, sae, store, lm) if report is None else report.features)
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
    record = [{**asdict(one), "label": sae.labels.text(one.id)} for one in chosen]
    config.show(lambda: features_to_text(chosen, sae.labels).rstrip("\n"), record)
    config.note(f"{len(described)} features {'written to' if stored is None else 'read from'} {out}")
    if report is not None and config.html is not None:
        page = write_site(report, config.html, name=config.sae, labels=sae.labels, scores=scores, only=asked)
        config.note(f"a page for each: open {page}")


def _found(config: FeaturesCommand, sae: SAE, store: ActivationStore, lm: LanguageModel) -> list[Feature]:
    """All features, from a pass over the store."""
    report = summarize_features(sae, store, lm, contexts=config.contexts)
    if sae.feature_stats is None:  # an SAE made elsewhere: max_act units can be used from now on
        save_statistics(report.stats, Path(config.sae))
    return report.features


def _in_full(
    config: FeaturesCommand, sae: SAE, store: ActivationStore, lm: LanguageModel, out: Path, source: dict[str, Any],
    described: list[Feature] | None,
) -> DetailedReport:  # fmt: skip
    """All features in full: from what a pass left beside the list of features, or from a pass. `described` is what is
    known of them in short, where it is."""
    kept = out.with_suffix(".safetensors")
    summary = load_summary(kept, source)
    if summary is None:
        summary = read_features(sae, store, Details())
        save_summary(kept, summary, source)
    if sae.feature_stats is None:
        save_statistics(summary.stats, Path(config.sae))
    return detailed(sae, store, lm, summary, config.contexts, described)


def _score_columns(path: str, sae: SAE) -> dict[str, ScoreColumn]:
    """The scores of a table as columns of the site. Raises SteersmanError for those of another SAE."""
    table = FeatureScores.load(path)
    table.check_sae(sae)
    return {name: ScoreColumn(column.values, column.unit) for name, column in table.items()}
