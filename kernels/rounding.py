"""How the optimiser's state is kept in fewer bits, bit for bit the same in PyTorch and in Triton.

Moving averages change by less than one step of a small format, so plain rounding would freeze them. Every format here
rounds stochastically: random bits are added below the last bit that is kept, and the rest is cut off, which makes the
rounded value right on average. The random bits are a hash of row, column and step, so that they need no state, no
order of evaluation, and are the same on every device.

The 8-bit formats share an exponent among the 128 values of a block of a row, as the microscaling formats do (Open
Compute Project, "Microscaling Formats", 2023). A value keeps three bits of mantissa, and its exponent is counted from
the block's largest one:

- unsigned, for second moments: 32 exponents. A positive value that is smaller still is kept as the smallest, never as
  0, since a second moment is divided by.
- signed, for first moments: 16 exponents and the sign. Smaller values become 0.

Shape letters: R rows, D columns, B = ceil(D / 128) blocks of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Values that share an exponent."""

MANTISSA = 3
CUT = 23 - MANTISSA
"""Bits of an fp32 mantissa that the 8-bit formats drop."""
UNSIGNED_RANGE, SIGNED_RANGE = 31, 15
"""Exponents below the block's largest that can be kept."""


def mix(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers (C. Wellons, "lowbias32"): int32 in, int32 out."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(rows: Tensor, n_columns: int, seed: Tensor) -> Tensor:
    """32 random bits for every place of rows [R] int32 and columns 0 to D-1, by seed (int32, one value) -> [R, D]."""
    columns = torch.arange(n_columns, dtype=torch.int32, device=rows.device)
    return mix(mix(rows + mix(seed))[:, None] + columns)


def to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """x [R, D] fp32 as bfloat16, rounded stochastically by the low 16 bits of `random`."""
    bits = x.view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = torch.where(finite, bits + (random & 0xFFFF), bits)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)


def to_blocks(x: Tensor, random: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """x [R, D] fp32 in 8 bits, rounded stochastically by the low 16 bits of `random`.

    Returns the codes [R, D] (int8 if signed, else uint8, of the magnitude) and the blocks' exponents [R, B] uint8.
    """
    span, largest = (SIGNED_RANGE, 127) if signed else (UNSIGNED_RANGE, 255)
    short = ((x.view(torch.int32) & 0x7FFFFFFF) + ((random & 0xFFFF) << (CUT - 16))) >> CUT
    exponents = _blocks(short).amax(dim=-1) >> MANTISSA
    codes = short - ((_spread(exponents, x.shape[1]) - span) << MANTISSA)
    codes = torch.where(short > 0, codes.clamp(0 if signed else 1, largest), torch.zeros_like(codes))
    if signed:
        return torch.where(x < 0, -codes, codes).to(torch.int8), exponents.to(torch.uint8)
    return codes.to(torch.uint8), exponents.to(torch.uint8)


def from_blocks(codes: Tensor, exponents: Tensor) -> Tensor:
    """What `to_blocks` wrote, codes [R, D] and exponents [R, B] -> [R, D] fp32."""
    signed = codes.dtype == torch.int8
    wide = codes.int()
    size = wide.abs()
    first = (_spread(exponents.int(), codes.shape[1]) - (SIGNED_RANGE if signed else UNSIGNED_RANGE)) << MANTISSA
    short = torch.where(size > 0, size + first, torch.zeros_like(size)).clamp_min(0)
    x = (short << CUT).view(torch.float32)
    return torch.where(wide < 0, -x, x)


def _blocks(x: Tensor) -> Tensor:
    """[R, D] -> [R, B, 128], filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _spread(per_block: Tensor, n_columns: int) -> Tensor:
    """[R, B] -> [R, D]: a block's value at each of its places."""
    return per_block.repeat_interleave(BLOCK, dim=1)[:, :n_columns]
