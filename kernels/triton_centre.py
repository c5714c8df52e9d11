"""The input of the encoder in Triton: rows scaled, centred and rounded in one pass.

Shape letters: N tokens, D width.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels.triton_rounding import nearest


@triton.jit(do_not_specialize=["N", "x_stride"])
def centre_kernel(
    x_ptr, bias_ptr, out_ptr, N, D, x_stride, scale, BIAS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
):
    """out [N, D] = scale x - bias."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (n < N)[:, None] & (cols < D)[None, :]
    rows = n.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    if BIAS:
        x -= tl.load(bias_ptr + cols, mask=cols < D, other=0.0)[None, :]
    tl.store(out_ptr + rows * D + cols[None, :], nearest(x, out_ptr.dtype.element_ty), mask=mask)


def centre(x: Tensor, scale: float, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.centre`."""
    N, D = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(N, D, dtype=dtype, device=x.device)
    BD = max(16, min(1024, triton.next_power_of_2(D)))
    if N:
        centre_kernel[(triton.cdiv(N, 4), triton.cdiv(D, BD))](
            x_ptr=x, bias_ptr=out if b_dec is None else b_dec, out_ptr=out, N=N, D=D, x_stride=x.stride(0),
            scale=scale, BIAS=b_dec is not None, ROWS=4, BD=BD, num_warps=4,
        )  # fmt: skip
    return out
