"""Interventions: steer a language model by features of an SAE or by vectors."""

from steersman.steer.calibrate import CalibrateConfig, Calibration, calibrate, calibrated
from steersman.steer.compare import Comparison, SteerConfig, TextPair, steer_and_compare
from steersman.steer.decompose import (
    DecomposeConfig,
    Decomposition,
    Retention,
    decompose,
    load_labels,
    measure_retention,
    plot_decompositions,
)
from steersman.steer.dose import steered
from steersman.steer.edit_report import EditReport, FeatureOutcome
from steersman.steer.edits import MODES, UNITS, AttentionBiasEdit, Edit, FunctionEdit, LogitsEdit, VectorEdit, blend
from steersman.steer.effects.collect import collect_effects
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.fgaa import fgaa_targets
from steersman.steer.effects.fit import LinearFit, ridge_fit
from steersman.steer.effects.folder import Effects
from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.verify import Verification, verify_effect
from steersman.steer.evaluation import Estimate, EvaluationConfig, SteeringEvaluation, bootstrap, evaluate_steering
from steersman.steer.feature_values import parse_features
from steersman.steer.measures import generated_tokens, token_kl, token_nll
from steersman.steer.methods import METHODS, ContrastConfig, contrast
from steersman.steer.scale_search import ScaleSearch, search_scale
from steersman.steer.scope import Scope
from steersman.steer.steerer import Steerer, Steering
from steersman.steer.trace import Trace
from steersman.steer.vectors.vector import SteeringVector

__all__ = [
    "METHODS",
    "MODES",
    "UNITS",
    "AttentionBiasEdit",
    "CalibrateConfig",
    "Calibration",
    "Comparison",
    "ContrastConfig",
    "DecomposeConfig",
    "Decomposition",
    "Edit",
    "EditReport",
    "EffectMap",
    "Effects",
    "EffectsConfig",
    "Estimate",
    "EvaluationConfig",
    "FeatureOutcome",
    "FunctionEdit",
    "LinearFit",
    "LogitsEdit",
    "Retention",
    "ScaleSearch",
    "Scope",
    "SteerConfig",
    "Steerer",
    "Steering",
    "SteeringEvaluation",
    "SteeringVector",
    "TextPair",
    "Trace",
    "VectorEdit",
    "Verification",
    "blend",
    "bootstrap",
    "calibrate",
    "collect_effects",
    "contrast",
    "decompose",
    "evaluate_steering",
    "fgaa_targets",
    "generated_tokens",
    "load_labels",
    "measure_retention",
    "parse_features",
    "plot_decompositions",
    "ridge_fit",
    "search_scale",
    "steer_and_compare",
    "token_kl",
    "token_nll",
    "verify_effect",
]

# Conveniences of a class whose functions need the class, which declares them.
SteeringVector.contrast = staticmethod(contrast)
SteeringVector.calibrate = calibrated
SteeringVector.apply = steered
