"""What `rounding` computes, bit for bit, for kernels to call: moments in fewer bits. And rounding to nearest.

Shape letters: SIZE columns of a tile, one row's.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's decorator does not show what types a kernel takes.

import triton
import triton.language as tl
from triton import knobs

from steersman.kernels import rounding

BLOCK: tl.constexpr = tl.constexpr(rounding.BLOCK)
SIGN: tl.constexpr = tl.constexpr(-(1 << 31))
INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


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
    """See `rounding.to_blocks`: codes [SIZE] int32 and each code's exponent [SIZE] int32."""
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
    return codes, spread


@triton.jit
def from_blocks(codes, exponents, SPAN: tl.constexpr):
    """See `rounding.from_blocks`: codes and each code's exponent, both int32 -> fp32."""
    size = tl.abs(codes)
    short = tl.where(size > 0, size + ((exponents - SPAN) << 3), 0)
    return ((tl.maximum(short, 0) << 20) | (codes & SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """x fp32 in another dtype, to nearest, ties to even. Written out where Triton's interpreter truncates to bf16."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where((bits & 0x7F800000) != 0x7F800000, rounded, bits)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def fours(row, d, D, SIZE: tl.constexpr):
    """Columns d to d + SIZE - 1 of a row in fours, as threads have them: the first column of each four [SIZE / 4], and
    the place of its exponent. One load serves a thread's columns, and none crosses to another."""
    col = d + 4 * tl.arange(0, SIZE // 4)
    return col, row * tl.cdiv(D, BLOCK) + col // BLOCK


@triton.jit
def load_moment(m_ptr, exponents_ptr, places, mask, row, d, D, STATE: tl.constexpr, SIZE: tl.constexpr):
    """A moment at columns d to d + SIZE - 1 of a row as it is kept, and the exponents of its fours, where it has some:
    what `as_fp32` takes. Apart, so that other loads do not wait for these."""
    moment = tl.load(m_ptr + places, mask=mask, other=0)
    exponents = moment
    if STATE == "int8":
        col, block = fours(row, d, D, SIZE)
        exponents = tl.load(exponents_ptr + block, mask=col < D, other=0)
    return moment, exponents


@triton.jit
def as_fp32(moment, exponents, STATE: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr):
    """What `load_moment` gave, as fp32 [SIZE]."""
    if STATE == "int8":
        exponents = tl.reshape(tl.broadcast_to(exponents.to(tl.int32)[:, None], [SIZE // 4, 4]), [SIZE])
        return from_blocks(moment.to(tl.int32), exponents, SPAN)
    else:
        return moment.to(tl.float32)


@triton.jit
def store_moment(
    m_ptr, exponents_ptr, x, places, mask, row, d, D, random,
    STATE: tl.constexpr, SPAN: tl.constexpr, LARGEST: tl.constexpr, SIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write x [SIZE], 0 outside the mask, to columns d to d + SIZE - 1 of a row."""
    if STATE == "int8":
        codes, exponents = to_blocks(x, random, SPAN, LARGEST, SIZE, SIGNED)
        tl.store(m_ptr + places, codes.to(m_ptr.dtype.element_ty), mask=mask)
        col, block = fours(row, d, D, SIZE)
        exponents = tl.max(tl.reshape(exponents, [SIZE // 4, 4]), axis=1)
        tl.store(exponents_ptr + block, exponents.to(tl.uint8), mask=(col < D) & (col % BLOCK == 0))
    elif STATE == "bfloat16":
        bits = x.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, bits + (random & 0xFFFF), bits) & 0xFFFF0000
        bits = bits.to(tl.float32, bitcast=True)
        tl.store(m_ptr + places, bits.to(tl.bfloat16), mask=mask)  # exact: the rest is zero
    else:
        tl.store(m_ptr + places, x, mask=mask)
