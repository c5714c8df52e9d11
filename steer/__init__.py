"""Interventions: steer a language model by features of an SAE or by vectors."""

from steersman.steer.analysis.annotations import Annotated, AnnotationTable, annotation_table
from steersman.steer.analysis.concept_shift import ConceptShift, concept_shift
from steersman.steer.analysis.find import FindConfig, FoundFeature, FoundFeatures, find_features
from steersman.steer.analysis.head_search import HeadSearch, coarse_to_fine
from steersman.steer.analysis.heads import (
    HeadProfile,
    HeadStates,
    answer_probability,
    mean_heads,
    patch_heads,
    probe_heads,
    profile_heads,
    shared_heads,
)
from steersman.steer.analysis.layers import LayerDivergence, layer_divergences
from steersman.steer.analysis.promote import PromoteReport, promote_report
from steersman.steer.analysis.spans import (
    HeavyTokens,
    KeySentence,
    heavy_columns,
    heavy_edits,
    heavy_tokens,
    key_sentences,
    match_sentence,
)
from steersman.steer.analysis.sweep import LayerSweepConfig, Sweep, sweep_layers
from steersman.steer.analysis.thresholds import (
    FoundCondition,
    ProbedSides,
    find_condition,
    percentile_limits,
    probe_sides,
)
from steersman.steer.calibrate import CalibrateConfig, Calibration, calibrate, calibrated
from steersman.steer.compare import Comparison, SteerConfig, TextPair, steer_and_compare
from steersman.steer.decoding.critic import train_critic
from steersman.steer.decoding.darwin import darwin
from steersman.steer.decoding.dynamic import Controlled, KLControl, nucleus_kl
from steersman.steer.decoding.mix import Mix, MixSource
from steersman.steer.decoding.particles import ParticleConfig, best_of_n, particles
from steersman.steer.decoding.population import ParticleSet
from steersman.steer.decoding.potentials import Reward
from steersman.steer.decompose import (
    DecomposeConfig,
    Decomposition,
    Retention,
    decompose,
    load_labels,
    measure_retention,
    plot_decompositions,
)
from steersman.steer.dose import load_steering, steered
from steersman.steer.edit_report import EditReport, FeatureOutcome
from steersman.steer.edits import (
    MODES,
    RULES,
    UNITS,
    AffineEdit,
    AnyOf,
    AttentionBiasEdit,
    Condition,
    DirectionEdit,
    Edit,
    EditSet,
    Feature,
    FunctionEdit,
    Gate,
    HeadEdit,
    LogitsEdit,
    LoReFTEdit,
    Probe,
    Projection,
    Read,
    Schedule,
    TanhSimilarity,
    TokenGate,
    VectorEdit,
    blend,
)
from steersman.steer.effects.collect import collect_effects
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.fgaa import fgaa_targets
from steersman.steer.effects.fit import LinearFit, ridge_fit
from steersman.steer.effects.folder import Effects
from steersman.steer.effects.map import EffectMap
from steersman.steer.effects.verify import Verification, verify_effect
from steersman.steer.evaluation import (
    Detection,
    Estimate,
    EvaluationConfig,
    SteeringEvaluation,
    bootstrap,
    detect_concept,
    evaluate_steering,
)
from steersman.steer.feature_values import parse_features
from steersman.steer.labels.contexts import words_fired_on
from steersman.steer.labels.dashboard import write_dashboards
from steersman.steer.labels.describe import (
    DescribeConfig,
    Described,
    FeatureExamples,
    describe_features,
    labelling_cost,
)
from steersman.steer.labels.endpoint import LabelEndpoint, LabelEndpointConfig
from steersman.steer.labels.journal import LabelJournal
from steersman.steer.labels.neuronpedia import read_neuronpedia, write_neuronpedia
from steersman.steer.labels.prompts import LabelExample
from steersman.steer.labels.read import read_labels
from steersman.steer.labels.tokens import TokenLabelConfig, label_features
from steersman.steer.measures import CostMeter, common_prefix, generated_tokens, repetition_rate, token_kl, token_nll
from steersman.steer.methods import METHODS, ContrastConfig, action_entropy, contrast, style_vectors
from steersman.steer.methods.affine import AFFINE_METHODS, AffineConfig, fit_affine
from steersman.steer.methods.head_vectors import ITIConfig, function_vector, intervene_on_heads
from steersman.steer.presets import PRESETS, Preset, preset
from steersman.steer.probing.absorption import LabelAbsorption
from steersman.steer.probing.config import ProbingConfig
from steersman.steer.probing.labels import read_labelled
from steersman.steer.probing.probe import probe_features
from steersman.steer.probing.report import LabelProbe, ProbedFeatures
from steersman.steer.recipe import Recipe
from steersman.steer.scale_search import ScaleSearch, search_scale
from steersman.steer.scope import Scope
from steersman.steer.scores import (
    SCORES,
    FeatureFlow,
    FeatureScores,
    FeatureSet,
    Score,
    ScoreConfig,
    feature_flow,
    pruned,
    rewarded_answers,
    score_features,
    select,
    token_change,
    vocab_projection,
)
from steersman.steer.steerer import Steerer
from steersman.steer.steering import Steering
from steersman.steer.trace import Trace
from steersman.steer.training import (
    EDIT_METHODS,
    Imitated,
    Imitation,
    Likelihood,
    Preference,
    ProbeLoss,
    Separation,
    TrainedEdit,
    TrainEditConfig,
    edit_from_examples,
    loreft,
    memorise,
    prompted_answers,
    psr,
    sae_ssv,
    train_edit,
)
from steersman.steer.vectors.vector import SteeringVector
from steersman.steer.weights.bake import Baked, ablate, bake
from steersman.steer.weights.delta import Reweighted, WeightDelta, head_columns

__all__ = [
    "AFFINE_METHODS",
    "EDIT_METHODS",
    "METHODS",
    "MODES",
    "PRESETS",
    "RULES",
    "SCORES",
    "UNITS",
    "AffineConfig",
    "AffineEdit",
    "Annotated",
    "AnnotationTable",
    "AnyOf",
    "AttentionBiasEdit",
    "Baked",
    "CalibrateConfig",
    "Calibration",
    "Comparison",
    "ConceptShift",
    "Condition",
    "ContrastConfig",
    "Controlled",
    "CostMeter",
    "DecomposeConfig",
    "Decomposition",
    "DescribeConfig",
    "Described",
    "Detection",
    "DirectionEdit",
    "Edit",
    "EditReport",
    "EditSet",
    "EffectMap",
    "Effects",
    "EffectsConfig",
    "Estimate",
    "EvaluationConfig",
    "Feature",
    "FeatureExamples",
    "FeatureFlow",
    "FeatureOutcome",
    "FeatureScores",
    "FeatureSet",
    "FindConfig",
    "FoundCondition",
    "FoundFeature",
    "FoundFeatures",
    "FunctionEdit",
    "Gate",
    "HeadEdit",
    "HeadProfile",
    "HeadSearch",
    "HeadStates",
    "HeavyTokens",
    "ITIConfig",
    "Imitated",
    "Imitation",
    "KLControl",
    "KeySentence",
    "LabelAbsorption",
    "LabelEndpoint",
    "LabelEndpointConfig",
    "LabelExample",
    "LabelJournal",
    "LabelProbe",
    "LayerDivergence",
    "LayerSweepConfig",
    "Likelihood",
    "LinearFit",
    "LoReFTEdit",
    "LogitsEdit",
    "Mix",
    "MixSource",
    "ParticleConfig",
    "ParticleSet",
    "Preference",
    "Preset",
    "Probe",
    "ProbeLoss",
    "ProbedFeatures",
    "ProbedSides",
    "ProbingConfig",
    "Projection",
    "PromoteReport",
    "Read",
    "Recipe",
    "Retention",
    "Reward",
    "Reweighted",
    "ScaleSearch",
    "Schedule",
    "Scope",
    "Score",
    "ScoreConfig",
    "Separation",
    "SteerConfig",
    "Steerer",
    "Steering",
    "SteeringEvaluation",
    "SteeringVector",
    "Sweep",
    "TanhSimilarity",
    "TextPair",
    "TokenGate",
    "TokenLabelConfig",
    "Trace",
    "TrainEditConfig",
    "TrainedEdit",
    "VectorEdit",
    "Verification",
    "WeightDelta",
    "ablate",
    "action_entropy",
    "annotation_table",
    "answer_probability",
    "bake",
    "best_of_n",
    "blend",
    "bootstrap",
    "calibrate",
    "coarse_to_fine",
    "collect_effects",
    "common_prefix",
    "concept_shift",
    "contrast",
    "darwin",
    "decompose",
    "describe_features",
    "detect_concept",
    "edit_from_examples",
    "evaluate_steering",
    "feature_flow",
    "fgaa_targets",
    "find_condition",
    "find_features",
    "fit_affine",
    "function_vector",
    "generated_tokens",
    "head_columns",
    "heavy_columns",
    "heavy_edits",
    "heavy_tokens",
    "intervene_on_heads",
    "key_sentences",
    "label_features",
    "labelling_cost",
    "layer_divergences",
    "load_labels",
    "load_steering",
    "loreft",
    "match_sentence",
    "mean_heads",
    "measure_retention",
    "memorise",
    "nucleus_kl",
    "parse_features",
    "particles",
    "patch_heads",
    "percentile_limits",
    "plot_decompositions",
    "preset",
    "probe_features",
    "probe_heads",
    "probe_sides",
    "profile_heads",
    "promote_report",
    "prompted_answers",
    "pruned",
    "psr",
    "read_labelled",
    "read_labels",
    "read_neuronpedia",
    "repetition_rate",
    "rewarded_answers",
    "ridge_fit",
    "sae_ssv",
    "score_features",
    "search_scale",
    "select",
    "shared_heads",
    "steer_and_compare",
    "steered",
    "style_vectors",
    "sweep_layers",
    "token_change",
    "token_kl",
    "token_nll",
    "train_critic",
    "train_edit",
    "verify_effect",
    "vocab_projection",
    "words_fired_on",
    "write_dashboards",
    "write_neuronpedia",
]

# Conveniences of a class whose functions need the class, which declares them.
SteeringVector.contrast = staticmethod(contrast)
SteeringVector.calibrate = calibrated
SteeringVector.apply = steered
