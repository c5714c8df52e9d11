"""Features a person can read: the contexts they fire on and the words they write, from a store and its model."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steersman.config import check_types, merged
from steersman.files import write_json
from steersman.html import card
from steersman.lm import LanguageModel
from steersman.lm.lens import logit_lens
from steersman.lm.origin import canonical_hook, check_sae_fits
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.base import FeatureStats
from steersman.sae.features import Details, FeatureSummary, Rows
from steersman.sae.features import summarize_features as summarize_rows
from steersman.train.reports.contexts import around, plain_contexts, spread
from steersman.train.reports.feature import Context, Feature, features_to_text
from steersman.train.store.batch import ActivationBatch
from steersman.train.store.store import ActivationStore

__all__ = ["Context", "Feature", "FeatureReport", "FeaturesConfig", "features_to_text", "summarize_features"]

BATCH_ROWS = 8192

_TENTH = 9
SHOWN = 20
"""Features of a report that a notebook shows."""
N_EXAMPLES = 30
"""Largest activations kept of each feature, among which contexts are chosen."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which features to summarize, and how much of each."""

    only: tuple[int, ...] = ()
    """Ids of the features to describe; all of them if none are given."""
    contexts: int = 5
    """Contexts of each feature."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class FeatureReport:
    """The result of `summarize_features`."""

    features: list[Feature]
    """The features that were asked for, in that order."""
    stats: FeatureStats
    """Statistics of every feature over the store."""

    def __repr__(self) -> str:
        return (
            f"FeatureReport({len(self.features)} features of {len(self.stats.max_act)}, {self.stats.n_tokens:,} tokens)"
        )

    def _repr_html_(self) -> str:
        first = sorted(self.features, key=lambda feature: -feature.typical_act)[:SHOWN]
        rows = [[f.id, f.density, f.max_act, " ".join(f.fires_on), " ".join(f.promotes)] for f in first]
        header = ["feature", "density", "largest activation", "fires on", "promotes"]
        return card(repr(self), tables=[(header, rows)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the features as a JSON list."""
        write_json(path, [asdict(feature) for feature in self.features], indent=1, ensure_ascii=False)


def summarize_features(
    sae: SAE, store: ActivationStore, lm: LanguageModel, config: FeaturesConfig | None = None, **overrides: Any
) -> FeatureReport:
    """What the features of `sae` fire on in `store` and which tokens of `lm` they promote, from one pass over all rows.

    Args:
        sae: the SAE.
        store: a store of its hook point.
        lm: its model, for the tokenizer and the output weights.
        config: a `FeaturesConfig`.
        overrides: fields of `FeaturesConfig`, over those of `config`.

    Raises:
        SteersmanError: SAE, store and model do not belong together; a feature id that is out of range.
    """
    config = merged(FeaturesConfig, config, overrides)
    check_sae_fits(lm, sae, store.hook_of(sae))
    ids = list(config.only) or list(range(sae.cfg.d_sae))
    for feature in ids:
        sae.check_feature(feature)
    summary = read_features(sae, store)
    return FeatureReport(features=described(sae, store, lm, summary, ids, config.contexts), stats=summary.stats)


def every_row(store: ActivationStore, hook: str, desc: str) -> Iterable[ActivationBatch]:
    """All rows of a hook point in the order of the text, with a bar."""
    batches = store.batches(BATCH_ROWS, hook=hook, split="all", shuffle=False, drop_last=False)
    total = store.n_batches(BATCH_ROWS, split="all", drop_last=False)
    return progress(batches, desc=desc, total=total, unit="batch")


def read_features(sae: SAE, store: ActivationStore, details: Details | None = None) -> FeatureSummary:
    """The one pass over all rows of the store, in the order of the text."""
    hook = store.hook_of(sae)
    rows = (Rows(batch.x, batch.rows) for batch in every_row(store, hook, "features"))
    stats = store.stats(hook)
    summary = summarize_rows(sae, rows, stats.median_norm, N_EXAMPLES, stats.large_norm, details)
    if not sae.cfg.transcoder:
        return summary
    written = canonical_hook(sae.cfg.hook_name_out)  # the unit of strengths is that of what it writes
    known = sae.feature_stats.median_norm if sae.feature_stats is not None else 0.0
    known = store.stats(written).median_norm if written in store.hook_names else known
    return replace(summary, stats=replace(summary.stats, median_norm=known))


def described(
    sae: SAE, store: ActivationStore, lm: LanguageModel, summary: FeatureSummary, ids: list[int], n_contexts: int
) -> list[Feature]:
    """The features `ids` in words, from what a pass found."""
    writes = logit_lens(lm, sae.W_dec.detach()[ids])
    features = []
    for feature, (promotes, suppresses) in zip(ids, writes):
        values, rows = summary.example_values[feature], summary.example_rows[feature]
        values, rows = values[values != 0], rows[values != 0]
        info = store.row_info(rows)
        chosen = torch.tensor(spread(info.doc_ids.tolist(), n_contexts), dtype=torch.int64)
        features.append(
            Feature(
                id=feature,
                density=float(summary.stats.density[feature]),
                max_act=float(summary.stats.max_act[feature]),
                typical_act=_typical(values, float(summary.stats.max_act[feature])),
                p999=float(summary.p999[feature]),
                fires_on=_fires_on(lm.tokenizer, values, info.token_ids),
                promotes=promotes,
                suppresses=suppresses,
                contexts=plain_contexts(lm.tokenizer, values[chosen], around(store, rows[chosen])),
            )
        )
    return features


def _typical(values: Tensor, max_act: float) -> float:
    """The tenth of a feature's largest activations [n], largest first; at most `max_act`, which is 0 where it fires on
    rows of huge norm alone."""
    return min(float(values[_TENTH].abs()), max_act) if len(values) > _TENTH else 0.0


def _fires_on(tokenizer: Any, values: Tensor, token_ids: Tensor, n: int = 5) -> list[str]:
    """The tokens at a feature's largest activations, by the sum of their activations there, largest first."""
    total: dict[int, float] = {}
    for value, token in zip(values.abs().tolist(), token_ids.tolist()):
        total[token] = total.get(token, 0.0) + value
    return [tokenizer.decode([token]) for token in sorted(total, key=lambda token: -total[token])[:n]]
