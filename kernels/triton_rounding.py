"""What `rounding` computes, bit for bit, as functions that kernels call; and rounding to nearest.

Shape letters: SIZE columns of a tile, one row's.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's decorator does not show what types a kernel takes.

import triton
import triton.language as tl

from steersman.kernels import rounding

BLOCK: tl.constexpr = tl.constexpr(rounding.BLOCK)


@triton.jit
def mix(x):
    """See `rounding.mix`; x is uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def to_blocks(x, random, SPAN: tl.constexpr, LARGEST: tl.constexpr, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    """See `rounding.to_blocks`: codes [SIZE] int32 and exponents [SIZE / 128] int32."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    short = (bits + ((random & 0xFFFF) << 4).to(tl.int32)) >> 20
    exponents = tl.max(tl.reshape(short, [SIZE // BLOCK, BLOCK]), axis=1) >> 3
    spread = tl.reshape(tl.broadcast_to(exponents[:, None], [SIZE // BLOCK, BLOCK]), [SIZE])
    codes = short - ((spread - SPAN) << 3)
    if SIGNED:
        codes = tl.where(short > 0, tl.minimum(tl.maximum(codes, 0), LARGEST), 0)
        codes = tl.where(x < 0, -codes, codes)
    else:
        codes = tl.where(short > 0, tl.minimum(tl.maximum(codes, 1), LARGEST), 0)
    return codes, exponents


@triton.jit
def from_blocks(codes, exponents, SPAN: tl.constexpr):
    """See `rounding.from_blocks`: codes and each code's exponent, both int32 -> fp32."""
    size = tl.abs(codes)
    short = tl.where(size > 0, size + ((exponents - SPAN) << 3), 0)
    x = (tl.maximum(short, 0) << 20).to(tl.float32, bitcast=True)
    return tl.where(codes < 0, -x, x)


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """x fp32 in another dtype, to nearest, ties to even. Written out for bf16, as Triton's interpreter truncates."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where((bits & 0x7F800000) != 0x7F800000, rounded, bits)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)
