"""Steersman: cache activations, train sparse autoencoders, steer language models with what they find.

The public names load on first use, so that `import steersman` and the command line start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from steersman.errors import SteersmanError
from steersman.version import __version__

if TYPE_CHECKING:
    from steersman.lm import LanguageModel as LanguageModel
    from steersman.sae import SAE as SAE
    from steersman.sae import SAEConfig as SAEConfig
    from steersman.sae import compare_saes as compare_saes
    from steersman.steer import Edit as Edit
    from steersman.steer import EffectMap as EffectMap
    from steersman.steer import Steerer as Steerer
    from steersman.steer import SteeringVector as SteeringVector
    from steersman.steer import collect_effects as collect_effects
    from steersman.steer import decompose as decompose
    from steersman.steer import evaluate_steering as evaluate_steering
    from steersman.train import ActivationStore as ActivationStore
    from steersman.train import TrainConfig as TrainConfig
    from steersman.train import cache_activations as cache_activations
    from steersman.train import evaluate_sae as evaluate_sae
    from steersman.train import stream_activations as stream_activations
    from steersman.train import summarize_features as summarize_features
    from steersman.train import train_many as train_many
    from steersman.train import train_sae as train_sae

_HOME = {
    "lm": ("LanguageModel",),
    "sae": ("SAE", "SAEConfig", "compare_saes"),
    "train": (
        "ActivationStore",
        "TrainConfig",
        "cache_activations",
        "evaluate_sae",
        "stream_activations",
        "summarize_features",
        "train_many",
        "train_sae",
    ),
    "steer": (
        "Edit",
        "EffectMap",
        "Steerer",
        "SteeringVector",
        "collect_effects",
        "decompose",
        "evaluate_steering",
    ),
}

__all__ = [
    "SAE",
    "ActivationStore",
    "Edit",
    "EffectMap",
    "LanguageModel",
    "SAEConfig",
    "Steerer",
    "SteeringVector",
    "SteersmanError",
    "TrainConfig",
    "__version__",
    "cache_activations",
    "collect_effects",
    "compare_saes",
    "decompose",
    "evaluate_sae",
    "evaluate_steering",
    "stream_activations",
    "summarize_features",
    "train_many",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    for package, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"steersman.{package}"), name)
    raise AttributeError(f"module 'steersman' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
