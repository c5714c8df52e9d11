"""Edits: what happens at a hook point to the tokens in scope. Whatever is an `Edit` goes through `Steerer.edit`."""

from steersman.steer.edits.affine import AffineEdit, LoReFTEdit
from steersman.steer.edits.attention import AttentionBiasEdit
from steersman.steer.edits.base import (
    EDITS,
    Edit,
    FunctionEdit,
    HookReader,
    PerRow,
    Saved,
    blend,
    common_rows,
    per_row,
)
from steersman.steer.edits.conditions import AnyOf, Condition, TokenGate
from steersman.steer.edits.direction import DirectionEdit
from steersman.steer.edits.feature import MODES, UNITS, FeatureEdit, Features, feature_rows
from steersman.steer.edits.file import EditSet
from steersman.steer.edits.gates import GATES, Gate, GatedEdit, GateLike, RowGate, Schedule, ScheduleLike, gated
from steersman.steer.edits.heads import HeadEdit
from steersman.steer.edits.logits import LogitsEdit
from steersman.steer.edits.reads import READS, Feature, Linear, Probe, Projection, Read, TanhSimilarity
from steersman.steer.edits.rules import RULES
from steersman.steer.edits.vector import TABLES, PositionEdit, StepEdit, VectorEdit

__all__ = [
    "EDITS",
    "GATES",
    "MODES",
    "READS",
    "RULES",
    "TABLES",
    "UNITS",
    "AffineEdit",
    "AnyOf",
    "AttentionBiasEdit",
    "Condition",
    "DirectionEdit",
    "Edit",
    "EditSet",
    "Feature",
    "FeatureEdit",
    "Features",
    "FunctionEdit",
    "Gate",
    "GateLike",
    "GatedEdit",
    "HeadEdit",
    "HookReader",
    "Linear",
    "LoReFTEdit",
    "LogitsEdit",
    "PerRow",
    "PositionEdit",
    "Probe",
    "Projection",
    "Read",
    "RowGate",
    "Saved",
    "Schedule",
    "ScheduleLike",
    "StepEdit",
    "TanhSimilarity",
    "TokenGate",
    "VectorEdit",
    "blend",
    "common_rows",
    "feature_rows",
    "gated",
    "per_row",
]
