"""Steering vectors from examples: one file per method, each with its equation and source."""

from steersman.deprecation import moved
from steersman.steer.methods import (  # noqa: F401 (a method is there when its file was read)
    actadd,
    caa,
    diffmean,
    lat,
    mean_centred,
    optimised,
    pca,
    probe,
)
from steersman.steer.methods.base import METHODS, ContrastConfig, Estimator, Method, StreamedMethod
from steersman.steer.methods.contrast import contrast
from steersman.steer.methods.examples import Example, Examples, as_examples, read_examples
from steersman.steer.methods.moments import RunningMean

__all__ = [
    "METHODS",
    "ContrastConfig",
    "Estimator",
    "Example",
    "Examples",
    "Method",
    "RunningMean",
    "StreamedMethod",
    "as_examples",
    "contrast",
    "read_examples",
]

__getattr__ = moved(__name__, {"read_texts": "steersman.text:read_texts"})
