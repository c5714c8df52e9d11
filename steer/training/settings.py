"""The loop's settings from those of `contrast`."""

import dataclasses
from typing import Any

from steersman.steer.methods.base import ContrastConfig
from steersman.steer.training.loop import TrainEditConfig

AXBENCH = TrainEditConfig(lr=0.01, epochs=3, batch_size=6, schedule="linear", clip=1.0)
"""The loop of AxBench (arXiv 2501.17148) and its code."""


def loop_settings(defaults: TrainEditConfig, config: ContrastConfig) -> TrainEditConfig:
    """`defaults` with `lr`, `epochs`, `train_batch` and `seed` of `config` over them, as far as they are given."""
    given: dict[str, Any] = {
        "lr": config.lr,
        "epochs": config.epochs,
        "batch_size": config.train_batch,
        "seed": config.seed,
    }
    return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})
