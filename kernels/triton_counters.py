"""What a training step counts, in Triton: which latents were active, and how long the others have been silent.

Numbers are whole and added without rounding, so the order of atomic additions does not show.

Shape letters: N tokens, L latents, K active latents a token.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["n_pairs"])
def mark_active_kernel(values_ptr, indices_ptr, fired_ptr, n_active_ptr, n_pairs, BLOCK: tl.constexpr):
    """fired [L] becomes 1 at the latents of the pairs whose value is not 0; their number is added to n_active [1]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = tl.abs(tl.load(values_ptr + at, mask=at < n_pairs, other=0.0)) > 0.0
    latent = tl.load(indices_ptr + at, mask=active, other=0)
    tl.store(fired_ptr + latent, tl.full([BLOCK], 1.0, tl.float32), mask=active)
    tl.atomic_add(n_active_ptr, tl.sum(active.to(tl.int32), axis=0).to(tl.float64), sem="relaxed")


@triton.jit
def count_silence_kernel(silent_ptr, fired_ptr, limits_ptr, counts_ptr, L, LIMITS: tl.constexpr, BLOCK: tl.constexpr):
    """silent [L] is 0 where fired [L] is above 0 and grows by 1 elsewhere; how many reach each of limits [LIMITS] is
    added to counts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fired = tl.load(fired_ptr + at, mask=at < L, other=0) > 0
    silent = tl.where(fired, 0, tl.load(silent_ptr + at, mask=at < L, other=0) + 1)
    tl.store(silent_ptr + at, silent, mask=at < L)
    for i in tl.static_range(LIMITS):
        reached = (silent >= tl.load(limits_ptr + i)) & (at < L)
        tl.atomic_add(counts_ptr + i, tl.sum(reached.to(tl.int32), axis=0), sem="relaxed")


def mark_active(values: Tensor, indices: Tensor, fired: Tensor, n_active: Tensor) -> None:
    """See `torch_ops.mark_active`."""
    values, indices = values.contiguous(), indices.contiguous()
    n_pairs = values.numel()
    if n_pairs:
        mark_active_kernel[(triton.cdiv(n_pairs, BLOCK),)](
            values_ptr=values, indices_ptr=indices, fired_ptr=fired, n_active_ptr=n_active, n_pairs=n_pairs,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def count_silence(silent_steps: Tensor, fired: Tensor, limits: Tensor) -> Tensor:
    """See `torch_ops.count_silence`."""
    counts = torch.zeros(len(limits), dtype=torch.int32, device=silent_steps.device)
    count_silence_kernel[(triton.cdiv(len(silent_steps), BLOCK),)](
        silent_ptr=silent_steps, fired_ptr=fired, limits_ptr=limits, counts_ptr=counts, L=len(silent_steps),
        LIMITS=len(limits), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return counts
