"""The differentiable operations of a sparse autoencoder: encode and decode with sparse backward passes.

Both build on whatever implementation `dispatch.choose` picks. No path makes an N x K x D tensor, and the sort of the
N*K pairs that the gradients need is done once a step, in the `Order` that `topk_encode` returns. Under `torch.compile`
the same operations go through `ops`, as operators that the compiler knows.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steersman.kernels import dispatch, ops


@dataclass
class Order:
    """The pairs of one code sorted by latent, made when a backward pass first needs it."""

    indices: Tensor
    n_latents: int
    tensors: list[Tensor] = field(default_factory=list)
    """The sort, where it had to be made with the code (under `torch.compile`)."""
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
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        values: Tensor,
        order: Order,
        signed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, values)
        ctx.order, ctx.signed = order, signed
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, values = ctx.saved_tensors
        decode = dispatch.choose(values.device).sparse_decode
        order: Order = ctx.order
        grads = ops.encode_gradients(
            grad_outputs[0], x, W_enc, b_dec, values, order.indices, order.get, decode, ctx.needs_input_grad, ctx.signed
        )
        return *grads, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, order: Order) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.order = order
        return dispatch.choose(values.device).sparse_decode(values, order.indices, W_dec, b_dec)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        needs: Sequence[bool] = ctx.needs_input_grad
        return *ops.decode_gradients(grad_outputs[0], values, W_dec, ctx.order.get, needs), None


def with_gradient(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    values: Tensor,
    indices: Tensor,
    *,
    signed: bool = False,
) -> tuple[Tensor, Order]:
    """Give a selected code its gradients with respect to x [N, D], W_enc [L, D], b_enc [L] and b_dec [D].

    values, indices [N, K] come from any of the encoders. Entries that are not active (see `reference.active`) have no
    gradient. Returns the values and the order to decode with.
    """
    order = Order(indices, len(W_enc))
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            order.tensors = ops._op_sort_by_latent(indices, len(W_enc))
            values = ops._op_code_values(x, W_enc, b_enc, b_dec, values, indices, order.tensors, signed)
        return values, order
    differentiable: Any = _Encode.apply(x, W_enc, b_enc, b_dec, values, order, signed)
    return differentiable, order


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False
) -> tuple[Tensor, Order]:
    """Differentiable `reference.topk_encode`: values [N, K], and the order whose `.indices` [N, K] they belong to.

    >>> values, order = topk_encode(torch.randn(5, 4), torch.randn(7, 4), torch.zeros(7), k=2)
    >>> values.shape, order.indices.dtype
    (torch.Size([5, 2]), torch.int32)
    """
    with torch.no_grad():
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            values, indices = ops._op_topk_encode(x, W_enc, b_enc, k, b_dec, signed=signed)
        else:  # the same without the operator's own cost, which small steps on a CPU would feel
            values, indices = dispatch.choose(x.device).topk_encode(x, W_enc, b_enc, k, b_dec, signed=signed)
    return with_gradient(x, W_enc, b_enc, b_dec, values, indices, signed=signed)


def sparse_decode(values: Tensor, order: Order, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Differentiable `reference.sparse_decode` -> [N, D] fp32."""
    if torch.compiler.is_compiling():
        return ops._op_sparse_decode(values, order.indices, W_dec, b_dec, order.tensors)
    decoded: Any = _Decode.apply(values, W_dec, b_dec, order)
    return decoded


class RowGradient(NamedTuple):
    """The gradient of some rows of a parameter."""

    parameter: Tensor
    ids: Tensor
    """[A]."""
    rows: Tensor
    """[A, D]."""
    dim: int
    """The dimension of the parameter that the rows are numbered by."""

    def add(self) -> None:
        """Add it to the parameter's gradient."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        self.parameter.grad.movedim(self.dim, 0).index_add_(0, self.ids, self.rows.to(self.parameter.grad.dtype))


_COLLECTED: ContextVar[list[RowGradient] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_row_gradients() -> Iterator[list[RowGradient]]:
    """Within this, what `gather_rows` reads has its gradient put into the list that is given, when backward comes to
    it, instead of into a tensor as large as the parameter, which would be cleared and added for the sake of few rows.
    The caller adds each (`RowGradient.add`) after the backward pass."""
    found: list[RowGradient] = []
    token = _COLLECTED.set(found)
    try:
        yield found
    finally:
        _COLLECTED.reset(token)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, ids: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.W, ctx.dim, ctx.collected = W, dim, _COLLECTED.get()
        return W.movedim(dim, 0)[ids]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (ids,), g = ctx.saved_tensors, grad_outputs[0]
        if ctx.collected is not None and ctx.W.is_leaf:
            ctx.collected.append(RowGradient(ctx.W, ids, g, ctx.dim))
            return None, None, None
        whole = torch.zeros_like(ctx.W)
        whole.movedim(ctx.dim, 0).index_add_(0, ids, g)
        return whole, None, None


def gather_rows(W: Tensor, ids: Tensor, dim: int = 0) -> Tensor:
    """The rows [A, D] of W [L, D] (with dim=1 [D, L]) that ids [A] name; see `collect_row_gradients`.

    >>> gather_rows(torch.arange(6.0).view(3, 2), torch.tensor([2, 0])).tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """
    if torch.compiler.is_compiling():
        return W.movedim(dim, 0)[ids]
    rows: Any = _GatherRows.apply(W, ids, dim)
    return rows
