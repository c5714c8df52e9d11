"""What the first latents of a code rebuild alone, for several prefixes of the latents, from the one code.

A latent of group j has a part in the prefixes j, j + 1, ... So with r_g the residual of prefix g and w_g the weight of
its squared error, all that the latents of group j learn comes from the one residual `R_j = sum over g >= j of w_g r_g`:
the code's pairs read a table of G N rows where those of a plain SAE read N, and no more of them are read. Memory is
G N D.

Shape letters: N tokens, L latents, D width, K active latents a token, G groups (or prefixes), P pairs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.kernels import dispatch, ops, torch_ops
from steersman.kernels.autograd import Order

TOKENS_AT_ONCE = 256
"""Tokens whose residuals are made together on a CPU: they stay in cache from the first prefix to the last."""


def pair_rows(indices: Tensor, ends: Tensor) -> Tensor:
    """Which row of a table [G * N, D] each pair of a code reads, that of its token in its latent's group: indices
    [N, K], ends [G] int64 (where the groups end) -> [N, K] int64."""
    tokens = torch.arange(len(indices), device=indices.device)
    return torch.bucketize(indices.long(), ends, right=True) * len(indices) + tokens[:, None]


def group_parts(values: Tensor, indices: Tensor, W_dec: Tensor, ends: Tensor) -> Tensor:
    """What each group adds to the reconstruction: values, indices [N, K], W_dec [L, D] -> [N, G, D] fp32."""
    kernels, (N, K), G = dispatch.choose(values.device), values.shape, len(ends)
    if kernels is not torch_ops or values.device.type != "cpu":  # entries of value 0 read nothing
        group = torch.bucketize(indices.long(), ends, right=True)
        parts = torch.empty(N, G, W_dec.shape[1], device=values.device)
        for g in range(G):
            own = torch.where(group == g, values, torch.zeros_like(values))
            parts[:, g] = ops._op_sparse_decode(own, indices, W_dec, None, [])
        return parts
    # In the order of their latents, the pairs of a token and a group are one bag.
    indices, order = indices.sort(dim=1)
    starts = F.pad(torch.searchsorted(indices, ends.to(indices.dtype).repeat(N, 1)), (1, -1))
    starts += torch.arange(0, N * K, K)[:, None]
    bags = F.embedding_bag(
        indices.flatten(), W_dec.float(), starts.flatten().to(indices.dtype), mode="sum",
        per_sample_weights=values.float().gather(1, order).flatten(),
    )  # fmt: skip
    return bags.view(N, G, -1)


@torch.no_grad()
def prefix_residuals(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    ends: Tensor,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual of every prefix, `target` [N, D] fp32 less what its latents rebuild, [G, N, D] fp32, and its squared
    error summed over tokens, [G]. `total` adds the parts [N, G, D] that several processes have of the groups."""
    (N, D), G = target.shape, len(ends)
    residuals, errors = torch.empty(G, N, D, device=target.device), torch.zeros(G, device=target.device)
    rows = TOKENS_AT_ONCE if total is None and target.device.type == "cpu" else max(1, N)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        added = group_parts(values[part], indices[part], W_dec, ends)
        added = added if total is None else total(added)
        left = target[part] - b_dec
        for g in range(G):
            left = torch.sub(left, added[:, g], out=residuals[g, part])
            flat = left.flatten()
            errors[g] += torch.dot(flat, flat)
    return residuals, errors


def suffix_sums_(residuals: Tensor, weights: Tensor | None = None) -> Tensor:
    """`R_j = sum over g >= j of weights[g] residuals[g]`, in place: residuals [G, N, D], weights [G]; None: all 1."""
    if weights is not None:
        residuals[-1] *= weights[-1]
    for g in range(len(residuals) - 2, -1, -1):
        later, own = residuals[g + 1], residuals[g]
        if weights is None:
            own += later
        else:
            torch.addcmul(later, own, weights[g], out=own)
    return residuals


class _PrefixErrors(torch.autograd.Function):
    """Forward: residuals [G, N, D] and errors [G]; backward: those of the errors."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, order: Order, ends: Tensor, total: Any
    ) -> tuple[Tensor, Tensor]:
        residuals, errors = prefix_residuals(values, order.indices, W_dec, b_dec, target, ends, total)
        ctx.save_for_backward(values, W_dec, ends)
        ctx.order, ctx.residuals = order, residuals
        ctx.mark_non_differentiable(residuals)
        return residuals, errors

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec, ends = ctx.saved_tensors
        table = suffix_sums_(ctx.residuals, -2 * grad_outputs[1])
        db_dec, d_target = table[0].sum(dim=0), -table[0] if ctx.needs_input_grad[3] else None
        order, table = ctx.order.get().reading(pair_rows(ctx.order.indices, ends)), table.flatten(0, 1)
        ctx.residuals = None  # they are the table now
        return order.value_gradient(table, W_dec), order.scatter_rows(values, table), db_dec, d_target, *(None,) * 3


def prefix_errors(
    values: Tensor,
    order: Order,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    ends: Tensor,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable `prefix_residuals`: the errors have gradients, once, to the values, W_dec, b_dec and the target;
    the residuals have none, and are used up by the backward pass."""
    found: Any = _PrefixErrors.apply(values, W_dec, b_dec, target, order, ends, total)
    return found
