"""What steering does to text: measures that need no judge, baselines, curves over the scale, intervals over prompts."""

from steersman.steer.evaluation.bootstrap import Estimate, bootstrap
from steersman.steer.evaluation.config import EvaluationConfig
from steersman.steer.evaluation.detection import Detection, detect_concept
from steersman.steer.evaluation.evaluate import evaluate_steering
from steersman.steer.evaluation.forced import Continuations, likelihoods
from steersman.steer.evaluation.report import SteeringEvaluation

__all__ = [
    "Continuations",
    "Detection",
    "Estimate",
    "EvaluationConfig",
    "SteeringEvaluation",
    "bootstrap",
    "detect_concept",
    "evaluate_steering",
    "likelihoods",
]
