"""Sparse autoencoders: the module and its architectures, checkpoints, metrics and feature summaries."""

from steersman.sae.architectures.batch_topk import BatchTopKSAE
from steersman.sae.architectures.gated import GatedSAE
from steersman.sae.architectures.groupmax import GroupMaxSAE
from steersman.sae.architectures.jumprelu import JumpReLUSAE
from steersman.sae.architectures.matryoshka import MatryoshkaSAE
from steersman.sae.architectures.relu import ReLUSAE
from steersman.sae.architectures.topk import TopKSAE, auxk_gradients, auxk_loss
from steersman.sae.base import SAE, SparseCode, TrainingCode
from steersman.sae.config import SAEConfig
from steersman.sae.stats import FeatureStats

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
