"""Sparse autoencoders: the module and its architectures, files, metrics and feature summaries."""

from steersman.sae.architectures.abs_topk import AbsTopKSAE
from steersman.sae.architectures.auxk import auxk_gradients, auxk_loss
from steersman.sae.architectures.batch_topk import BatchTopKSAE
from steersman.sae.architectures.crosscoder import CrosscoderSAE
from steersman.sae.architectures.gated import GatedSAE
from steersman.sae.architectures.groupmax import GroupMaxSAE
from steersman.sae.architectures.jumprelu import JumpReLUSAE
from steersman.sae.architectures.matching_pursuit import MatchingPursuitSAE
from steersman.sae.architectures.matryoshka import MatryoshkaSAE, MatryoshkaTopKSAE
from steersman.sae.architectures.relu import ReLUSAE
from steersman.sae.architectures.supervised_topk import SupervisedTopKSAE
from steersman.sae.architectures.topk import TopKSAE
from steersman.sae.base import SAE, FeatureStats, SparseCode
from steersman.sae.compare import SAEComparison, compare_saes
from steersman.sae.config import SAEConfig, Side
from steersman.sae.feature_labels import FeatureLabel, FeatureLabels
from steersman.sae.formats import load
from steersman.sae.formats.saelens import save
from steersman.sae.matching import FeatureMatching, Unmatched
from steersman.sae.metrics import Reconstruction, measure_reconstruction
from steersman.sae.neighbours import Nearest, Neighbour, feature_neighbours, nearest_features
from steersman.sae.training import AuxTerm, Latents, Step, TrainingCode, TrainingState

# Here, because the formats build on the SAE.
SAE.save = save  # pyright: ignore[reportAttributeAccessIssue]
SAE.load = staticmethod(load)

__all__ = [
    "SAE",
    "AbsTopKSAE",
    "AuxTerm",
    "BatchTopKSAE",
    "CrosscoderSAE",
    "FeatureLabel",
    "FeatureLabels",
    "FeatureMatching",
    "FeatureStats",
    "GatedSAE",
    "GroupMaxSAE",
    "JumpReLUSAE",
    "Latents",
    "MatchingPursuitSAE",
    "MatryoshkaSAE",
    "MatryoshkaTopKSAE",
    "Nearest",
    "Neighbour",
    "ReLUSAE",
    "Reconstruction",
    "SAEComparison",
    "SAEConfig",
    "Side",
    "SparseCode",
    "Step",
    "SupervisedTopKSAE",
    "TopKSAE",
    "TrainingCode",
    "TrainingState",
    "Unmatched",
    "auxk_gradients",
    "auxk_loss",
    "compare_saes",
    "feature_neighbours",
    "measure_reconstruction",
    "nearest_features",
]
