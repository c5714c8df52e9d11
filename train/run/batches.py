"""A source of activations as the steps of a run take it: this replica's rows of every batch, epoch after epoch."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.parallel import Ranks
from steersman.sae import SAE
from steersman.train.run.recipe import Recipe, TrainConfig
from steersman.train.store.batch import ActivationBatch, ActivationSource


def split_options(config: TrainConfig) -> dict[str, Any]:
    """What fixes a source's training and held-out rows and their order, for its `batches`."""
    return {"heldout_fraction": config.heldout_fraction, "seed": config.seed}


def training_batches(
    source: ActivationSource, config: TrainConfig, recipe: Recipe, ranks: Ranks, step: int, device: torch.device
) -> Generator[Tensor]:
    """The rows of this rank's replica in steps `step`, `step + 1`, ..., [N / replicas, D]; of an architecture that
    trains on labels [N, D + 1], the label last.

    In a job of several ranks, each reads a part of them, and while one batch is trained on, the ranks of the replica
    exchange the next.
    """
    mesh, ready = ranks.mesh, None
    if mesh.world_size == 1:
        yield from _epochs(source, config, recipe, step)
    part = {"rank": mesh.rank, "world_size": mesh.world_size}
    for x in _epochs(source, config, recipe, step, **part):
        following: Callable[[], Tensor] = ranks.latent.all_gather_later(x.to(device, non_blocking=True))
        if ready is not None:
            yield ready().flatten(0, 1)
        ready = following


def _epochs(source: ActivationSource, config: TrainConfig, recipe: Recipe, step: int, **part: Any) -> Iterator[Tensor]:
    an_epoch = source.n_batches(recipe.batch_size, split="train", heldout_fraction=config.heldout_fraction)
    epoch, start = divmod(step, an_epoch) if an_epoch else (0, step)
    labelled = bool(SAE.architectures[config.architecture].supervised)
    while True:
        options = {"split": "train", "epoch": epoch, "start": start, **split_options(config), **part}
        for batch in source.batches(recipe.batch_size, **options):
            yield with_labels(batch) if labelled else batch.x
        epoch, start = epoch + 1, 0


def with_labels(batch: ActivationBatch) -> Tensor:
    """The rows of a batch with their labels as a last column, which every type of activation holds exactly."""
    if batch.labels is None:
        raise SteersmanError("a source without labels cannot be trained on with them")
    return torch.cat([batch.x, batch.labels.to(batch.x)[:, None]], dim=1)
