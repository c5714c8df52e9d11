"""Steersman: cache activations, train top-k sparse autoencoders, steer language models with what they find.

The public names load on first use, so that `import steersman` and the command line start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steersman.lm import LanguageModel as LanguageModel
    from steersman.sae import SAE as SAE
    from steersman.sae import SAEConfig as SAEConfig
    from steersman.steer import EffectMap as EffectMap
    from steersman.steer import Steerer as Steerer
    from steersman.steer import SteeringVector as SteeringVector
    from steersman.steer import collect_effects as collect_effects
    from steersman.steer import decompose as decompose
    from steersman.steer import evaluate_steering as evaluate_steering
    from steersman.train import ActivationStore as ActivationStore
    from steersman.train import TrainConfig as TrainConfig
    from steersman.train import cache_activations as cache_activations
    from steersman.train import train_sae as train_sae

from steersman.errors import SteersmanError
from steersman.version import __version__

_HOME = {
    "LanguageModel": "steersman.lm",
    "SAE": "steersman.sae",
    "SAEConfig": "steersman.sae",
    "ActivationStore": "steersman.train",
    "TrainConfig": "steersman.train",
    "cache_activations": "steersman.train",
    "train_sae": "steersman.train",
    "EffectMap": "steersman.steer",
    "Steerer": "steersman.steer",
    "decompose": "steersman.steer",
    "SteeringVector": "steersman.steer",
    "evaluate_steering": "steersman.steer",
    "collect_effects": "steersman.steer",
}

__all__ = [
    "SAE",
    "ActivationStore",
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
    "decompose",
    "evaluate_steering",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'steersman' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
