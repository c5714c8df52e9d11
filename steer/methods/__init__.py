"""Steering vectors from examples: one file per method, each with its equation and source."""

from steersman.deprecation import moved
from steersman.steer.methods import (  # noqa: F401 (a method is there when its file was read)
    actadd,
    caa,
    diffmean,
    east,
    icv,
    lat,
    mean_centred,
    optimised,
    pca,
    probe,
    style,
)
from steersman.steer.methods.base import METHODS, ContrastConfig, Method
from steersman.steer.methods.contrast import contrast
from steersman.steer.methods.east import action_entropy
from steersman.steer.methods.examples import Example, Examples, as_examples, read_examples
from steersman.steer.methods.groups import capped, check_apart, split_groups
from steersman.steer.methods.moments import RunningMean
from steersman.steer.methods.streamed import Estimator, StreamedMethod
from steersman.steer.methods.style import style_vectors

__all__ = [
    "METHODS",
    "ContrastConfig",
    "Estimator",
    "Example",
    "Examples",
    "Method",
    "RunningMean",
    "StreamedMethod",
    "action_entropy",
    "as_examples",
    "capped",
    "check_apart",
    "contrast",
    "read_examples",
    "split_groups",
    "style_vectors",
]

__getattr__ = moved(__name__, {"read_texts": "steersman.text:read_texts"})
