"""Training towards a number of active features, for architectures that have no K.

A quadratic penalty alone stops where the next feature is worth what it costs, above its target; a coefficient alone
says nothing of where it leads. So what L0 misses is summed up over the steps (integral control):

    c <- c + gain * log(L0 / L0*),

L0 the mean number of active features of the step's batch, over all ranks. What c does, an architecture says.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.sae.base import SAE
from steersman.sae.training import Step, TrainingCode, TrainingState

_LARGEST = 0.5
"""Of log(L0 / L0*), so that the first steps, or a batch unlike the others, do not wind the sum up."""


class SteeredL0SAE(SAE):
    """An SAE whose `l0_control`, where `TrainConfig.target_l0` is given, follows from what L0 missed so far."""

    gain: ClassVar[float] = 0.005
    """Of the sum above, a step."""

    def prepare_training(self, config: Any) -> None:
        super().prepare_training(config)
        if config.target_l0 is not None:
            self.register_buffer("l0_control", torch.zeros((), device=self.device))

    def batch_l0(self, code: TrainingCode) -> Tensor:
        """Active features a token, over the batch of all ranks: a scalar without gradients."""
        count = code.active.sum(dtype=torch.float32)
        return self.latents.over_batch(count) / (len(code.values) * self.latents.n_replicas)

    def missed(self, code: TrainingCode, state: TrainingState) -> Tensor:
        """log(L0 / L0*) of a code: a scalar without gradients."""
        return (self.batch_l0(code) / state.config.target_l0).log().clamp(-10.0, 10.0)

    @torch.no_grad()
    def after_step(self, step: Step, state: TrainingState) -> None:
        super().after_step(step, state)
        control = getattr(self, "l0_control", None)
        if control is None:
            return
        missed = self.missed(step.code, state).clamp(-_LARGEST, _LARGEST)
        control.add_(self.gain / state.config.grad_accumulation * missed)

    def weights(self) -> dict[str, Tensor]:
        """See `SAE.weights`. The control is training's alone."""
        return {name: value for name, value in super().weights().items() if name != "l0_control"}
