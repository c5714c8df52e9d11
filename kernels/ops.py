"""The kernels as PyTorch operators (`_op_*`, in PyTorch `torch.ops.steersman.*`), which `torch.compile` knows.

Each has a fake that says what shapes come out, and encode and decode have their autograd rules; the rules' formulas
stand here once, for these operators and for `autograd`. Which implementation runs is decided by the device, as
everywhere.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.kernels import dispatch, update
from steersman.kernels.reference import active
from steersman.kernels.update import AuxRows, UpdateRule, UpdateState

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def encode_gradients(
    grad_values: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    values: Tensor,
    indices: Tensor,
    order: Callable[[], Any],
    decode: Decode,
    needs: Sequence[bool],
    signed: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, W_enc, b_enc and b_dec from that of the values; `needs` says which are wanted.

    `order` gives the sorted pairs when they are needed, `decode` sums rows of W_enc token by token.
    """
    dz = torch.where(active(values, signed), grad_values, torch.zeros_like(grad_values))
    dx = dW_enc = db_enc = db_dec = None
    if needs[0]:
        dx = decode(dz, indices, W_enc).to(x.dtype)
    if needs[1]:
        centred = x if b_dec is None else x.float() - b_dec
        dW_enc = order().scatter_rows(dz, centred)
    if needs[2] or needs[3]:
        db_enc = order().scatter(dz)
        if b_dec is not None and needs[3]:
            # sum_n dz_n W_enc = (sum_n dz_n) W_enc: one vector-matrix product in place of an N*K*D gather.
            db_dec = -(db_enc @ W_enc.float())
    return dx, dW_enc, db_enc, db_dec


def decode_gradients(
    g: Tensor, values: Tensor, W_dec: Tensor, order: Callable[[], Any], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the values, W_dec and b_dec from that of the reconstruction; `needs` says which are wanted."""
    d_values = order().value_gradient(g, W_dec) if needs[0] else None
    dW_dec = order().scatter_rows(values, g) if needs[1] else None
    return d_values, dW_dec, g.sum(dim=0) if needs[2] else None


@torch.library.custom_op("steersman::topk_encode", mutates_args=())
def _op_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """See `reference.topk_encode`. The selection has no gradient; `_op_code_values` gives the values theirs."""
    return dispatch.choose(x.device).topk_encode(x, W_enc, b_enc, k, b_dec, signed=signed)


@_op_topk_encode.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Any = None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k, dtype=torch.float32), x.new_empty(len(x), k, dtype=torch.int32)


@torch.library.custom_op("steersman::sort_by_latent", mutates_args=())
def _op_sort_by_latent(indices: Tensor, n_latents: int) -> list[Tensor]:
    """The tensors of the implementation's `LatentOrder` of indices [N, K]."""
    return dispatch.choose(indices.device).LatentOrder(indices, n_latents).tensors


@_op_sort_by_latent.register_fake
def _(indices: Tensor, n_latents: int) -> list[Tensor]:
    return dispatch.choose(indices.device).LatentOrder.shapes(indices, n_latents)


def _order(indices: Tensor, n_latents: int, tensors: Sequence[Tensor]) -> Any:
    return dispatch.choose(indices.device).LatentOrder.of(indices, n_latents, list(tensors))


@torch.library.custom_op("steersman::scatter_rows", mutates_args=())
def _op_scatter_rows(
    weights: Tensor, rows: Tensor, indices: Tensor, n_latents: int, order: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """See `reference.scatter_rows`; `order` is what `_op_sort_by_latent` gave."""
    return _order(indices, n_latents, order).scatter_rows(weights, rows)


@_op_scatter_rows.register_fake
def _(weights: Tensor, rows: Tensor, indices: Tensor, n_latents: int, order: Sequence[Tensor]) -> Tensor:
    return weights.new_empty(n_latents, rows.shape[1], dtype=torch.float32)


@torch.library.custom_op("steersman::scatter", mutates_args=())
def _op_scatter(weights: Tensor, indices: Tensor, n_latents: int, order: Sequence[Tensor]) -> Tensor:
    """The sum of weights [N, K] over the pairs of each latent -> [L]."""
    return _order(indices, n_latents, order).scatter(weights)


@_op_scatter.register_fake
def _(weights: Tensor, indices: Tensor, n_latents: int, order: Sequence[Tensor]) -> Tensor:
    return weights.new_empty(n_latents, dtype=torch.float32)


@torch.library.custom_op("steersman::value_gradient", mutates_args=())
def _op_value_gradient(
    g: Tensor, W_dec: Tensor, indices: Tensor, order: Sequence[Tensor], pair_rows: Tensor | None = None
) -> Tensor:
    """See `reference.value_gradient`; with pair_rows [N, K] a pair reads that row of g [M, D], not its token's."""
    sorted_pairs = _order(indices, len(W_dec), order)
    return (sorted_pairs if pair_rows is None else sorted_pairs.reading(pair_rows)).value_gradient(g, W_dec)


@_op_value_gradient.register_fake
def _(
    g: Tensor, W_dec: Tensor, indices: Tensor, order: Sequence[Tensor], pair_rows: Tensor | None = None
) -> Tensor:  # fmt: skip
    return g.new_empty(indices.shape, dtype=torch.float32)


def value_gradient(g: Tensor, W_dec: Tensor, indices: Tensor, pair_rows: Tensor) -> Tensor:
    """`<g[pair_rows[n, k]], W_dec[indices[n, k]]>` [N, K] fp32; without gradients."""
    return _op_value_gradient(g, W_dec, indices, _op_sort_by_latent(indices, len(W_dec)), pair_rows)


class _Operators:
    """A `LatentOrder` whose every method is an operator."""

    def __init__(self, indices: Tensor, n_latents: int, tensors: Sequence[Tensor]):
        self.indices, self.n_latents, self.tensors = indices, n_latents, list(tensors)

    def scatter_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        return _op_scatter_rows(weights, rows, self.indices, self.n_latents, self.tensors)

    def scatter(self, weights: Tensor) -> Tensor:
        return _op_scatter(weights, self.indices, self.n_latents, self.tensors)

    def value_gradient(self, g: Tensor, W_dec: Tensor) -> Tensor:
        return _op_value_gradient(g, W_dec, self.indices, self.tensors)


@torch.library.custom_op("steersman::code_values", mutates_args=())
def _op_code_values(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    values: Tensor,
    indices: Tensor,
    order: Sequence[Tensor],
    signed: bool,
) -> Tensor:
    """A copy of the values [N, K] of a selected code, with gradients to x, W_enc, b_enc and b_dec."""
    return values.clone()


@_op_code_values.register_fake
def _(x: Any, W_enc: Any, b_enc: Any, b_dec: Any, values: Tensor, indices: Any, order: Any, signed: bool) -> Tensor:
    return torch.empty_like(values)


def _keep_code(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W_enc, _, b_dec, values, indices, order, ctx.signed = inputs
    ctx.save_for_backward(x, W_enc, b_dec, values, indices, *order)


def _code_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, W_enc, b_dec, values, indices, *order = ctx.saved_tensors
    sorted_pairs = _Operators(indices, len(W_enc), order)

    def decode(dz: Tensor, indices: Tensor, W: Tensor) -> Tensor:
        return _op_sparse_decode(dz, indices, W, None, [])

    needs = ctx.needs_input_grad
    grads = encode_gradients(grad, x, W_enc, b_dec, values, indices, lambda: sorted_pairs, decode, needs, ctx.signed)
    return *grads, None, None, [None] * len(order), None


_op_code_values.register_autograd(_code_backward, setup_context=_keep_code)


@torch.library.custom_op("steersman::sparse_decode", mutates_args=())
def _op_sparse_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, order: Sequence[Tensor]
) -> Tensor:
    """See `reference.sparse_decode`; `order` may be empty where no gradient is taken."""
    return dispatch.choose(values.device).sparse_decode(values, indices, W_dec, b_dec)


@_op_sparse_decode.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, order: Any) -> Tensor:
    return values.new_empty(len(values), W_dec.shape[1], dtype=torch.float32)


def _keep_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, W_dec, _, order = inputs
    ctx.save_for_backward(values, indices, W_dec, *order)


def _decode_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    values, indices, W_dec, *order = ctx.saved_tensors
    sorted_pairs = _Operators(indices, len(W_dec), order or _op_sort_by_latent(indices, len(W_dec)))
    needs = ctx.needs_input_grad
    wanted = (needs[0], needs[2], needs[3])
    d_values, dW_dec, db_dec = decode_gradients(g, values, W_dec, lambda: sorted_pairs, wanted)
    return d_values, None, dW_dec, db_dec, [None] * len(order)


_op_sparse_decode.register_autograd(_decode_backward, setup_context=_keep_decode)


@torch.library.custom_op("steersman::centre", mutates_args=())
def _op_centre(x: Tensor, scale: float, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.centre`."""
    centred = dispatch.choose(x.device).centre(x, scale, b_dec, dtype)
    return centred.clone() if centred is x else centred  # an operator returns no argument


@_op_centre.register_fake
def _(x: Tensor, scale: float, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def centre(x: Tensor, scale: float, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.centre`; without gradients."""
    return _op_centre(x, scale, b_dec, dtype)


@torch.library.custom_op("steersman::decode_and_dots", mutates_args=())
def _op_decode_and_dots(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.decode_and_dots`."""
    return dispatch.choose(values.device).decode_and_dots(values, indices, W_dec, b_dec, x, scale, dtype)


@_op_decode_and_dots.register_fake
def _(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = values.new_empty(len(x), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), sums, values.new_empty(values.shape, dtype=torch.float32)


def decode_and_dots(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.decode_and_dots`; without gradients."""
    return _op_decode_and_dots(values, indices, W_dec, b_dec, x, scale, dtype)


@torch.library.custom_op("steersman::backward_update", mutates_args=("weights", "rows", "moments", "n_steps", "parts"))
def _op_backward_update(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    moments: Sequence[Tensor],
    n_steps: Tensor,
    lr: Tensor,
    bias_lr: Tensor,
    residual: Tensor,
    scale: float,
    centred: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    aux: Sequence[Tensor],
    parts: Tensor | None,
    pair_rows: Tensor | None,
    first_latent: int,
    centred_by_b_dec: bool,
    signed: bool,
    rule: str,
    beta1: float,
    beta2: float,
    eps: float,
    state_dtype: str,
) -> None:
    how = UpdateRule(name=rule, beta1=beta1, beta2=beta2, eps=eps, state_dtype=state_dtype)  # pyright: ignore[reportArgumentType]
    state = UpdateState.unflatten(how, weights, rows, moments, n_steps, first_latent)
    run = getattr(dispatch.choose(residual.device), "backward_update", update.backward_update)
    extra = AuxRows(*aux) if aux else None
    run(
        state, how, lr, bias_lr, residual, scale, centred, values, indices, dots, extra,
        centred_by_b_dec=centred_by_b_dec, signed=signed, parts=parts, rows=pair_rows,
    )  # fmt: skip


@_op_backward_update.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


def backward_update(
    state: UpdateState,
    rule: UpdateRule,
    lr: Tensor,
    bias_lr: Tensor,
    residual: Tensor,
    scale: float,
    centred: Tensor,
    values: Tensor,
    indices: Tensor,
    dots: Tensor,
    aux: AuxRows | None,
    *,
    centred_by_b_dec: bool,
    signed: bool = False,
    parts: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """See `update.backward_update`: on the device's implementation, as an operator that changes `state` in place."""
    weights, of_products, moments = state.flatten()
    _op_backward_update(
        weights, of_products, moments, state.n_steps, lr, bias_lr, residual, scale, centred, values, indices, dots,
        list(aux or ()), parts, rows, state.first_latent, centred_by_b_dec, signed, rule.name, rule.beta1, rule.beta2,
        rule.eps, rule.state_dtype,
    )  # fmt: skip


@torch.library.custom_op("steersman::mark_active", mutates_args=("fired", "n_active"))
def _op_mark_active(values: Tensor, indices: Tensor, fired: Tensor, n_active: Tensor) -> None:
    dispatch.choose(values.device).mark_active(values, indices, fired, n_active)


@_op_mark_active.register_fake
def _(values: Tensor, indices: Tensor, fired: Tensor, n_active: Tensor) -> None:
    return None


def mark_active(values: Tensor, indices: Tensor, fired: Tensor, n_active: Tensor) -> None:
    """See `torch_ops.mark_active`; without gradients."""
    _op_mark_active(values.detach(), indices, fired, n_active)


@torch.library.custom_op("steersman::count_silence", mutates_args=("silent_steps",))
def _op_count_silence(silent_steps: Tensor, fired: Tensor, limits: Tensor) -> Tensor:
    return dispatch.choose(fired.device).count_silence(silent_steps, fired, limits)


@_op_count_silence.register_fake
def _(silent_steps: Tensor, fired: Tensor, limits: Tensor) -> Tensor:
    return torch.empty_like(limits)


def count_silence(silent_steps: Tensor, fired: Tensor, limits: Tensor) -> Tensor:
    """See `torch_ops.count_silence`."""
    return _op_count_silence(silent_steps, fired, limits)
