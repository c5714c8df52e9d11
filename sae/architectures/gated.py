"""Gated SAEs (arXiv 2404.16014): one path decides which latents are active, another how strongly.

The loss is that of eqs. 8 to 10: the squared error; a penalty on the size of the gates' pre-activations g, of which
`relu` says the forms and the coefficient; and `gate_error`, the squared error of a reconstruction from ReLU(g) by a
decoder that takes no gradient from it, without which the gates would learn from the penalty alone:

    |x - (f W_dec + b_dec)|^2 + coefficient * sqrt(D) * sum_i phi(ReLU(g_i)) + |x - (ReLU(g) W_dec + b_dec)|^2.

Dead latents learn by AuxK, through their gates.

Shape letters: N tokens, L latents, D width, K active latents of the fullest token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from steersman.kernels import Order, choose, sparse_decode, with_gradient
from steersman.sae.architectures.elementwise import chosen
from steersman.sae.architectures.relu import PenalisedSAE
from steersman.sae.config import SAEConfig
from steersman.sae.training import Step, TrainingCode, TrainingState


class GatedSAE(PenalisedSAE):
    """`f = H(g) ReLU(exp(r_mag) p + b_mag)`, `g = p + b_gate`, `p = (x - b_dec) W_enc` (eq. 6 with the weight sharing
    of eq. 7).

    `b_enc` is None: there are two encoder biases.
    """

    name = "gated"
    gate_bias = "b_gate"

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        del self.b_enc
        self.register_parameter("b_enc", None)
        self.b_gate = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(cfg.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(cfg.d_sae))

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        x, bias = rows.float(), self.input_bias
        p = (x if bias is None else x - bias.float()) @ self._encoder(features).float().T
        magnitude = p * chosen(self.r_mag, features).float().exp() + chosen(self.b_mag, features).float()
        return torch.where(p + chosen(self.b_gate, features).float() > 0, magnitude.relu(), torch.zeros_like(p))

    @property
    def code_bias(self) -> Tensor:
        return self.b_gate

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        rows, bias = (self.W_enc.T, self.input_bias) if W_enc is None else (W_enc, None)
        with torch.no_grad():
            zero = self.b_gate.new_zeros(())
            values, indices = choose(x.device).threshold_select(x, rows, self.b_gate, zero, bias)
        bias = None if bias is None else self.latents.uses(bias)
        gates, order = with_gradient(x, rows, self.b_gate, bias, values, indices)
        b_gate, b_mag, r_mag = (of_latents(each, order) for each in (self.b_gate, self.b_mag, self.r_mag))
        magnitude = (r_mag.exp() * (gates - b_gate) + b_mag).relu()
        return TrainingCode(torch.where(values > 0, magnitude, torch.zeros_like(values)), order, candidates=gates)

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        step = super().training_step(x, target, state)
        gates, order = step.code.candidates, step.code.order
        assert gates is not None
        from_gates = self.latents.sum(sparse_decode(gates, order, self.W_dec.detach())) + self.b_dec.detach()
        error = (target - from_gates).square().sum()
        losses = {**step.losses, "gate_error": error, "penalty": self.penalty(gates, state)}
        return Step(step.code, losses, step.logged)

    def scale_code(self, factor: Tensor) -> None:
        super().scale_code(factor)
        self.b_gate.mul_(factor)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        for bias in (self.b_gate, self.b_mag, self.b_dec):
            bias /= scale


def of_latents(table: Tensor, order: Order) -> Tensor:
    """Entries [N, K] of `table` [L] for the latents of a code; their gradients are added in its order."""
    entries: Any = _OfLatents.apply(table, order)
    return entries


class _OfLatents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return table[order.indices]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.order.get().scatter(grad_outputs[0]), None
