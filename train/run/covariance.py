"""The covariance of the rows that are trained on, which whitening needs: one pass over a sample of them.

Shape letters: N rows of a batch, D width.
"""

from itertools import islice

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.parallel import Ranks
from steersman.train.run.batches import split_options
from steersman.train.run.large_rows import largest_ordinary, which_large
from steersman.train.run.recipe import Recipe, TrainConfig
from steersman.train.store.batch import ActivationSource
from steersman.train.store.statistics import ActivationStats

_SAMPLE, _ROWS_OF_DIMENSION = 65_536, 16
"""Rows of the sample: so many, or so many for each dimension where that is more."""
_LEAST_OF_DIMENSION = 2
"""Rows of a dimension below which a covariance says little."""


def sample_rows(width: int) -> int:
    """Rows over which the covariance is taken, where there are as many."""
    return max(_SAMPLE, _ROWS_OF_DIMENSION * width)


def sample_covariance(
    source: ActivationSource,
    config: TrainConfig,
    recipe: Recipe,
    stats: ActivationStats,
    ranks: Ranks,
    device: torch.device,
) -> Tensor:
    """The covariance [D, D] float64 around `stats.mean`, over the first rows of the training split in the order of the
    run's seed, large ones left out as in training. All ranks read the same rows and have the bits of rank 0.

    Raises SteersmanError for fewer rows than twice the width.
    """
    width = len(stats.mean)
    limits = [(width, largest_ordinary(stats, config.max_norm_ratio))]
    mean = stats.mean.to(device).double()
    products, n = torch.zeros(width, width, dtype=torch.float64, device=device), 0
    batches = source.batches(recipe.batch_size, split="train", **split_options(config))
    for batch in islice(batches, -(-sample_rows(width) // recipe.batch_size)):
        x = batch.x.to(device)
        centred = x[~which_large(x, limits)].double() - mean
        products.addmm_(centred.T, centred)
        n += len(centred)
    if n < _LEAST_OF_DIMENSION * width:
        raise SteersmanError(
            f"whitening {width} dimensions needs at least {_LEAST_OF_DIMENSION * width:,} rows to train on, and there "
            f"are {n:,}: give more text, or leave out whiten"
        )
    covariance = (products / n).cpu()
    return ranks.on_rank_zero(lambda: covariance)
