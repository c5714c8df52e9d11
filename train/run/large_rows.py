"""Rows of huge norm in training: left out, their places in a batch taken by other rows of it.

A few rows of a transformer's residual stream, those of attention sinks (arXiv 2309.17453, 2402.17762), are tens to
thousands of times as long as the others. Two in a hundred of them can hold most of the variance: they would set the
scale of the inputs and nearly all of the loss. A row is large when its norm is above `max_norm_ratio` times the median.

In a batch the first ordinary rows stand in for the large ones. Batches are shuffled, so these are rows like any others.
Batches stay full and of one shape; which rows are trained on follows from the batch alone, whatever the number of
ranks, and nothing is to be remembered between two steps. (A batch that holds large rows only is left as it is.)

Shape letters: N rows of this replica's part of a batch, R replicas, D width.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from steersman.parallel import RankGroup
from steersman.train.run.batches import split_options
from steersman.train.run.recipe import Recipe, TrainConfig
from steersman.train.store.batch import ActivationSource
from steersman.train.store.statistics import LARGE_NORM_RATIO, ActivationStats, StatsSums, row_norms

log = logging.getLogger(__name__)

_SAMPLE = 65_536
"""Rows over which the statistics of ordinary rows are taken, where a source's own are ruled by large ones."""


def largest_ordinary(stats: ActivationStats, ratio: float | None) -> float:
    """The largest norm that a row has without being large; infinite where none is to be, or where the median is 0."""
    return ratio * stats.median_norm if ratio and stats.median_norm else float("inf")


def which_large(rows: Tensor, limits: Sequence[tuple[int, float]]) -> Tensor:
    """Which of rows [N, D] are large, [N] bool. Each of `limits` is of one hook point of those side by side: its width,
    and the largest norm that a row of it has without being large."""
    large = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for part, (_, limit) in zip(rows.split([width for width, _ in limits], dim=1), limits):
        large |= row_norms(part) > limit
    return large


def stand_ins(large: Tensor) -> Tensor:
    """Which row of a batch stands at each place, [N] int64: the row itself, or for the n-th large one the n-th that is
    not. Nothing here waits for the device.

    >>> stand_ins(torch.tensor([False, True, False, True, False])).tolist()
    [0, 0, 2, 2, 4]
    """
    ordinary_first = torch.sort(large.to(torch.uint8), stable=True).indices
    n_ordinary = (~large).sum().clamp_min(1)
    nth = large.cumsum(0) - 1
    return torch.where(large, ordinary_first[nth % n_ordinary], torch.arange(len(large), device=large.device))


class LargeRows:
    """Takes the large rows out of the batches of a run and counts them. Replicas call its methods together."""

    def __init__(self, limits: Sequence[tuple[int, float]], data: RankGroup, device: torch.device) -> None:
        """`limits` is that of `which_large`, `data` the group of the replicas that share a batch."""
        self._limits, self._data = limits, data
        self.active = any(limit < float("inf") for _, limit in limits)
        """Whether there may be any."""
        self.n_replaced = torch.zeros(1, dtype=torch.int64, device=device)
        """Large rows so far, of this replica's parts of the batches."""

    def replaced(self, rows: Tensor) -> Tensor:
        """This replica's rows [N, D] of a batch with ordinary rows of the batch in the places of large ones."""
        if not self.active:
            return rows
        large = which_large(rows, self._limits)
        self.n_replaced += large.sum()
        if self._data.size == 1:
            return rows.index_select(0, stand_ins(large))
        everywhere = self._data.all_gather(large.to(torch.uint8)).flatten().bool()
        wanted = stand_ins(everywhere)[everywhere]
        if not len(wanted):
            return rows
        first = self._data.index * len(rows)
        here = (wanted >= first) & (wanted < first + len(rows))
        given = torch.zeros(len(wanted), rows.shape[1], device=rows.device)
        given[here] = rows[wanted[here] - first].float()
        self._data.all_reduce_sum_(given)  # each is one replica's and zero elsewhere, so the sum is exact
        before = int(everywhere[:first].sum())
        rows = rows.clone()
        rows[large] = given[before : before + int(large.sum())].to(rows.dtype)
        return rows

    def total(self) -> int:
        """Large rows so far in all replicas' parts."""
        return int(self._data.all_reduce_sum_(self.n_replaced.clone()))


def ordinary_stats(
    source: ActivationSource, config: TrainConfig, recipe: Recipe, parts: Sequence[ActivationStats]
) -> list[ActivationStats]:
    """`parts`, the statistics of the source's hook points side by side, with the means of the rows that are trained on.

    Where no row is large they stay what they are; else they are taken over the first rows of the training split in the
    order of `batches`, the same on every rank. Medians, largest norms and counts stay those of all rows.
    """
    limits = [(len(stats.mean), largest_ordinary(stats, config.max_norm_ratio)) for stats in parts]
    if all(stats.max_norm <= limit for stats, (_, limit) in zip(parts, limits)):
        return list(parts)
    sums = [StatsSums(width) for width, _ in limits]
    batches = source.batches(recipe.batch_size, split="train", **split_options(config))
    for batch in islice(batches, max(1, _SAMPLE // recipe.batch_size)):
        x = batch.x[~which_large(batch.x, limits)]
        for total, part in zip(sums, x.split([width for width, _ in limits], dim=1)):
            total.add(part, row_norms(part))
    found = [total.stats() for total in sums]
    if not found[0].n_rows:
        return list(parts)
    return [
        replace(stats, mean=one.mean, mean_norm=one.mean_norm, mean_squared_norm=one.mean_squared_norm)
        for stats, one in zip(parts, found)
    ]


def say_large_rows(hook_name: str, stats: ActivationStats, ratio: float | None) -> None:
    """Warn of large rows before training, and say what is done about them."""
    if not stats.n_large:
        return
    done = (
        f"rows above {ratio:g} x the median are left out of training (max_norm_ratio)"
        if ratio
        else (f"they take part in training: max_norm_ratio={LARGE_NORM_RATIO:g} leaves them out")
    )
    log.warning("%s: %s; %s", hook_name, stats.large_rows(), done)
