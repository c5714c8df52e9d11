"""What steering does to text: measures that need no judge, baselines, curves over the scale, intervals over prompts."""

from steersman.steer.evaluation.bootstrap import Estimate, bootstrap
from steersman.steer.evaluation.config import EvaluationConfig
from steersman.steer.evaluation.evaluate import evaluate_steering
from steersman.steer.evaluation.forced import Continuations, likelihoods
from steersman.steer.evaluation.report import SteeringEvaluation

__all__ = [
    "Continuations",
    "Estimate",
    "EvaluationConfig",
    "SteeringEvaluation",
    "bootstrap",
    "evaluate_steering",
    "likelihoods",
]
