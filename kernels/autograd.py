"""The differentiable operations of a sparse autoencoder: encode and decode with sparse backward passes.

Both build on whatever implementation `dispatch.choose` picks. No path makes an N x K x D tensor, and the sort of the
N*K pairs that the gradients need is done once a step, in the `LatentOrder` that `encode` returns.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.kernels import dispatch


@dataclass
class Order:
    """The pairs of one code sorted by latent, made when a backward pass first needs it."""

    indices: Tensor
    n_latents: int
    _latents: Any = None

    def get(self) -> Any:
        """The implementation's `LatentOrder` of these indices."""
        if self._latents is None:
            self._latents = dispatch.choose(self.indices.device).LatentOrder(self.indices, self.n_latents)
        return self._latents


class _Encode(torch.autograd.Function):
    """Values of a code whose indices are already chosen: only the chosen pre-activations have gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, values: Tensor, order: Order
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, values)
        ctx.order = order
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_values,) = grad_outputs
        x, W_enc, b_dec, values = ctx.saved_tensors
        order: Order = ctx.order
        dz = torch.where(values > 0, grad_values, torch.zeros_like(grad_values))  # ReLU after the selection
        dx = dW_enc = db_enc = db_dec = None
        if ctx.needs_input_grad[0]:
            dx = dispatch.choose(dz.device).sparse_decode(dz, order.indices, W_enc).to(x.dtype)
        if ctx.needs_input_grad[1]:
            centred = x if b_dec is None else x.float() - b_dec
            dW_enc = order.get().scatter_rows(dz, centred)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            db_enc = order.get().scatter(dz)
        if b_dec is not None and ctx.needs_input_grad[3]:
            # sum_n dz_n W_enc = (sum_n dz_n) W_enc: one vector-matrix product in place of an N*K*D gather.
            db_dec = -(db_enc @ W_enc.float())
        return dx, dW_enc, db_enc, db_dec, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, order: Order) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.order = order
        return dispatch.choose(values.device).sparse_decode(values, order.indices, W_dec, b_dec)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        values, W_dec = ctx.saved_tensors
        order: Order = ctx.order
        d_values = dW_dec = db_dec = None
        if ctx.needs_input_grad[0]:
            d_values = dispatch.choose(g.device).value_gradient(g, W_dec, order.indices)
        if ctx.needs_input_grad[1]:
            dW_dec = order.get().scatter_rows(values, g)
        if ctx.needs_input_grad[2]:
            db_dec = g.sum(dim=0)
        return d_values, dW_dec, db_dec, None


def with_gradient(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, values: Tensor, indices: Tensor
) -> tuple[Tensor, Order]:
    """Give a selected code its gradients with respect to x [N, D], W_enc [L, D], b_enc [L] and b_dec [D].

    values, indices [N, K] come from any of the encoders. Returns the values and the order to decode with.
    """
    order = Order(indices, len(W_enc))
    differentiable: Any = _Encode.apply(x, W_enc, b_enc, b_dec, values, order)
    return differentiable, order


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None) -> tuple[Tensor, Order]:
    """Differentiable `reference.topk_encode`: values [N, K], and the order whose `.indices` [N, K] they belong to.

    >>> values, order = topk_encode(torch.randn(5, 4), torch.randn(7, 4), torch.zeros(7), k=2)
    >>> values.shape, order.indices.dtype
    (torch.Size([5, 2]), torch.int32)
    """
    with torch.no_grad():
        values, indices = dispatch.choose(x.device).topk_encode(x, W_enc, b_enc, k, b_dec)
    return with_gradient(x, W_enc, b_enc, b_dec, values, indices)


def sparse_decode(values: Tensor, order: Order, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Differentiable `reference.sparse_decode` -> [N, D] fp32."""
    decoded: Any = _Decode.apply(values, W_dec, b_dec, order)
    return decoded
