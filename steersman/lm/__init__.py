"""Reaching into a transformers model: hook points by name, capture, edits with a clock, and generation."""

from steersman.lm.clock import Pass
from steersman.lm.generate import Generation
from steersman.lm.hooks import HookPoint
from steersman.lm.model import LanguageModel
from steersman.lm.tokens import TokenBatch

__all__ = ["Generation", "HookPoint", "LanguageModel", "Pass", "TokenBatch"]
