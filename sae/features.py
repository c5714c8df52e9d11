"""What each feature does on a set of tokens: density, activation levels and the tokens it fires on.

One pass over the activations; memory depends on the number of features, not of tokens.

Shape letters: N tokens of a batch, L latents, K active latents a token, M kept examples a feature, S drawn ones, W rows
of a window, B bins, P partners.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.sae.base import SAE, FeatureStats
from steersman.sae.coactivation import MAX_PAIRS, CoActiveTable, CoActivity
from steersman.sae.feature_examples import LevelSamples, Stretch, TopExamples
from steersman.sae.feature_levels import Levels
from steersman.sae.metrics import FeatureSums, large_rows


@dataclass(frozen=True, kw_only=True)
class Details:
    """What `summarize_features` keeps of every feature beside its largest activations. With the defaults about 4 kB a
    feature."""

    reach: int = 10
    """Rows on each side of a kept token on which the feature's activation is kept too."""
    per_level: int = 2
    """Activations drawn at random of each of fifteen levels, a third of an octave each, below the largest."""
    bins: int = 40
    """Bins of the histogram."""
    partners: int = 6
    """Features that fire with it."""
    max_pairs: int = MAX_PAIRS
    """Pairs of features counted, beyond which tokens are drawn: see `steersman.sae.coactivation`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureDetails:
    """What `Details` asked for."""

    example_windows: Tensor
    """[L, M, W] fp16: the activations around each example, W = 2 * reach + 1; 0 beyond the rows that were read one
    after another, and beside an example on a row of huge norm."""
    sample_values: Tensor
    """[L, S] fp32: activations drawn from all levels on ordinary rows (see `LevelSamples`); 0 where there are fewer."""
    sample_rows: Tensor
    """[L, S] int64: the rows they are on; -1 where there are fewer."""
    sample_windows: Tensor
    """[L, S, W] fp16: the activations around them."""
    histogram: Tensor
    """[L, B] int32: activations on ordinary rows in equal parts of 0 to max_act."""
    partners: CoActiveTable
    """[L, P]: the features that fire with each most."""
    counts: Tensor
    """[L] int64: ordinary rows on which each fires."""
    n_ordinary: int
    """Ordinary rows."""
    share: float
    """Probability with which a row was drawn for `partners`; 1 where all pairs were counted."""


@dataclass(frozen=True, kw_only=True)
class FeatureSummary:
    """Summary of every feature over `stats.n_tokens` tokens. L latents, M examples a feature."""

    stats: FeatureStats
    """Density, largest and mean activation."""
    p999: Tensor
    """[L] fp32: 99.9th percentile of the activations over the ordinary rows where the feature is active, from a
    histogram with 16 bins an octave (so within 4.4 %); 0 where it is active on none."""
    example_values: Tensor
    """[L, M] fp32: the largest activations (of a signed code those of largest magnitude, with their signs), largest
    first; 0 where there are fewer. On ordinary rows or, for a feature that fires on none, on rows of huge norm."""
    example_rows: Tensor
    """[L, M] int64: the store's rows they are on; -1 where there are fewer."""
    details: FeatureDetails | None = None
    """What else was asked for."""


class Rows(NamedTuple):
    """Some tokens: their activations x [N, D] and their row numbers [N] in the store."""

    x: Tensor
    rows: Tensor


@torch.no_grad()
def summarize_features(
    sae: SAE,
    batches: Iterable[Rows],
    median_norm: float,
    n_examples: int = 30,
    max_norm: float = float("inf"),
    details: Details | None = None,
) -> FeatureSummary:
    """Statistics and the largest activations of every feature, in one pass over `batches`; rows longer than `max_norm`
    are no ordinary ones. With `details` also what those ask for, for which rows come in the order of the text.

    >>> from steersman.sae import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=4, d_sae=8, k=2))
    >>> batches = [Rows(torch.randn(20, 4), torch.arange(20))]
    >>> summarize_features(sae, batches, median_norm=2.0, n_examples=3).example_rows.shape
    torch.Size([8, 3])
    """
    L, device = sae.cfg.d_sae, sae.device
    unit, reach = median_norm / sae.cfg.d_in**0.5, 0 if details is None else details.reach
    width = 0 if details is None else 2 * reach + 1
    examples, of_large = TopExamples(L, n_examples, width, device), TopExamples(L, n_examples, 0, device)
    samples = LevelSamples(L, details.per_level, unit, width, device) if details is not None else None
    activity = None if details is None else CoActivity(L, None if details.partners else (), details.max_pairs)
    levels, sums, stretch = Levels(L, unit, device), FeatureSums(L, device), Stretch(reach, L)

    def merge() -> None:
        ordinary = stretch.entries(large=False)
        levels.add(ordinary.values, ordinary.latents)
        examples.merge(ordinary, stretch)
        of_large.merge(stretch.entries(large=True), stretch)
        if samples is not None:
            samples.merge(ordinary, stretch)

    for x, rows in batches:
        x, rows = x.to(device), rows.to(device)
        code, large = sae.encode_sparse(x), large_rows(x, max_norm)
        sums.add(code, large)
        if activity is not None:
            activity.add(code, large)
        stretch.add(code, rows, large)
        merge()
    if reach and stretch.code is not None:
        stretch.end()
        merge()
    on_large_alone = (examples.rows[:, :1] < 0).expand_as(examples.rows)
    values = torch.where(on_large_alone, of_large.values, examples.values)
    kept = None
    if details is not None and samples is not None and activity is not None:
        examples.windows[..., reach] = values.clamp(*_HALF)  # beside a token on a row of huge norm nothing is kept
        sample_values, sample_rows, sample_windows = samples.of_features()
        kept = FeatureDetails(
            example_windows=examples.windows.cpu(),
            sample_values=sample_values.cpu(),
            sample_rows=sample_rows.cpu(),
            sample_windows=sample_windows.cpu(),
            histogram=levels.linear(details.bins, sums.largest).cpu(),
            partners=activity.nearest(range(L), details.partners),
            counts=activity.counts,
            n_ordinary=activity.n_tokens,
            share=activity.share,
        )
    return FeatureSummary(
        stats=sums.stats(median_norm),
        p999=levels.percentile(0.999, sums.largest).cpu(),
        example_values=values.cpu(),
        example_rows=torch.where(on_large_alone, of_large.rows, examples.rows).cpu(),
        details=kept,
    )


_HALF = (torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)
