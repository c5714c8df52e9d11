# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""The product of the Triton encoders and what its epilogue does with a tile of pre-activations.

`wave_kernel` multiplies a tile and stores it, appends what is above a threshold to buffers of candidates, or writes the
code, by its mode. `small_batch_kernel` is for few tokens, where reading W_enc is the work: each row of it is read once.

Shape letters: N tokens, L latents, D width, C slots of a row's buffer.
"""

import functools
import os
import warnings
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from steersman.kernels import tiles
from steersman.kernels.operands import Operands
from steersman.kernels.triton_select import LAST, key_ptx, make_key

# What an epilogue does with a tile; see `wave_kernel`.
FIRST, FILTER, THRESHOLD, DENSE = (tl.constexpr(mode) for mode in range(4))


@triton.jit
def product_tile(x, w, row0, column0, N, L, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`x[row0:, :] w[column0:, :]^T` -> [BM, BN] fp32. With TMA, x and w are tensor descriptors, else
    pointers to rows of D elements, D a multiple of 8."""
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        # With a loop that may not run at all, ptxas sees another definition of the accumulators beside wgmma's and
        # waits for each wgmma before the next (its C7515).
        tl.assume(D > 0)
        for k in range(0, D, BK):
            acc = tl.dot(x.load([row0, k]), w.load([column0, k]).T, acc, input_precision=PRECISION)
    else:
        D = D // 8 * 8  # so that loads are known to start on 16 bytes
        rows = row0 + tl.arange(0, BM)
        columns = column0 + tl.arange(0, BN)
        depth = tl.arange(0, BK)
        x_at = x + rows.to(tl.int64)[:, None] * D + depth[None, :]
        w_at = w + columns.to(tl.int64)[:, None] * D + depth[None, :]
        for k in range(0, D, BK):
            there = depth[None, :] < D - k
            a = tl.load(x_at, mask=there & (rows < N)[:, None], other=0.0)
            b = tl.load(w_at, mask=there & (columns < L)[:, None], other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            x_at += BK
            w_at += BK
    return acc


PACK = tl.constexpr(4)
"""Values that share a branch: eight would take more registers than sm_100 has."""


def _write_ptx(signed: bool) -> str:
    """PTX of `write_hits`. Warps branch as one: over a pack of values, then over one."""
    pack = range(PACK.value)
    out, values, tau, mask, begin, bit, low, step, base, slots = (
        [f"${len(pack) * i + j}" for j in pack] for i in range(10)
    )
    sizes = [f"a{i}" if signed else value for i, value in enumerate(values)]
    absolute = [f"abs.f32 a{i}, {value};" for i, value in enumerate(values) if signed]
    hits = [f"setp.gtu.f32 p{i}, {size}, {tau[i]};" for i, size in enumerate(sizes)]
    ballots = [f"vote.sync.ballot.b32 hit{i}, p{i}, 0xffffffff;" for i in pack]
    writes = [
        f"""setp.eq.s32 some, hit{i}, 0;
@some bra.uni NEXT{i};
bfe.u32 slot, {mask[i]}, 0, {bit[i]};
popc.b32 slot, slot;
add.s32 slot, slot, {begin[i]};
sub.s32 latent, {low[i]}, {step[i]};
{key_ptx(values[i], signed)}
mad.wide.s32 at, slot, 8, {base[i]};
setp.lt.and.s32 room, slot, {slots[i]}, p{i};
@room st.global.v2.b32 [at], {{latent, bits}};
NEXT{i}:"""
        for i in pack
    ]
    lines = [
        "{",
        ".reg .pred some, more, isnan, room, p<4>;",
        ".reg .b32 slot, bits, sign, latent, hit<4>;",
        ".reg .b64 at;",
        ".reg .f32 value, a<4>;",
        *(f"mov.b32 {register}, 0;" for register in out),
        *absolute,
        *hits,
        "or.pred some, p0, p1;",
        "or.pred more, p2, p3;",
        "or.pred some, some, more;",
        "vote.sync.any.pred some, some, 0xffffffff;",
        "@!some bra.uni NONE;",
        *ballots,
        *writes,
        "NONE:",
        "}",
    ]
    return "\n".join(lines)


WRITE = tl.constexpr(_write_ptx(signed=False))
WRITE_SIGNED = tl.constexpr(_write_ptx(signed=True))
WRITE_REGISTERS = tl.constexpr(",".join(kind for kind in ("=&r", *"ffrrrrrlr") for _ in range(PACK.value)))


@triton.jit
def count_bits(x, PTX: tl.constexpr):
    """How many bits of each int32 are set."""
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        u = x.to(tl.uint32, bitcast=True)
        u = u - ((u >> 1) & 0x55555555)
        u = (u & 0x33333333) + ((u >> 2) & 0x33333333)
        u = (u + (u >> 4)) & 0x0F0F0F0F
        return ((u * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def write_hits(values, tau, mask, begin, bit, latent, step, base, C: tl.constexpr, SIGNED: tl.constexpr,
               PTX: tl.constexpr):  # fmt: skip
    """Store the keys of what is above tau, of latents `latent + step`. A value's slot after `base` is `begin` and the
    number of bits in `mask` below `bit`; one from C on is not written. With PTX, values of which none is above cost a
    comparison and a fourth of a branch; without, this is the definition, which Triton's interpreter runs."""
    if PTX:
        every = tl.zeros(values.shape, tl.int32)
        if SIGNED:
            low, step = ((LAST >> 1) - latent) << 1, step << 1
        else:
            low = LAST - latent
        tl.inline_asm_elementwise(
            WRITE_SIGNED if SIGNED else WRITE, WRITE_REGISTERS,
            [values, tau + every.to(tl.float32), mask + every, begin + every, bit + every, low + every, step + every,
             base.to(tl.int64) + every, every + C],
            dtype=tl.int32, is_pure=False, pack=PACK,
        )  # fmt: skip
    else:
        sizes = tl.abs(values) if SIGNED else values
        slot = begin + count_bits(mask & ((1 << bit) - 1), PTX)
        tl.store(base + slot, make_key(values, latent + step, SIGNED), mask=~(sizes <= tau) & (slot < C))


@triton.jit
def append(acc, tau, rows, column0, N, buffer_ptr, count_ptr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           SIGNED: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Append to the rows' buffers what is above tau [BM] in acc [BM, BN], with SIGNED what is so in magnitude, and NaN.

    A row is looked at as 4 quarters, columns 8j + 2q and 8j + 2q + 1 for all j: what one thread holds of a matrix
    unit's result (of `mma` and `wgmma`), so that sums are taken within a thread. What is above tau are the bits of two
    words. An atomic addition a quarter reserves the slots; what finds none is counted all the same, which marks its row
    as failed.
    """
    quarters = tl.reshape(tl.permute(tl.reshape(acc, (BM, BN // 8, 4, 2)), (0, 2, 1, 3)), (BM, 4, BN // 4))
    inside = (rows < N)[:, None]
    position = tl.arange(0, BN // 4)[None, None, :]
    quarter = tl.arange(0, 4)[None, :]
    tau = tau[:, None, None]
    sizes = tl.abs(quarters) if SIGNED else quarters
    bits = (~(sizes <= tau)).to(tl.int32) << (position % 32)  # not "> tau", which leaves out NaN
    low_half = position < 32
    low = tl.sum(tl.where(low_half, bits, 0), axis=2)
    high = tl.sum(tl.where(low_half, 0, bits), axis=2)
    n_low = count_bits(low, PTX)
    n = n_low + count_bits(high, PTX)
    start = tl.atomic_add(count_ptr + rows[:, None] + quarter * 0, n, mask=inside & (n > 0), sem="relaxed")
    start = tl.where(inside, start, C)
    write_hits(
        quarters, tau,
        tl.where(low_half, low[:, :, None], high[:, :, None]),
        tl.where(low_half, start[:, :, None], (start + n_low)[:, :, None]),
        position % 32,
        (column0 + quarter * 2)[:, :, None],
        position // 2 * 8 + position % 2,
        buffer_ptr + rows.to(tl.int64)[:, None, None] * C,
        C, SIGNED, PTX,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "L", "D", "first", "last"])
def wave_kernel(
    x, w, bias_ptr, tau_ptr, buffer_ptr, count_ptr, N, L, D, first, last,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, SIGNED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One wave: a program computes the pre-activations of BM tokens and BN of the latents first <= l < last.

    MODE FIRST stores all of them as keys; FILTER appends those above tau [N]; THRESHOLD those that are positive and
    above tau [L]; DENSE writes those to buffer [N, L] fp32 and 0 elsewhere. GROUP blocks of rows share the tiles of W
    in the cache.
    """
    program = tl.program_id(0)
    n_row_blocks = tl.cdiv(N, BM)
    n_tiles = tl.cdiv(last - first, BN)
    group = program // (GROUP * n_tiles)
    in_group = tl.minimum(n_row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * n_tiles)
    row0 = (group * GROUP + within % in_group) * BM
    column0 = first + within // in_group * BN
    acc = product_tile(x, w, row0, column0, N, L, D, BM, BN, BK, TMA, PRECISION)

    rows = row0 + tl.arange(0, BM)
    columns = column0 + tl.arange(0, BN)
    inside = columns < last
    acc += tl.load(bias_ptr + columns, mask=inside, other=float("-inf"))[None, :]
    if MODE == FIRST:
        at = buffer_ptr + rows.to(tl.int64)[:, None] * C + (columns - first)[None, :]
        tl.store(at, make_key(acc, columns[None, :], SIGNED), mask=(rows < N)[:, None] & inside[None, :])
    elif MODE == FILTER:
        tau = tl.load(tau_ptr + rows, mask=rows < N, other=float("inf"))
        if SIGNED:  # no column past the last is above tau, which is no smaller than 0
            acc = tl.where(inside[None, :], acc, 0.0)
        append(acc, tau, rows, column0, N, buffer_ptr, count_ptr, C, BM, BN, SIGNED, PTX)
    else:
        threshold = tl.maximum(tl.load(tau_ptr + columns, mask=inside, other=float("inf")), 0.0)
        if MODE == DENSE:
            at = buffer_ptr + rows.to(tl.int64)[:, None] * L + columns[None, :]
            acc = tl.where(acc <= threshold[None, :], 0.0, acc)
            tl.store(at, acc, mask=(rows < N)[:, None] & inside[None, :])
        else:
            acc = tl.where(acc <= threshold[None, :], float("-inf"), acc)
            tau = tl.where(rows < N, float("-inf"), float("inf"))
            append(acc, tau, rows, column0, N, buffer_ptr, count_ptr, C, BM, BN, SIGNED, PTX)


@triton.jit(do_not_specialize=["N", "L", "D"])
def small_batch_kernel(
    x, w, bias_ptr, out_ptr, N, L, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pre-activations [N, L] fp32 of at most BN tokens. The latents are the product's rows (BM), as many as matrix
    units want; each row of W is read by one program, once."""
    row0 = tl.program_id(0) * BM
    column0 = tl.program_id(1) * BN
    acc = product_tile(w, x, row0, column0, L, N, D, BM, BN, BK, TMA, PRECISION)
    latents = row0 + tl.arange(0, BM)
    tokens = column0 + tl.arange(0, BN)
    acc += tl.load(bias_ptr + latents, mask=latents < L, other=0.0)[:, None]
    at = out_ptr + tokens.to(tl.int64)[None, :] * L + latents[:, None]
    tl.store(at, acc, mask=(latents < L)[:, None] & (tokens < N)[None, :])


def launch_wave(
    ops: Operands,
    tile: tiles.Tile,
    mode: tl.constexpr,
    wave: tuple[int, int],
    tau: Tensor,
    buffer: Tensor,
    count: Tensor,
    C: int,
    *,
    signed: bool = False,
) -> None:
    """Launch `wave_kernel` in a mode (FIRST, FILTER, THRESHOLD, DENSE) over the latents wave[0] <= l < wave[1], or what
    does the same where the tile is for it."""
    wanted = tile.persistent and mode.value == FILTER.value and not signed and ops.dtype.itemsize == 2
    if wanted and (persistent := persistent_waves()) is not None:
        persistent.launch_filter(ops, tile, wave, tau, buffer, count, C)
        return
    if ops.in_full and ops.x.is_cuda:
        tile = tiles.IN_FULL
    N, D = ops.x.shape
    first, last = wave
    x, w = _sources(ops, (tile.BM, tile.BK), (tile.BN, tile.BK), tile.tma)
    grid = (triton.cdiv(N, tile.BM) * triton.cdiv(last - first, tile.BN),)
    wave_kernel[grid](
        x=x, w=w, bias_ptr=ops.bias, tau_ptr=tau, buffer_ptr=buffer, count_ptr=count,
        N=N, L=len(ops.W), D=D, first=first, last=last,
        C=C, BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=tile.group, MODE=mode.value, TMA=tile.tma,
        PRECISION=ops.precision, SIGNED=signed, PTX=ops.x.is_cuda, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@functools.cache
def persistent_waves() -> ModuleType | None:
    """`gluon_wave`, which runs tiles that are `persistent`. None where the environment has STEERSMAN_PERSISTENT=0, and,
    with a warning, where this Triton does not have what it is written in; `wave_kernel` runs them then."""
    if os.environ.get("STEERSMAN_PERSISTENT", "1") == "0":
        return None
    try:
        from steersman.kernels import gluon_wave
    except (ImportError, AttributeError) as error:
        warnings.warn(f"the encoder runs without its kernel for Hopper: {error}", RuntimeWarning, stacklevel=2)
        return None
    return gluon_wave


def _sources(ops: Operands, x_block: tuple[int, int], w_block: tuple[int, int], tma: bool) -> tuple[object, object]:
    """The operands as the kernels take them: descriptors for the copy engine, or the tensors themselves."""
    if not tma:
        return ops.x, ops.W
    return TensorDescriptor.from_tensor(ops.x, list(x_block)), TensorDescriptor.from_tensor(ops.W, list(w_block))


def small_batch_pre_activations(ops: Operands) -> Tensor:
    """The pre-activations [N, L] fp32 of a few tokens, by one reading of W."""
    N, D = ops.x.shape
    L = len(ops.W)
    tile = tiles.find_small_batch(ops.shape(1), ops.dtype, ops.x.device)
    out = torch.empty(N, L, device=ops.x.device)
    x, w = _sources(ops, (tile.BN, tile.BK), (tile.BM, tile.BK), tile.tma)
    small_batch_kernel[(triton.cdiv(L, tile.BM), triton.cdiv(N, tile.BN))](
        x=x, w=w, bias_ptr=ops.bias, out_ptr=out, N=N, L=L, D=D, BM=tile.BM, BN=tile.BN, BK=tile.BK, TMA=tile.tma,
        PRECISION=ops.precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
