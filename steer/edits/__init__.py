"""Edits: what happens at a hook point to the tokens in scope. Whatever is an `Edit` goes through `Steerer.edit`."""

from steersman.steer.edits.affine import AffineEdit, LoReFTEdit
from steersman.steer.edits.attention import AttentionBiasEdit
from steersman.steer.edits.base import Edit, FunctionEdit, PerRow, blend, common_rows, per_row
from steersman.steer.edits.feature import MODES, UNITS, FeatureEdit, Features, feature_rows
from steersman.steer.edits.heads import HeadEdit
from steersman.steer.edits.logits import LogitsEdit
from steersman.steer.edits.vector import PositionEdit, VectorEdit

__all__ = [
    "MODES",
    "UNITS",
    "AffineEdit",
    "AttentionBiasEdit",
    "Edit",
    "FeatureEdit",
    "Features",
    "FunctionEdit",
    "HeadEdit",
    "LoReFTEdit",
    "LogitsEdit",
    "PerRow",
    "PositionEdit",
    "VectorEdit",
    "blend",
    "common_rows",
    "feature_rows",
    "per_row",
]
