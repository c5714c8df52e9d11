"""How an architecture says its gradients itself, so that the fused update trains it without autograd.

An architecture with `fused = True` has a method `fused_gradients(batch)`: what `training_step` loses, and the gradients
of it. It encodes with the rows in `batch.weights` (`encode_training(batch.x, batch.weights.enc_rows)`) and returns its
`Step` and `Gradients`: what every active pair of a token and a latent moves, the gradients that some latents have
beside (AuxK's), and those of parameters beyond the four that all architectures have. The pass of the kernels then moves
matrices and biases, and the plain form of the same rule the rest.

What the kernels know of a loss is that it reaches the encoder through the reconstruction: a pair's gradient is the
product of a residual with the latent's decoder row. A penalty on the values themselves needs autograd.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.kernels import AuxRows, UpdateState, choose, ops
from steersman.kernels.torch_ops import scaled
from steersman.sae.training import Latents, TrainingCode, TrainingState


@dataclass(frozen=True, kw_only=True)
class FusedBatch:
    """A batch as the fused update gives it to an architecture. Nothing here has gradients of autograd."""

    x: Tensor
    """[N, D]: what the encoder's rows multiply, scaled and without `input_bias`, in the dtype of the products."""
    target: Tensor
    """[N, D] in any dtype: what the output is compared with, once it is multiplied by `scale`."""
    scale: float
    """What rows of the batch are multiplied by."""
    n_values: int
    """Numbers in the targets of the whole batch. Losses are sums; their gradients are divided by it."""
    weights: UpdateState
    """The weights: `enc_rows` and `dec_rows` [L, D] in the dtype of the products, `b_enc` and `b_dec` fp32."""
    state: TrainingState
    """What else the step may know."""

    def decoded(self, code: TrainingCode, latents: Latents) -> tuple[Tensor, Tensor, Tensor]:
        """The residual `target - reconstruction` [N, D] in the dtype of the products, each token's squared error [N]
        and the residual's products with the decoder's rows [N, K]: see `kernels.reference.decode_and_dots`. `latents`
        are the SAE's."""
        values, indices = code.values, code.order.indices
        W_dec, b_dec, operands = self.weights.dec_rows, self.weights.b_dec, self.x.dtype
        if latents.whole is None:
            return ops.decode_and_dots(values, indices, W_dec, b_dec, self.target, self.scale, operands)
        part = choose(values.device).sparse_decode(values, indices, W_dec)
        residual = scaled(self.target, self.scale) - latents.sum(part).add_(b_dec)
        dots = code.order.get().value_gradient(residual, W_dec)
        return residual.to(operands), residual.square().sum(dim=1), dots


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, from operands in fp32 or less."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


class Gradients(NamedTuple):
    """The gradients of a step's losses, as the pass of the kernels takes them: see `kernels.update.backward_update`."""

    residual: Tensor
    """[N, D] (with `rows` [M, D]) in the dtype of the products: the gradient of the reconstruction is `scale` times
    it."""
    scale: float
    """`-2 / n_values` where the loss is the squared error."""
    dots: Tensor
    """[N, K] fp32: the products of the residual's rows with the decoder's rows of the code."""
    aux: AuxRows | None = None
    """Gradients that some latents have beside the code's."""
    further: Mapping[str, Tensor] = {}
    """Gradients of further parameters, by their names: thresholds, gates. One that is left out has none."""
    rows: Tensor | None = None
    """[N, K]: which row of the residual a pair of the code reads, where that is not its token's; the gradient of b_dec
    then is that of the first N rows."""
