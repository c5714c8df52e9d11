"""Text to tokens to activations to a store to a trained SAE, on one process or many."""

from steersman.train.batch import ActivationBatch, RowInfo
from steersman.train.cache import CacheConfig, cache_activations
from steersman.train.recipe import Recipe, TrainConfig, resolve
from steersman.train.source import ActivationSource
from steersman.train.statistics import ActivationStats
from steersman.train.store import ActivationStore
from steersman.train.stream import ActivationStream
from steersman.train.text import TextSource, open_text
from steersman.train.trainer import Trainer, train_sae

__all__ = [
    "ActivationBatch",
    "ActivationSource",
    "ActivationStats",
    "ActivationStore",
    "ActivationStream",
    "CacheConfig",
    "Recipe",
    "RowInfo",
    "TextSource",
    "TrainConfig",
    "Trainer",
    "cache_activations",
    "open_text",
    "resolve",
    "train_sae",
]
