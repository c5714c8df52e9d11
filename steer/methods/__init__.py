"""Steering vectors from examples: one file per method, each with its equation and source."""

from steersman.deprecation import moved
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.contrast import METHODS, contrast
from steersman.steer.methods.examples import Example, Examples, as_examples, read_examples

__all__ = [
    "METHODS",
    "ContrastConfig",
    "Example",
    "Examples",
    "as_examples",
    "contrast",
    "read_examples",
]

__getattr__ = moved(__name__, {"read_texts": "steersman.text:read_texts"})
