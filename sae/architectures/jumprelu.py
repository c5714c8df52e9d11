"""JumpReLU (arXiv 2407.14435): every pre-activation above its latent's threshold.

Thresholds are trained by straight-through estimates (eqs. 11 and 12): with the rectangle K of width 1 and a bandwidth
e, for the code f and the number of active features

    df/d theta = -(theta / e) K((z - theta) / e),    dH/d theta = -(1 / e) K((z - theta) / e),

and neither has such a gradient in z. Only positive z count, as no other can become active. The loss is the squared
error, as a fraction of the variance, plus

    coefficient * (L0 / L0* - 1 + c)^2,

L0 the mean number of active features over the batch and L0* its target: the form of Gemma Scope 2, with the control c
of `steered_l0`, which takes away what such a penalty stops above its target. A step of Adam moves thresholds by no more
than the rate allows, so after each step all of them are multiplied by exp(m / 30), m as there, whatever the rate. Dead
latents learn by AuxK, as those of TopK do.

Shape letters: N tokens, L latents, D width, K candidates a token.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.kernels import Order, choose, with_gradient
from steersman.sae.architectures.auxk import AuxKSAE
from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen
from steersman.sae.architectures.relu import largest_of_batch
from steersman.sae.architectures.steered_l0 import SteeredL0SAE, count_active
from steersman.sae.config import SAEConfig
from steersman.sae.fused import FusedBatch, Gradients
from steersman.sae.training import Step, TrainingCode, TrainingState


class JumpReLUSAE(SteeredL0SAE, AuxKSAE, ElementwiseSAE):
    """`f = z H(z - threshold)`, `z = (x - b_dec) W_enc + b_enc` (eq. 3)."""

    name = "jumprelu"
    trainable = whole_batch = fused = True
    host_free = False
    rate = 0.5
    target_l0 = "required"
    defaults: ClassVar[Mapping[str, Any]] = {"bandwidth": 0.3, "l0_coefficient": 0.5}
    """`bandwidth` is e above, in the units of training, where inputs have unit variance per dimension; `l0_coefficient`
    is what the penalty counts beside the unexplained fraction of the variance."""
    threshold: Tensor

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        self.register_buffer("threshold", torch.zeros(cfg.d_sae))

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        super().check(cfg)
        for name, value in cfg.options.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise SteersmanError(f"option {name} must be a number above 0, got {value!r}")

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        return choose(rows.device).threshold_encode(
            rows,
            self._encoder(features),
            chosen(self.b_enc, features),
            chosen(self.threshold, features),
            self.input_bias,
        )

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return choose(x.device).threshold_select(x, self.W_enc.T, self.b_enc, self.threshold, self.input_bias)

    def prepare_training(self, config: Any) -> None:
        super().prepare_training(config)
        threshold = self.threshold
        del self.threshold
        self.threshold = nn.Parameter(threshold)

    def begin_training(self, x: Tensor, config: Any) -> None:
        """One threshold for all latents, above which lie `target_l0` pre-activations a token."""
        k = max(1, round(config.target_l0))
        self.threshold.fill_(largest_of_batch(self, x, self.b_enc, k).clamp_min(self._least()))

    def scale_code(self, factor: Tensor) -> None:
        super().scale_code(factor)
        self.threshold.mul_(factor).clamp_min_(self._least())

    def _least(self) -> float:
        """Thresholds stay above 0: below, they would let pass what a ReLU does not."""
        return self.options["bandwidth"] / 100

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        rows, bias = (self.W_enc.T, self.input_bias) if W_enc is None else (W_enc, None)
        with torch.no_grad():
            self.threshold.clamp_min_(self._least())
            lowest = self.threshold - self.options["bandwidth"] / 2
            z, indices = choose(x.device).threshold_select(x, rows, self.b_enc, lowest, bias)
            values = torch.where(z > self.threshold[indices], z, torch.zeros_like(z))
        bias = None if bias is None else self.latents.uses(bias)
        values, order = with_gradient(x, rows, self.b_enc, bias, values, indices)
        jumped: Any = _Jump.apply(values, self.threshold, z, order, self.options["bandwidth"])
        return TrainingCode(jumped, order, candidates=z)

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        step = super().training_step(x, target, state)
        code, bandwidth = step.code, self.options["bandwidth"]
        count: Any = _Count.apply(self.threshold, code.values, code.candidates, code.order, bandwidth)
        excess, slope = self._excess(count, len(x), state)
        weight = self.options["l0_coefficient"] * target.numel()
        # Its value is that of the batch; its gradient comes through the latents that are here.
        penalty = weight * (excess.square() + slope * (count - count.detach()))
        return Step(code, {**step.losses, "l0_penalty": penalty}, step.logged)

    def _excess(self, count: Tensor, n_tokens: int, state: TrainingState) -> tuple[Tensor, Tensor]:
        """What the penalty squares, from the number of active entries of this rank's `n_tokens`, and the derivative of
        the square by that number."""
        wanted, steering = state.config.target_l0, self.steering(state)
        control = 0.0 if steering is None else steering[0]
        excess = self.l0_over_batch(count, n_tokens) / wanted - 1 + control
        return excess, (2 / wanted) * excess / n_tokens

    @torch.no_grad()
    def fused_gradients(self, batch: FusedBatch) -> tuple[Step, Gradients]:
        """See `SAE.fused_gradients`. A candidate below its threshold has a gradient too, that of the threshold, so the
        products with its decoder row are taken beside those of the code."""
        step, gradients = super().fused_gradients(batch)
        code, bandwidth, order = step.code, self.options["bandwidth"], step.code.order.get()
        excess, slope = self._excess(count_active(code), len(batch.x), batch.state)
        weight = self.options["l0_coefficient"] * batch.target.numel()
        assert code.candidates is not None, "its own code has them"
        near = _near(code.candidates, self.threshold, code.order.indices, bandwidth)
        d_values = gradients.scale * order.value_gradient(gradients.residual, batch.weights.dec_rows)
        d_count = weight / batch.n_values * slope
        d_threshold = self.threshold * order.scatter(near * d_values) + d_count * order.scatter(near)
        further = {**gradients.further, "threshold": -d_threshold / bandwidth}
        losses = {**step.losses, "l0_penalty": weight * excess.square()}
        return Step(code, losses, step.logged), gradients._replace(further=further)

    @torch.no_grad()
    def after_step(self, step: Step, state: TrainingState) -> None:
        super().after_step(step, state)
        self.threshold.mul_((self.get_buffer("l0_control")[1] / 30).exp())

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        super().fold_input_scale(scale)
        self.threshold /= scale


def _near(z: Tensor, threshold: Tensor, indices: Tensor, bandwidth: float) -> Tensor:
    """Which entries z [N, K] > 0 lie within half a bandwidth of their threshold, as numbers."""
    return ((z > 0) & ((z - threshold[indices]).abs() < bandwidth / 2)).to(z.dtype)


class _Jump(torch.autograd.Function):
    """The code's values as they are; backward gives the thresholds their gradient (eq. 11)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, z: Tensor, order: Order, bandwidth: float) -> Tensor:
        ctx.save_for_backward(threshold, z)
        ctx.order, ctx.bandwidth = order, bandwidth
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        threshold, z = ctx.saved_tensors
        near = _near(z, threshold, ctx.order.indices, ctx.bandwidth)
        along = ctx.order.get().scatter(near * grad_outputs[0])
        return grad_outputs[0], -threshold / ctx.bandwidth * along, None, None, None


class _Count(torch.autograd.Function):
    """The number of active entries (a scalar); backward gives the thresholds their gradient (eq. 12)."""

    @staticmethod
    def forward(ctx: Any, threshold: Tensor, values: Tensor, z: Tensor, order: Order, bandwidth: float) -> Tensor:
        ctx.save_for_backward(threshold, z)
        ctx.order, ctx.bandwidth = order, bandwidth
        return (values > 0).sum(dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        threshold, z = ctx.saved_tensors
        near = ctx.order.get().scatter(_near(z, threshold, ctx.order.indices, ctx.bandwidth))
        return -near / ctx.bandwidth * grad_outputs[0], None, None, None, None
