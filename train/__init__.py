"""Text to tokens to activations to a store to a trained SAE, on one process or many."""

from steersman.train.batch import ActivationBatch, RowInfo
from steersman.train.recipe import Recipe, TrainConfig, resolve
from steersman.train.statistics import ActivationStats
from steersman.train.store import ActivationStore
from steersman.train.trainer import ActivationSource, Trainer, train_sae

__all__ = [
    "ActivationBatch",
    "ActivationSource",
    "ActivationStats",
    "ActivationStore",
    "Recipe",
    "RowInfo",
    "TrainConfig",
    "Trainer",
    "resolve",
    "train_sae",
]
