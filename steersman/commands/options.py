"""What several commands share: loading what their flags name."""

import os
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from itertools import islice
from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.kernels import using
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer.methods import Examples, as_examples, read_examples, read_texts
from steersman.train.run.trainer import pick_device
from steersman.train.text import open_text


def part_of(config: Any, kind: type[Any]) -> Any:
    """The fields of a command that belong to the dataclass it extends."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})


def load_model(config: Any) -> LanguageModel:
    return LanguageModel.load(config.model, device=pick_device(config.device), dtype=config.dtype)


def examples_of(data: str | None, positive: str | None, negative: str | None) -> Examples | None:
    if data is not None:
        if positive or negative:
            raise SteersmanError("give either --data, or --positive and --negative, not both")
        return read_examples(data)
    if positive is None and negative is None:
        return None
    if positive is None:
        raise SteersmanError("--negative needs --positive")
    sides = [as_examples(read_texts(path), side) if path else [] for path, side in
             ((positive, "positive"), (negative, "negative"))]  # fmt: skip
    return Examples(positive=sides[0], negative=sides[1])


def on_kernels(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """A command that computes with the implementation that its `kernels` asks for, or fails at once."""

    @wraps(run)
    def run_with(config: Any) -> None:
        with using(config.kernels, pick_device(config.device)):
            run(config)

    return run_with


def check_model(sae: SAE, lm: LanguageModel) -> None:
    if sae.cfg.model_name and not lm.matches(sae.cfg.model_name):
        raise SteersmanError(f"the SAE was trained on {sae.cfg.model_name}, the model given is {lm.name}")


def read_texts_of(source: str, limit: int) -> list[str]:
    return list(islice(open_text(source).documents(0), limit))


def pick_local_device(name: str) -> torch.device:
    local = os.environ.get("LOCAL_RANK")
    return pick_device(f"cuda:{local}" if name == "auto" and local and torch.cuda.is_available() else name)
