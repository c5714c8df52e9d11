"""Features in full: contexts from every level of activation with each token's value, how strongly a feature fires, what
fires with it and what writes in its direction. From one pass over a store.

Shape letters: L latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.lm.pieces import Pieces
from steersman.sae import SAE
from steersman.sae.base import FeatureStats
from steersman.sae.coactivation import CoActive
from steersman.sae.features import Details, FeatureDetails, FeatureSummary
from steersman.sae.neighbours import Nearest, Neighbour, feature_neighbours
from steersman.train.reports.contexts import TokenContext, around, spread, token_contexts
from steersman.train.reports.features import Feature, described, read_features
from steersman.train.store.store import ActivationStore

N_INTERVALS = 5
"""Equal parts of 0 to a feature's largest activation, each shown with contexts of its own."""
PER_INTERVAL = 2
"""Contexts of each of them."""
N_NEIGHBOURS = 6


@dataclass(frozen=True, kw_only=True)
class ContextGroup:
    """Contexts of one interval of activations."""

    low: float
    """Smallest magnitude that belongs to it."""
    high: float
    """Largest."""
    share: float | None
    """Share of the feature's activations that are in it; None for the group of the largest."""
    contexts: list[TokenContext]
    """Largest first."""


@dataclass(frozen=True, kw_only=True)
class FeatureDetail:
    """Everything that is known of one feature."""

    feature: Feature
    """What the list of features says of it."""
    mean_act: float
    """Mean activation over the tokens it is active on."""
    count: int
    """Ordinary tokens it is active on."""
    histogram: list[int]
    """Its activations on those, in equal parts of 0 to `max_act`."""
    groups: list[ContextGroup]
    """The largest activations, then one group for each interval, from the highest down; none of no context."""
    neighbours: list[Neighbour]
    """Nearest by cosine of the decoder rows."""
    partners: list[CoActive]
    """Those that fire on its tokens, by the cosine of their activity."""


@dataclass(frozen=True, kw_only=True)
class DetailedReport:
    """The result of `detail_features`: all features in short, and each in full when it is asked for."""

    features: list[Feature]
    """Every feature, by id."""
    stats: FeatureStats
    """Statistics over the store."""
    details: FeatureDetails
    """What the pass kept."""
    model_name: str
    """The model."""
    hook_name: str
    """The hook point."""
    _summary: FeatureSummary
    _store: ActivationStore
    _pieces: Pieces
    _nearest: Nearest
    _n_contexts: int

    def __repr__(self) -> str:
        return f"DetailedReport({len(self.features)} features, {self.stats.n_tokens:,} tokens)"

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[FeatureDetail]:
        return map(self.detail, range(len(self)))

    def detail(self, feature: int) -> FeatureDetail:
        """One feature in full."""
        details = self.details
        histogram = details.histogram[feature].tolist()
        return FeatureDetail(
            feature=self.features[feature],
            mean_act=float(self.stats.mean_act[feature]),
            count=int(details.counts[feature]),
            histogram=histogram,
            groups=self._groups(feature, histogram),
            neighbours=self._nearest.of(feature),
            partners=details.partners.of(feature, details.counts),
        )

    def _groups(self, feature: int, histogram: list[int]) -> list[ContextGroup]:
        summary, details = self._summary, self.details
        kept = _KeptRows(
            values=torch.cat([summary.example_values[feature], details.sample_values[feature]]),
            rows=torch.cat([summary.example_rows[feature], details.sample_rows[feature]]),
            windows=torch.cat([details.example_windows[feature], details.sample_windows[feature]]),
            n_examples=summary.example_rows.shape[1],
        )
        chosen = _chosen(kept, self._store, float(self.stats.max_act[feature]), histogram, self._n_contexts)
        if not chosen:
            return []
        places = torch.tensor([i for group in chosen for i in group.members])
        found = around(self._store, kept.rows[places], kept.windows.shape[1] // 2)
        contexts = iter(token_contexts(self._pieces, kept.values[places], kept.windows[places].float(), found))
        return [
            ContextGroup(low=group.low, high=group.high, share=group.share,
                         contexts=[next(contexts) for _ in group.members])
            for group in chosen
        ]  # fmt: skip


class _KeptRows(NamedTuple):
    """What a pass kept of one feature: the examples, largest first, then what was drawn."""

    values: Tensor
    rows: Tensor
    """-1 where there are fewer."""
    windows: Tensor
    n_examples: int


class _Members(NamedTuple):
    """A group of contexts by their places among the kept rows."""

    low: float
    high: float
    share: float | None
    members: list[int]


def _chosen(
    kept: _KeptRows, store: ActivationStore, max_act: float, histogram: list[int], n_largest: int
) -> list[_Members]:
    """The largest, and of each interval a few others, those that were drawn before those that are known as large."""
    rows, sizes = kept.rows.tolist(), kept.values.abs().tolist()
    n_found = sum(row >= 0 for row in rows[: kept.n_examples])
    if not n_found:
        return []
    documents = store.row_info(kept.rows[:n_found]).doc_ids.tolist()
    largest = spread(documents, n_largest)
    groups = [_Members(sizes[largest[-1]], sizes[0], None, largest)]
    shown = {rows[i] for i in largest}
    drawn = [i for i in range(kept.n_examples, len(rows)) if rows[i] >= 0]
    drawn.sort(key=lambda i: rows[i] * 2654435761 % 2**32)  # an order that their values have no part in
    bins = len(histogram) // N_INTERVALS
    for part in reversed(range(N_INTERVALS)) if max_act > 0 else ():
        low, high = part * max_act / N_INTERVALS, (part + 1) * max_act / N_INTERVALS
        members: list[int] = []
        for i in [*drawn, *range(n_found)]:
            fits = low < sizes[i] <= high or (part == N_INTERVALS - 1 and sizes[i] > high)
            if fits and rows[i] not in shown and len(members) < PER_INTERVAL:
                members.append(i)
                shown.add(rows[i])
        if members:
            share = sum(histogram[part * bins : (part + 1) * bins]) / max(1, sum(histogram))
            groups.append(_Members(low, high, share, sorted(members, key=lambda i: -sizes[i])))
    return groups


def detail_features(
    sae: SAE, store: ActivationStore, lm: LanguageModel, contexts: int = 5, details: Details | None = None
) -> DetailedReport:
    """All features of `sae` in full, from one pass over the rows of `store`.

    Args:
        sae: the SAE.
        store: a store of its hook point.
        lm: its model, for the tokenizer and the output weights.
        contexts: contexts in the group of the largest activations.
        details: what the pass keeps of each feature.

    Raises:
        SteersmanError: SAE, store and model do not belong together.
    """
    check_sae_fits(lm, sae, store.hook_of(sae))
    summary = read_features(sae, store, details or Details())
    return detailed(sae, store, lm, summary, contexts)


def detailed(
    sae: SAE, store: ActivationStore, lm: LanguageModel, summary: FeatureSummary, contexts: int = 5,
    features: list[Feature] | None = None,
) -> DetailedReport:  # fmt: skip
    """The report of a pass that kept details; `features` is what is known of them in short, where it is."""
    assert summary.details is not None
    return DetailedReport(
        features=features or described(sae, store, lm, summary, list(range(sae.cfg.d_sae)), contexts),
        stats=summary.stats,
        details=summary.details,
        model_name=lm.name,
        hook_name=store.hook_of(sae),
        _summary=summary,
        _store=store,
        _pieces=Pieces(lm.tokenizer),
        _nearest=feature_neighbours(sae, n=N_NEIGHBOURS),
        _n_contexts=contexts,
    )
