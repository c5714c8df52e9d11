"""Text to tokens to activations to a store to a trained SAE, on one process or many."""

from steersman.text import Mixture, TextSource, open_text
from steersman.train.capture.cache import CacheConfig, cache_activations
from steersman.train.capture.capture import CaptureConfig
from steersman.train.capture.stream import ActivationStream, StreamConfig, stream_activations
from steersman.train.reports.baselines import random_baselines
from steersman.train.reports.coactivation import CoActivations, co_activating
from steersman.train.reports.crosscoder import CrosscoderConfig, CrosscoderReport, LatentScaling, crosscoder_report
from steersman.train.reports.detailed import DetailedReport, FeatureDetail, detail_features
from steersman.train.reports.evaluate import Dictionary, EvaluateConfig, Evaluation, FrequencyBucket, evaluate_sae
from steersman.train.reports.features import FeatureReport, FeaturesConfig, summarize_features
from steersman.train.reports.plan import PlanConfig, RunPlan, plan_run
from steersman.train.reports.search import WordMatch, search_features
from steersman.train.run.recipe import Recipe, TrainConfig, resolve
from steersman.train.run.run import train_sae
from steersman.train.run.sweep import SweepConfig, SweepRun, train_many
from steersman.train.run.trainer import Trainer
from steersman.train.store.batch import ActivationBatch, ActivationSource, RowInfo
from steersman.train.store.from_tensors import write_tensors
from steersman.train.store.side_by_side import SideBySide
from steersman.train.store.statistics import ActivationStats
from steersman.train.store.store import ActivationStore
from steersman.train.store.view import HookView

__all__ = [
    "ActivationBatch",
    "ActivationSource",
    "ActivationStats",
    "ActivationStore",
    "ActivationStream",
    "CacheConfig",
    "CaptureConfig",
    "CoActivations",
    "CrosscoderConfig",
    "CrosscoderReport",
    "DetailedReport",
    "Dictionary",
    "EvaluateConfig",
    "Evaluation",
    "FeatureDetail",
    "FeatureReport",
    "FeaturesConfig",
    "FrequencyBucket",
    "HookView",
    "LatentScaling",
    "Mixture",
    "PlanConfig",
    "Recipe",
    "RowInfo",
    "RunPlan",
    "SideBySide",
    "StreamConfig",
    "SweepConfig",
    "SweepRun",
    "TextSource",
    "TrainConfig",
    "Trainer",
    "WordMatch",
    "cache_activations",
    "co_activating",
    "crosscoder_report",
    "detail_features",
    "evaluate_sae",
    "open_text",
    "plan_run",
    "random_baselines",
    "resolve",
    "search_features",
    "stream_activations",
    "summarize_features",
    "train_many",
    "train_sae",
]

ActivationStore.from_tensors = staticmethod(write_tensors)
