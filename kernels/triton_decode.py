# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""Decode in Triton: the sum of K weighted decoder rows a token, with the residual and its squared error in one pass.

A program makes BD columns of one token: it reads the K rows' pieces of W_dec, KB rows at a time and all loads of a
group in flight together, and adds them in fp32 in a fixed order. Several programs share a token, so D = 2304 is nine
pieces of 256, not 4096 columns of which half are padding. Entries of value 0 read nothing.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KB = 8
"""Rows of W_dec that are read together."""


@triton.jit(do_not_specialize=["D", "K"])
def decode_kernel(
    values_ptr, indices_ptr, w_ptr, bias_ptr, x_ptr, out_ptr, squares_ptr, D, K,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out [N, D] = sum_k values[n, k] W[indices[n, k]] + bias; with RESIDUAL, x minus that, and squares [N, pieces] its
    sums of squares."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    total = tl.zeros([KB, BD], tl.float32)
    for first in range(0, K, KB):
        k = first + tl.arange(0, KB)
        value = tl.load(values_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        latent = tl.load(indices_ptr + token * K + k, mask=k < K, other=0).to(tl.int64)
        at = w_ptr + latent[:, None] * D + columns[None, :]
        row = tl.load(at, mask=inside[None, :] & (value != 0.0)[:, None], other=0.0)
        total += row.to(tl.float32) * value[:, None]
    out = tl.sum(total, axis=0)
    if BIAS:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        out = tl.load(x_ptr + token * D + columns, mask=inside, other=0.0).to(tl.float32) - out
        squares = tl.sum(tl.where(inside, out * out, 0.0), axis=0)
        tl.store(squares_ptr + token * tl.num_programs(1) + tl.program_id(1), squares)
    tl.store(out_ptr + token * D + columns, out, mask=inside)


def piece_of(D: int) -> int:
    """Columns of a program: 512, or 256 where 512 would leave a quarter of the last piece and more empty.

    >>> piece_of(4096), piece_of(2304), piece_of(100)
    (512, 256, 128)
    """
    if D <= 256:
        return max(16, triton.next_power_of_2(D))
    return 512 if D % 512 == 0 or D % 512 > 384 else 256


def _launch(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor | None
) -> tuple[Tensor, Tensor]:
    values, indices, W_dec = values.contiguous(), indices.contiguous(), W_dec.contiguous()
    (N, K), D = values.shape, W_dec.shape[1]
    piece = piece_of(D)
    grid = (N, triton.cdiv(D, piece))
    out = torch.empty(N, D, device=values.device)
    squares = torch.empty(grid if x is not None else (0,), device=values.device)
    if N:
        decode_kernel[grid](
            values_ptr=values, indices_ptr=indices, w_ptr=W_dec, bias_ptr=out if b_dec is None else b_dec,
            x_ptr=out if x is None else x.contiguous(), out_ptr=out, squares_ptr=squares, D=D, K=K,
            BIAS=b_dec is not None, RESIDUAL=x is not None, KB=KB, BD=piece, num_warps=4 if piece > 128 else 1,
        )  # fmt: skip
    return out, squares


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """See `reference.sparse_decode`: W_dec [L, D] fp32 or bf16 -> [N, D] fp32."""
    return _launch(values.detach(), indices, W_dec.detach(), None if b_dec is None else b_dec.detach(), None)[0]


def decode_residual(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.decode_residual`."""
    residual, squares = _launch(values.detach(), indices, W_dec.detach(), None if b_dec is None else b_dec.detach(), x)
    return residual, squares.sum(dim=1)
