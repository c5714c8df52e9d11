"""Architectures written outside the package, in a module of its own that the ranks of a job can import."""

import torch
from torch import Tensor, nn

from steersman.kernels import with_gradient
from steersman.kernels.torch_ops import largest_of_code
from steersman.sae import SAEConfig
from steersman.sae.architectures.elementwise import chosen
from steersman.sae.architectures.relu import ReLUSAE
from steersman.sae.architectures.topk import TopKSAE
from steersman.sae.fused import FusedBatch, Gradients
from steersman.sae.training import Step, TrainingCode, TrainingState

_SMALL = 1e-3


class PAnnealedReLU(ReLUSAE):
    """ReLU with the penalty `sparsity * sum f^p`, p falling from 1 to `p_end` over the run (arXiv 2408.00113)."""

    name, saelens_name = "p_annealed_relu", "standard"
    trainable = True
    defaults = {"sparsity": 0.1, "p_end": 0.5}  # noqa: RUF012

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        step = super().training_step(x, target, state)
        p = 1 - state.progress * (1 - self.options["p_end"])
        penalty = ((step.code.values + _SMALL) ** p - _SMALL**p).sum()
        step.losses["sparsity"] = self.options["sparsity"] * self.latents.total(penalty)
        return step


class GainedReLU(PAnnealedReLU):
    """The same with a learned gain for each latent: a parameter that no other architecture has."""

    name = "gained_relu"

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, generator)
        self.log_gain = nn.Parameter(torch.zeros(cfg.d_sae))

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        return super()._dense(rows, features) * chosen(self.log_gain, features).exp()

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        bias = self.input_bias
        with torch.no_grad():
            values, indices = largest_of_code(
                lambda part: super(GainedReLU, self)._dense(x[part]), len(x), self.cfg.d_sae
            )
        bias = None if bias is None else self.latents.uses(bias)
        values, order = with_gradient(x, self.W_enc.T, self.b_enc, bias, values, indices)
        return TrainingCode(values * self.log_gain[order.indices].exp(), order)


class CountingTopK(TopKSAE):
    """TopK with a parameter [L] that learns how often each latent fires, and says its gradient itself."""

    name, saelens_name = "counting_topk", "topk"

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, generator)
        self.level = nn.Parameter(torch.zeros(cfg.d_sae))

    def _missing(self, code: TrainingCode) -> Tensor:
        """What the level of each latent lacks to how often it fired, [L]."""
        counts = torch.zeros_like(self.level.detach())
        counts.scatter_add_(0, code.order.indices.flatten().long(), code.active.flatten().float())
        return self.level - counts

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        step = super().training_step(x, target, state)
        return Step(step.code, {**step.losses, "level": self._missing(step.code).square().sum()}, step.logged)

    def fused_gradients(self, batch: FusedBatch) -> tuple[Step, Gradients]:
        step, gradients = super().fused_gradients(batch)
        missing = self._missing(step.code).detach()
        level = 2 * missing / batch.n_values
        losses = {**step.losses, "level": missing.square().sum()}
        return Step(step.code, losses, step.logged), gradients._replace(further={"level": level})
