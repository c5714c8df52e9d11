"""Sparse autoencoders: the module and its architectures, checkpoints, metrics and feature summaries."""

from steersman.sae.base import SAE, SparseCode, TrainingCode
from steersman.sae.batch_topk import BatchTopKSAE
from steersman.sae.config import SAEConfig
from steersman.sae.gated import GatedSAE
from steersman.sae.groupmax import GroupMaxSAE
from steersman.sae.jumprelu import JumpReLUSAE
from steersman.sae.matryoshka import MatryoshkaSAE
from steersman.sae.relu import ReLUSAE
from steersman.sae.stats import FeatureStats
from steersman.sae.topk import TopKSAE, auxk_gradients, auxk_loss

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "FeatureStats",
    "GatedSAE",
    "GroupMaxSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "SAEConfig",
    "SparseCode",
    "TopKSAE",
    "TrainingCode",
    "auxk_gradients",
    "auxk_loss",
]
