"""Sparse autoencoders: the module and its architectures, checkpoints, metrics and feature summaries."""

from steersman.sae.base import SAE, SparseCode, TrainingCode
from steersman.sae.batch_topk import BatchTopKSAE
from steersman.sae.config import SAEConfig
from steersman.sae.jumprelu import JumpReLUSAE
from steersman.sae.stats import FeatureStats
from steersman.sae.topk import TopKSAE, auxk_loss

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "FeatureStats",
    "JumpReLUSAE",
    "SAEConfig",
    "SparseCode",
    "TopKSAE",
    "TrainingCode",
    "auxk_loss",
]
