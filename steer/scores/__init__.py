"""Scores of an SAE's features, and sets of features chosen by them to steer with."""

from steersman.steer.scores import contrast, correlation, f_statistic, flow, input, output
from steersman.steer.scores.api import score_features
from steersman.steer.scores.base import NEUTRAL_PROMPTS, SCORES, Evidence, Score, ScoreConfig
from steersman.steer.scores.flow import FeatureFlow, FlowEdge, feature_flow
from steersman.steer.scores.output_tokens import OutputTokens, token_change, vocab_projection
from steersman.steer.scores.reading import (
    Labelled,
    labelled_sides,
    read_rewarded,
    rewarded_answers,
    rewarded_generation,
)
from steersman.steer.scores.select import FeatureSet, pruned, select
from steersman.steer.scores.table import Column, FeatureScores, Scored

__all__ = [
    "NEUTRAL_PROMPTS",
    "SCORES",
    "Column",
    "Evidence",
    "FeatureFlow",
    "FeatureScores",
    "FeatureSet",
    "FlowEdge",
    "Labelled",
    "OutputTokens",
    "Score",
    "ScoreConfig",
    "Scored",
    "feature_flow",
    "labelled_sides",
    "pruned",
    "read_rewarded",
    "rewarded_answers",
    "rewarded_generation",
    "score_features",
    "select",
    "token_change",
    "vocab_projection",
]

_KINDS = (contrast, correlation, f_statistic, flow, input, output)  # imported for the scores that they define
