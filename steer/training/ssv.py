"""`ssv` (supervised steering vector): h + v, trained on the likelihood of the positive completions alone.

Source: arXiv 2501.17148 (AxBench) and its code: AdamW without decay, lr 0.01, 3 epochs of batches of 6, falling
linearly, gradients clipped at 1, no bound on the norm. Here v starts at zero, where theirs starts at 0.01 in every
entry; every token but the BOS is steered, in training and at test.

The notes hold the largest activation max h . v / |v|. AxBench multiplies v, unnormalised, by a largest activation that
has |v| in it too, so that its strength grows with |v|^2; here scale 1 is the vector as it was trained.
"""

import torch

from steersman.lm import LanguageModel
from steersman.steer.edits import VectorEdit
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.examples import Examples
from steersman.steer.training.loop import TrainedEdit, train_edit
from steersman.steer.training.losses import Likelihood
from steersman.steer.training.settings import AXBENCH
from steersman.steer.training.vector_method import TrainedMethod


class SSV(TrainedMethod):
    """A vector trained on the likelihood of completions."""

    name = "ssv"
    source = "arXiv 2501.17148"
    needs_negative = False
    defaults = AXBENCH

    def train(self, lm: LanguageModel, examples: Examples, hooks: list[str], config: ContrastConfig) -> TrainedEdit:
        return train_edit(
            lm,
            {hook: torch.zeros(lm.hook_width(hook)) for hook in hooks},
            lambda p: {hook: VectorEdit(v) for hook, v in p.items()},
            Likelihood(examples.positive),
            config=self.settings(config),
        )
