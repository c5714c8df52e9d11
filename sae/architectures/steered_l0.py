"""Training towards a number of active features, for architectures that have no K.

A quadratic penalty alone stops where the next feature is worth what it costs, above its target; a coefficient alone
says nothing of where it leads. So what L0 misses is summed up over the steps (proportional-integral control):

    c <- c + gain * m,    m = log(L0 / L0*),

L0 the mean number of active features of a step's batch, over all its parts and all ranks. What c and m of the last step
do, an architecture says. They are part of a checkpoint, and of nothing else that is saved.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.sae.base import SAE
from steersman.sae.training import Step, TrainingCode, TrainingState

_LARGEST = 0.5
"""Of m, so that the first steps, or a batch unlike the others, do not wind the sum up."""


class SteeredL0SAE(SAE):
    """An SAE whose `l0_control`, where `TrainConfig.target_l0` is given, follows from what L0 missed so far."""

    gain: ClassVar[float] = 0.005
    """Of the sum above, a step."""
    _step: int | None = None

    def prepare_training(self, config: Any) -> None:
        super().prepare_training(config)
        if config.target_l0 is not None:
            self.register_buffer("l0_control", torch.zeros(2, device=self.device))
            self._step = None

    def steering(self, state: TrainingState) -> tuple[Tensor, Tensor] | None:
        """c and m (scalars) as the step before this one left them; None without a target."""
        if not hasattr(self, "l0_control"):
            return None
        if state.step != self._step:  # the first part of a batch
            self._step, self._before = state.step, self.get_buffer("l0_control").clone()
            self._counted, self._n_tokens = torch.zeros((), device=self.device), 0
        c, m = self._before
        return c, m

    def l0_over_batch(self, count: Tensor, n_tokens: int) -> Tensor:
        """Active features a token over the rows of all replicas, from this rank's count on its `n_tokens`: a scalar
        without gradients."""
        return self.latents.over_batch(count.detach()) / (n_tokens * self.latents.n_replicas)

    @torch.no_grad()
    def after_step(self, step: Step, state: TrainingState) -> None:
        super().after_step(step, state)
        before = self.steering(state)
        if before is not None:
            self._counted += count_active(step.code)
            self._n_tokens += len(step.code.values)
            l0 = self.l0_over_batch(self._counted, self._n_tokens)
            missed = (l0 / state.config.target_l0).log().clamp(-_LARGEST, _LARGEST)
            self.get_buffer("l0_control").copy_(torch.stack([before[0] + self.gain * missed, missed]))

    def weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in super().weights().items() if name != "l0_control"}


def count_active(code: TrainingCode) -> Tensor:
    """The number of active entries, fp32."""
    return code.active.sum(dtype=torch.float32)
