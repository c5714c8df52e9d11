# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""Decode in Triton: the sum of K weighted decoder rows a token, and all that a training step wants of those rows.

`decode_kernel` makes BD columns of one token: it reads the K rows' pieces of W_dec, KB rows at a time and all loads of
a group in flight together, and adds them in fp32 in a fixed order. Several programs share a token, so D = 2304 is nine
pieces of 256, not 4096 columns of which half are padding.

`decode_and_dots_kernel` makes a whole token, piece by piece. The part of `<r, W[l]>` in a piece of the columns needs
that piece of the residual r and of the rows alone, which are in registers when the piece of r is known: residual,
squared error and dot products come from one reading of the rows. More rows than fit are read again for the dot
products, from the cache that they were just put into.

Entries of value 0 read nothing.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels.triton_rounding import nearest

KB = 8
"""Rows of W_dec that `decode_kernel` reads together."""
MOST_HELD = 128
"""Rows of which `decode_and_dots_kernel` holds a piece in registers."""


@triton.jit
def load_code(values_ptr, indices_ptr, token, first, K, KB: tl.constexpr):
    """Values [KB] fp32 and latents [KB] int64 of the entries from `first` on; 0 past the last."""
    k = first + tl.arange(0, KB)
    value = tl.load(values_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
    return value, tl.load(indices_ptr + token * K + k, mask=k < K, other=0).to(tl.int64)


@triton.jit
def load_rows(w_ptr, latent, value, cols, D):
    """Those columns of the latents' rows [KB, BD], fp32."""
    mask = (value != 0.0)[:, None] & (cols < D)[None, :]
    return tl.load(w_ptr + latent[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["K"])
def decode_kernel(
    values_ptr, indices_ptr, w_ptr, bias_ptr, out_ptr, D, K, BIAS: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr
):
    """out [N, D] = sum_k values[n, k] W[indices[n, k]] + bias."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([KB, BD], tl.float32)
    for first in range(0, K, KB):
        value, latent = load_code(values_ptr, indices_ptr, token, first, K, KB)
        total += load_rows(w_ptr, latent, value, cols, D) * value[:, None]
    out = tl.sum(total, axis=0)
    if BIAS:
        out += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + cols, out, mask=cols < D)


@triton.jit(do_not_specialize=["K", "x_stride"])
def decode_and_dots_kernel(
    values_ptr, indices_ptr, w_ptr, bias_ptr, x_ptr, residual_ptr, squares_ptr, dots_ptr, D, K, x_stride, scale,
    BIAS: tl.constexpr, HELD: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """residual [N, D] = scale x - (sum_k values[n, k] W[indices[n, k]] + bias), squares [N] its sums of squares, and
    dots [N, K] its products with the K rows. HELD: a group of KB rows is all there are."""
    token = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BD], tl.float32)
    if HELD:
        value, latent = load_code(values_ptr, indices_ptr, token, 0, K, KB)
        dots = tl.zeros([KB, BD // 8], tl.float32)  # eight columns are one thread's: no exchange until the end
    for d in range(0, D, BD):
        cols = d + tl.arange(0, BD)
        r = tl.load(x_ptr + token * x_stride + cols, mask=cols < D, other=0.0).to(tl.float32) * scale
        if BIAS:
            r -= tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        if HELD:
            rows = load_rows(w_ptr, latent, value, cols, D)
            r -= tl.sum(rows * value[:, None], axis=0)
            dots += tl.sum(tl.reshape(rows * r[None, :], [KB, BD // 8, 8]), axis=2)
        else:
            total = tl.zeros([KB, BD], tl.float32)
            for first in range(0, K, KB):
                value, latent = load_code(values_ptr, indices_ptr, token, first, K, KB)
                total += load_rows(w_ptr, latent, value, cols, D) * value[:, None]
            r -= tl.sum(total, axis=0)
            for first in range(0, K, KB):
                value, latent = load_code(values_ptr, indices_ptr, token, first, K, KB)
                part = tl.sum(load_rows(w_ptr, latent, value, cols, D) * r[None, :], axis=1)
                k = first + tl.arange(0, KB)
                at = dots_ptr + token * K + k
                tl.store(at, part + tl.load(at, mask=(k < K) & (d > 0), other=0.0), mask=k < K)
            tl.debug_barrier()  # the sums are read again, by other threads than wrote them
        squares += r * r
        tl.store(residual_ptr + token * D + cols, nearest(r, residual_ptr.dtype.element_ty), mask=cols < D)
    tl.store(squares_ptr + token, tl.sum(squares))
    if HELD:
        k = tl.arange(0, KB)
        tl.store(dots_ptr + token * K + k, tl.sum(dots, axis=1), mask=k < K)


def piece_of(D: int) -> int:
    """Columns of a program of `decode_kernel`: 512, or 256 where 512 would leave a quarter of the last piece and more
    empty.

    >>> piece_of(4096), piece_of(2304), piece_of(100)
    (512, 256, 128)
    """
    if D <= 256:
        return max(16, triton.next_power_of_2(D))
    return 512 if D % 512 == 0 or D % 512 > 384 else 256


def held_tile(K: int, D: int) -> dict[str, int]:
    """The tile of `decode_and_dots_kernel`: 64 numbers a thread, and a width that fits D.

    >>> held_tile(64, 4096), held_tile(32, 2304)
    ({'KB': 64, 'BD': 128, 'num_warps': 4}, {'KB': 32, 'BD': 256, 'num_warps': 4})
    """
    rows = triton.next_power_of_2(K) if K <= MOST_HELD else 64
    columns = max(16, min(512, max(128, 8192 // rows), triton.next_power_of_2(D)))
    return {"KB": rows, "BD": columns, "num_warps": min(8, max(1, rows * columns // 2048))}


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """See `reference.sparse_decode`: W_dec [L, D] fp32 or bf16 -> [N, D] fp32."""
    values, indices, W_dec = values.detach().contiguous(), indices.contiguous(), W_dec.detach().contiguous()
    (N, K), D = values.shape, W_dec.shape[1]
    piece = piece_of(D)
    out = torch.empty(N, D, device=values.device)
    bias = out if b_dec is None else b_dec.detach().contiguous()
    if N:
        decode_kernel[(N, triton.cdiv(D, piece))](
            values_ptr=values, indices_ptr=indices, w_ptr=W_dec, bias_ptr=bias, out_ptr=out, D=D, K=K,
            BIAS=b_dec is not None, KB=KB, BD=piece, num_warps=4 if piece > 128 else 1,
        )  # fmt: skip
    return out


def decode_and_dots(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.decode_and_dots`."""
    values, indices, W_dec = values.contiguous(), indices.contiguous(), W_dec.contiguous()
    (N, K), D = values.shape, W_dec.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if b_dec is None else b_dec.contiguous()
    residual = torch.empty(N, D, dtype=dtype, device=x.device)
    squares, dots = torch.empty(N, device=x.device), torch.empty(N, K, device=x.device)
    if N:
        decode_and_dots_kernel[(N,)](
            values_ptr=values, indices_ptr=indices, w_ptr=W_dec, bias_ptr=squares if bias is None else bias, x_ptr=x,
            residual_ptr=residual, squares_ptr=squares, dots_ptr=dots, D=D, K=K, x_stride=x.stride(0), scale=scale,
            BIAS=bias is not None, HELD=K <= MOST_HELD, **held_tile(K, D),
        )  # fmt: skip
    return residual, squares, dots
