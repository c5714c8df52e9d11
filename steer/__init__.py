"""Interventions: steer a language model by features of an SAE or by vectors."""

from steersman.steer.compare import Comparison, SteerConfig, TextPair, parse_features, steer_and_compare
from steersman.steer.edits import MODES, UNITS
from steersman.steer.report import EditReport, FeatureOutcome
from steersman.steer.scope import Scope
from steersman.steer.steerer import Steerer, Steering
from steersman.steer.trace import Trace

__all__ = [
    "MODES",
    "UNITS",
    "Comparison",
    "EditReport",
    "FeatureOutcome",
    "Scope",
    "SteerConfig",
    "Steerer",
    "Steering",
    "TextPair",
    "Trace",
    "parse_features",
    "steer_and_compare",
]
