"""Which features of an SAE fire together on the rows of a store."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from steersman.sae import SAE
from steersman.sae.coactivation import MAX_PAIRS, CoActive, CoActivity
from steersman.sae.metrics import large_rows
from steersman.train.reports.features import every_row
from steersman.train.store.store import ActivationStore


@dataclass(frozen=True, kw_only=True)
class CoActivations(Mapping[int, list[CoActive]]):
    """Feature id -> the features that fire on its tokens, best first: a mapping in the order that was asked for."""

    nearest: Mapping[int, list[CoActive]]
    """The features beside each."""
    n_tokens: int
    """Tokens looked at: the ordinary rows of the store."""
    share: float
    """Probability with which each of them was drawn for counting pairs; 1 where all were counted."""

    def __getitem__(self, feature: int) -> list[CoActive]:
        return self.nearest[feature]

    def __iter__(self) -> Iterator[int]:
        return iter(self.nearest)

    def __len__(self) -> int:
        return len(self.nearest)


@torch.no_grad()
def co_activating(
    sae: SAE, store: ActivationStore, features: Sequence[int], n: int = 10, *, max_pairs: int = MAX_PAIRS
) -> CoActivations:
    """The `n` features that fire with each of `features` most, by the cosine of their activity, from one pass over the
    store. Rows of huge norm (attention sinks) are left out, as in `summarize_features`.

    Where features and tokens make more than `max_pairs` pairs, tokens are drawn at random: see
    `steersman.sae.coactivation`.

    Raises SteersmanError for a feature id that is out of range, and a store of another hook point or model.
    """
    hook = store.hook_of(sae)
    for feature in features:
        sae.check_feature(feature)
    activity = CoActivity(sae.cfg.d_sae, features, max_pairs)
    limit = store.stats(hook).large_norm
    for batch in every_row(store, hook, "co-activation"):
        x = batch.x.to(sae.device)
        activity.add(sae.encode_sparse(x), large_rows(x, limit))
    table = activity.nearest(features, n)
    return CoActivations(
        nearest={feature: table.of(row, activity.counts) for row, feature in enumerate(features)},
        n_tokens=activity.n_tokens,
        share=activity.share,
    )
