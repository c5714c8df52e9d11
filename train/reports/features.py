"""Features a person can read: the contexts they fire on and the words they write, from a store and its model.

Shape letters: L latents.
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from steersman.config import check_types, merged
from steersman.files import write_json
from steersman.html import card
from steersman.lm import LanguageModel
from steersman.lm.lens import logit_lens
from steersman.lm.origin import check_sae_fits
from steersman.progress import progress
from steersman.sae import SAE
from steersman.sae.base import FeatureStats
from steersman.sae.features import FeatureSummary, Rows
from steersman.sae.features import summarize_features as summarize_rows
from steersman.train.store.batch import RowInfo
from steersman.train.store.statistics import LARGE_NORM_RATIO
from steersman.train.store.store import ActivationStore
from steersman.visible import visible

BATCH_ROWS = 8192

_NEWLINE = "⏎"
_TENTH = 9
SHOWN = 20
"""Features of a report that a notebook shows."""
N_EXAMPLES = 30
"""Largest activations kept of each feature, among which contexts are chosen."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One token that a feature fires on, in its text."""

    activation: float
    """The feature's activation on the token."""
    before: str
    """Text before the token that the model read with it: within its document and its context."""
    token: str
    """The token itself."""
    after: str
    """Text after the token, within its document and its context."""
    document: int
    """Number of the document in the text source."""
    position: int
    """Place of the token in its context."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What is known of one feature."""

    id: int
    """Feature id."""
    density: float
    """Fraction of the tokens it is active on."""
    max_act: float
    """Largest activation on ordinary rows (see `FeatureStats`)."""
    typical_act: float
    """Its tenth largest activation, 0 where it has fewer: how strongly it fires in several places, which a few odd
    tokens do not raise as they do `max_act`."""
    p999: float
    """99.9th percentile of its activations, over the ordinary rows it is active on."""
    fires_on: list[str]
    """Tokens at its largest activations, those with most of them first: what it stands for, most of all in early
    layers, whose decoder rows are far from the output."""
    promotes: list[str]
    """Tokens whose logits its decoder row raises most, largest first (empty for models without an output layer)."""
    suppresses: list[str]
    """Tokens whose logits it lowers most."""
    contexts: list[Context]
    """Its largest activations, at most one a document while there are enough documents; on rows of huge norm only where
    it fires on no other."""


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
    hook = store.hook_of(sae)
    check_sae_fits(lm, sae, hook)
    ids = list(config.only) or list(range(sae.cfg.d_sae))
    for feature in ids:
        sae.check_feature(feature)
    batches = store.batches(BATCH_ROWS, hook=hook, split="all", shuffle=False, drop_last=False)
    total = store.n_batches(BATCH_ROWS, split="all", drop_last=False)
    bar = progress(batches, desc="features", total=total, unit="batch")
    rows = (Rows(batch.x, batch.rows) for batch in bar)
    median = store.stats(hook).median_norm
    summary = summarize_rows(sae, rows, median, N_EXAMPLES, LARGE_NORM_RATIO * median or float("inf"))
    return FeatureReport(features=_described(sae, store, lm, summary, ids, config.contexts), stats=summary.stats)


def _described(
    sae: SAE, store: ActivationStore, lm: LanguageModel, summary: FeatureSummary, ids: list[int], n_contexts: int
) -> list[Feature]:
    writes = logit_lens(lm, sae.W_dec.detach()[ids])
    described = []
    for feature, (promotes, suppresses) in zip(ids, writes):
        values, rows = summary.example_values[feature], summary.example_rows[feature]
        found = values != 0
        described.append(
            Feature(
                id=feature,
                density=float(summary.stats.density[feature]),
                max_act=float(summary.stats.max_act[feature]),
                typical_act=_typical(values[found], float(summary.stats.max_act[feature])),
                p999=float(summary.p999[feature]),
                fires_on=_fires_on(lm.tokenizer, values[found], store.row_info(rows[found]).token_ids),
                promotes=promotes,
                suppresses=suppresses,
                contexts=_contexts(store, lm.tokenizer, values[found], rows[found], n_contexts),
            )
        )
    return described


def _typical(values: Tensor, max_act: float) -> float:
    """The tenth of a feature's largest activations [n], largest first; at most `max_act`, which is 0 where it fires on
    rows of huge norm alone."""
    return min(float(values[_TENTH].abs()), max_act) if len(values) > _TENTH else 0.0


def _contexts(
    store: ActivationStore, tokenizer: Any, values: Tensor, rows: Tensor, n_contexts: int, width: int = 12
) -> list[Context]:
    """The contexts of `rows` with the activations `values`, one a document first, then whatever comes next."""
    documents = store.row_info(rows).doc_ids.tolist()
    first = {}
    for i, document in enumerate(documents):
        first.setdefault(document, i)
    chosen = list(first.values())
    chosen += [i for i in range(len(documents)) if i not in first.values()]
    contexts = []
    for i in sorted(chosen[:n_contexts]):
        row = int(rows[i])
        start, stop = max(0, row - width), min(store.n_rows, row + width + 1)
        info = store.tokens(start, stop)
        ids, here = info.token_ids.tolist(), row - start
        low, high = _same_context(info, here)
        before, after = ids[low:here], ids[here + 1 : high]
        head = tokenizer.decode(before)
        upto = tokenizer.decode([*before, ids[here]])
        whole = tokenizer.decode([*before, ids[here], *after])
        contexts.append(
            Context(
                activation=float(values[i]),
                before=head,
                token=upto[len(head) :] if upto.startswith(head) else tokenizer.decode([ids[here]]),
                after=whole[len(upto) :] if whole.startswith(upto) else tokenizer.decode(after),
                document=documents[i],
                position=int(info.positions[here]),
            )
        )
    return contexts


def _same_context(info: RowInfo, here: int) -> tuple[int, int]:
    """First and end of the stretch of rows around `here` that the model read together: one document, in one context. A
    context ends where positions do not rise; where a store knows none, they are all 0, the document alone counts."""
    documents, positions = info.doc_ids.tolist(), info.positions.tolist()
    known = any(positions)
    joined = [
        one == other and (not known or position < following)
        for one, other, position, following in zip(documents, documents[1:], positions, positions[1:])
    ]
    low, high = here, here + 1
    while low > 0 and joined[low - 1]:
        low -= 1
    while high <= len(joined) and joined[high - 1]:
        high += 1
    return low, high


def _fires_on(tokenizer: Any, values: Tensor, token_ids: Tensor, n: int = 5) -> list[str]:
    """The tokens at a feature's largest activations, by the sum of their activations there, largest first."""
    total: dict[int, float] = {}
    for value, token in zip(values.abs().tolist(), token_ids.tolist()):
        total[token] = total.get(token, 0.0) + value
    return [tokenizer.decode([token]) for token in sorted(total, key=lambda token: -total[token])[:n]]


def _quoted(tokens: list[str]) -> str:
    return "  ".join(f"'{visible(token, newline=_NEWLINE)}'" for token in tokens)


def features_to_text(features: list[Feature]) -> str:
    """Features for a terminal: the token that fired stands between «» in each context."""
    lines = []
    for feature in features:
        head = f"feature {feature.id}   density {100 * feature.density:.3f} %   max {feature.max_act:.2f}"
        lines.append(f"{head}   p99.9 {feature.p999:.2f}")
        if feature.fires_on:
            lines.append("  fires on    " + _quoted(feature.fires_on))
        if feature.promotes:
            lines.append("  promotes    " + _quoted(feature.promotes))
            lines.append("  suppresses  " + _quoted(feature.suppresses))
        for context in feature.contexts:
            text = visible(f"{context.before}«{context.token}»{context.after}", newline=_NEWLINE)
            lines.append(f"  {context.activation:8.2f}  {text}")
        if not feature.contexts:
            lines.append("  never active on this store")
        elif feature.max_act == 0:
            lines.append("  active on rows of huge norm alone (attention sinks)")
        lines.append("")
    return "\n".join(lines)
