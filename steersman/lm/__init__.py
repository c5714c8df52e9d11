"""Reaching into a transformers model: hook points by name, capture, edits with a clock, and generation."""

from steersman.deprecation import moved
from steersman.lm.activations import Activations, TextActivations
from steersman.lm.generate import Generation
from steersman.lm.hooks import HookPoint
from steersman.lm.layout import Tap
from steersman.lm.model import LanguageModel
from steersman.lm.passes import ForwardPass
from steersman.lm.session import Session
from steersman.lm.tokens import TokenBatch

__all__ = [
    "Activations",
    "ForwardPass",
    "Generation",
    "HookPoint",
    "LanguageModel",
    "Session",
    "Tap",
    "TextActivations",
    "TokenBatch",
]

__getattr__ = moved(__name__, {"Pass": "steersman.lm.passes:ForwardPass"})
