"""What several commands share: loading what their flags name."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.kernels import using
from steersman.lm import LanguageModel
from steersman.steer.methods import Examples, as_examples, read_examples
from steersman.text import read_texts


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
