"""Text to tokens to activations to a store to a trained SAE, on one process or many."""

from steersman.train.batch import ActivationBatch, RowInfo
from steersman.train.statistics import ActivationStats
from steersman.train.store import ActivationStore

__all__ = ["ActivationBatch", "ActivationStats", "ActivationStore", "RowInfo"]
