"""What the trained vectors share: settings of the loop from those of `contrast`, and a vector per hook point."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.methods.base import ContrastConfig, Made, Method
from steersman.steer.methods.examples import Examples
from steersman.steer.methods.reading import Reader
from steersman.steer.training.loop import TrainedEdit, TrainEditConfig
from steersman.steer.training.settings import loop_settings


class TrainedMethod(Method):
    """A vector that is trained: `train` gives the parameters, one vector per hook point under its name."""

    positions = reads = "the completions"
    defaults: ClassVar[TrainEditConfig]
    """The loop as the source runs it; `lr`, `epochs` and `train_batch` of the settings go over it."""

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        self.settings(config)

    def settings(self, config: ContrastConfig) -> TrainEditConfig:
        """The loop's settings."""
        return loop_settings(self.defaults, config)

    def make(
        self,
        lm: LanguageModel,
        examples: Examples,
        hooks: list[str],
        config: ContrastConfig,
        means: Mapping[str, Tensor] | None,
    ) -> Made:
        found = self.train(lm, examples, hooks, config)
        return self.made(lm, examples, {hook: found.parameters[hook] for hook in hooks}, found, config)

    @abstractmethod
    def train(self, lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> TrainedEdit:
        """Run the loop."""

    def made(
        self,
        lm: LanguageModel,
        examples: Examples,
        directions: dict[str, Tensor],
        found: TrainedEdit,
        config: ContrastConfig,
    ) -> Made:
        """The result, from the trained directions; here as they are, with their largest activations beside them."""
        if not any(float(v.norm()) > 0 for v in directions.values()):
            raise SteersmanError(f"the training of {self.name!r} left the vector at zero: check the examples")
        largest = largest_activations(lm, examples, directions, config)
        return Made(directions=directions, notes={**found.notes(), "max_act": largest})


def largest_activations(
    lm: LanguageModel, examples: Examples, directions: Mapping[str, Tensor], config: ContrastConfig
) -> dict[str, float]:
    """Hook point -> max over the tokens of the positive examples (BOS left out) of h . v / |v|."""
    reader = Reader(lm, list(directions), positions="all", batch_size=config.batch_size, max_length=config.max_length)
    largest = dict.fromkeys(directions, float("-inf"))
    for batch in reader.samples(Examples(positive=examples.positive, negative=[]), "sides"):
        for hook, v in directions.items():
            along = batch.at(hook).x @ (v / v.norm().clamp(min=torch.finfo(torch.float32).tiny))
            largest[hook] = max(largest[hook], float(along.max()))
    return largest
