"""What a trainer reads: a source of activations, and its batches in the order of the steps."""

from collections.abc import Iterator
from typing import Any, Protocol

from steersman.train.run.recipe import Recipe, TrainConfig
from steersman.train.store.batch import ActivationBatch
from steersman.train.store.statistics import ActivationStats


class ActivationSource(Protocol):
    """What can be trained on: an `ActivationStore`, an `ActivationStream`, or anything that reads like one."""

    @property
    def hook_name(self) -> str: ...
    @property
    def model_name(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def stats(self) -> ActivationStats: ...
    def n_batches(
        self, batch_size: int, *, split: Any = "train", heldout_fraction: float = 0.05, drop_last: bool = True
    ) -> int | None: ...
    def batches(
        self,
        batch_size: int,
        *,
        split: Any = "train",
        heldout_fraction: float = 0.05,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        drop_last: bool = True,
    ) -> Iterator[ActivationBatch]: ...


def training_batches(
    source: ActivationSource, config: TrainConfig, recipe: Recipe, step: int, **share: Any
) -> Iterator[ActivationBatch]:
    """The batches of steps `step`, `step + 1`, ..., epoch after epoch."""
    an_epoch = source.n_batches(recipe.batch_size, split="train", heldout_fraction=config.heldout_fraction)
    epoch, start = divmod(step, an_epoch) if an_epoch else (0, step)
    reading = {"split": "train", "heldout_fraction": config.heldout_fraction, "seed": config.seed, **share}
    while True:
        yield from source.batches(recipe.batch_size, epoch=epoch, start=start, **reading)
        epoch, start = epoch + 1, 0
