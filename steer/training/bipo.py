"""`bipo` (bi-directional preference optimisation): a vector that makes one answer likelier when it is added, and the
other when it is subtracted.

The loss is `Preference`. Source: arXiv 2406.00045 and its code: beta 0.1, AdamW, lr 5e-4, batches of 4, cosine after
100 steps of warm-up, v = 0 at first, every token steered; 100 epochs at most, of which the published vectors are after
5 to 20: here 20. The script has a weight decay of 0.05 that its trainer is never given. One block in the middle.
"""

import torch

from steersman.lm import LanguageModel
from steersman.steer.edits import VectorEdit
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.examples import Examples
from steersman.steer.training.loop import TrainedEdit, TrainEditConfig, train_edit
from steersman.steer.training.losses import Preference
from steersman.steer.training.vector_method import TrainedMethod


class BiPO(TrainedMethod):
    """A vector trained on preferences, both ways round."""

    name = "bipo"
    source = "arXiv 2406.00045"
    defaults = TrainEditConfig(lr=5e-4, epochs=20, batch_size=4, schedule="cosine", warmup=100)

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        examples.check_pairs(self.name)
        examples.check_answers(self.name)

    def train(self, lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> TrainedEdit:
        return train_edit(
            lm,
            {hook: torch.zeros(lm.hook_width(hook)) for hook in hooks},
            lambda p: {hook: VectorEdit(v) for hook, v in p.items()},
            Preference(examples.positive, examples.negative),
            config=self.settings(config),
        )
