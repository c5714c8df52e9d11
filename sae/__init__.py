"""Sparse autoencoders: the module and its architectures, checkpoints, metrics and feature summaries."""

from steersman.sae.architectures.auxk import auxk_gradients, auxk_loss
from steersman.sae.architectures.batch_topk import BatchTopKSAE
from steersman.sae.architectures.gated import GatedSAE
from steersman.sae.architectures.groupmax import GroupMaxSAE
from steersman.sae.architectures.jumprelu import JumpReLUSAE
from steersman.sae.architectures.matryoshka import MatryoshkaSAE
from steersman.sae.architectures.relu import ReLUSAE
from steersman.sae.architectures.topk import TopKSAE
from steersman.sae.base import SAE, FeatureStats, SparseCode
from steersman.sae.config import SAEConfig
from steersman.sae.training import AuxTerm, Latents, Step, TrainingCode, TrainingState

__all__ = [
    "SAE",
    "AuxTerm",
    "BatchTopKSAE",
    "FeatureStats",
    "GatedSAE",
    "GroupMaxSAE",
    "JumpReLUSAE",
    "Latents",
    "MatryoshkaSAE",
    "ReLUSAE",
    "SAEConfig",
    "SparseCode",
    "Step",
    "TopKSAE",
    "TrainingCode",
    "TrainingState",
    "auxk_gradients",
    "auxk_loss",
]
