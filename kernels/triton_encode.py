# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""Encode in Triton: a matrix product whose epilogue selects, so that the N x L pre-activations never reach memory.

The latents are taken in waves that grow by a factor of `growth`. The first wave writes its few pre-activations as
candidates into a buffer of C slots a row; after each wave `triton_select.tighten` keeps the K largest of a row and sets
`tau`, the K-th largest value so far. A later wave computes a tile of pre-activations in registers and appends only what
is above the row's tau. With growth 4 some 3K of a wave's values enter; a last sort gives the code.

A row is exact, by construction, when it never had more candidates than slots: tau is the K-th largest of values that
belong to lower latents, so a value that does not exceed it is behind K others, ties included. The other rows (overflow,
NaN, one hot tile) are listed on the device and recomputed by `rescue_kernel`, a fixed grid that walks the list and
returns at once when it is empty. Its streaming selection is exact for any values. Nothing is asked of the host.

A small batch (N <= SMALL_BATCH) is bound by reading W_enc, not by arithmetic: one kernel reads it once and writes the
N x L pre-activations, which stay in the L2 cache, and `triton_select.reduce` picks.

The result is `topk` of the fp32 accumulators, ties to the lower latent, ReLU after the selection. A signed code
(AbsTopK) is the same with magnitudes: tau bounds them, keys order them and carry the sign, and there is no ReLU.
Shape letters: N tokens, L latents, D width, K active latents a token, C slots, R rows of a program.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from steersman.kernels import tiles, triton_select
from steersman.kernels.operands import Operands, prepare
from steersman.kernels.triton_select import EMPTY, kth_largest, make_key

SMALL_BATCH = 64
"""Tokens up to which W_enc's bytes, not the arithmetic, bound the encoder."""
LARGEST_K = 512
"""Active latents a token up to which the kernels select; above it, PyTorch does."""
MOST_SIGNED = 1 << 30
"""Latents that the keys of a signed code can number."""
LIMIT = 24
"""Candidates that a quarter of a tile's row may have; with more it would hold up the tile's other rows, and is
rescued."""

# What an epilogue does with a tile; see `wave_kernel`.
FIRST, FILTER, THRESHOLD, DENSE = (tl.constexpr(mode) for mode in range(4))


@triton.jit
def product_tile(x, w, row0, column0, N, L, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`x[row0:, :] w[column0:, :]^T` -> [BM, BN] fp32. With TMA, x and w are tensor descriptors, else
    pointers to rows of D elements, D a multiple of 8."""
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
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


@triton.jit
def append(acc, tau, rows, column0, N, buffer_ptr, count_ptr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           LIMIT: tl.constexpr, SIGNED: tl.constexpr):  # fmt: skip
    """Append to the rows' buffers what is above tau [BM] in acc [BM, BN], with SIGNED what is so in magnitude.

    A row is looked at as 4 quarters, columns 8j + 2q and 8j + 2q + 1 for all j: what one thread holds of a matrix
    unit's result (of `mma` and `wgmma`), so that maxima are taken within a thread. Each pass takes one candidate from
    every quarter; the passes end with the fullest. Reserving the slots first makes one atomic addition a row.
    """
    quarters = tl.reshape(tl.permute(tl.reshape(acc, (BM, BN // 8, 4, 2)), (0, 2, 1, 3)), (BM, 4, BN // 4))
    tau = tau[:, None]
    inside = (rows < N)[:, None]
    # Not "> tau": a NaN must be counted too, so that its row is seen to need the rescue.
    # NaN is counted but never found, which marks its row as failed.
    if SIGNED:
        n = tl.sum((~(tl.abs(quarters) <= tau[:, :, None])).to(tl.int32), axis=2)
    else:
        n = tl.sum((~(quarters <= tau[:, :, None])).to(tl.int32), axis=2)
        quarters = tl.maximum(quarters, float("-inf"))
    crowded = n > LIMIT
    wanted = tl.where(crowded, C + 1, n)  # one more than the buffer holds marks the row as failed
    n = tl.where(crowded, 0, n)
    total = tl.sum(wanted, axis=1)
    passes = tl.max(tl.max(n, axis=1), axis=0)
    start = tl.atomic_add(count_ptr + rows, total, mask=(rows < N) & (total > 0), sem="relaxed")
    slot = start[:, None] + tl.cumsum(wanted, axis=1) - wanted
    quarter = tl.arange(0, 4)[None, :]
    position = tl.arange(0, BN // 4)[None, None, :]
    base = buffer_ptr + rows.to(tl.int64)[:, None] * C
    n_nan = tl.zeros_like(n)
    for i in range(passes):
        if SIGNED:  # one copy of the tile: what was taken becomes NaN, which `tl.maximum` passes over
            sizes = tl.maximum(tl.abs(quarters), float("-inf"))
            size, best = tl.max(sizes, axis=2, return_indices=True, return_indices_tie_break_left=False)
            here = position == best[:, :, None]
            value = tl.sum(tl.where(here, quarters, 0.0), axis=2)
            quarters = tl.where(here, float("nan"), quarters)
        else:
            value, best = tl.max(quarters, axis=2, return_indices=True, return_indices_tie_break_left=False)
            size = value
            quarters = tl.where(position == best[:, :, None], float("-inf"), quarters)
        latent = column0 + best // 2 * 8 + quarter * 2 + best % 2
        live = inside & (i < n)
        found = live & (size > tau)
        n_nan += (live & ~found).to(tl.int32)
        tl.store(base + slot + i, make_key(value, latent, SIGNED), mask=found & (slot + i < C))
    if passes > 0:
        failed = tl.sum(n_nan, axis=1) > 0
        tl.atomic_add(count_ptr + rows, tl.where(failed, C + 1, 0), mask=(rows < N) & failed, sem="relaxed")


@triton.jit(do_not_specialize=["N", "L", "D", "first", "last"])
def wave_kernel(
    x, w, bias_ptr, tau_ptr, buffer_ptr, count_ptr, N, L, D, first, last,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
    LIMIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SIGNED: tl.constexpr,
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
        append(acc, tau, rows, column0, N, buffer_ptr, count_ptr, C, BM, BN, LIMIT, SIGNED)
    else:
        threshold = tl.maximum(tl.load(tau_ptr + columns, mask=inside, other=float("inf")), 0.0)
        if MODE == DENSE:
            at = buffer_ptr + rows.to(tl.int64)[:, None] * L + columns[None, :]
            acc = tl.where(acc <= threshold[None, :], 0.0, acc)
            tl.store(at, acc, mask=(rows < N)[:, None] & inside[None, :])
        else:
            acc = tl.where(acc <= threshold[None, :], float("-inf"), acc)
            tau = tl.where(rows < N, float("-inf"), float("inf"))
            append(acc, tau, rows, column0, N, buffer_ptr, count_ptr, C, BM, BN, LIMIT, SIGNED)


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


@triton.jit
def compact_row(base, n, W: tl.constexpr, K: tl.constexpr):
    """Move the K largest of the first n keys of a buffer of W slots to its front; returns the smallest of them."""
    slots = tl.arange(0, W)
    keys = tl.load(base + slots, mask=slots < n, other=EMPTY)
    high = (keys >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000
    k = tl.full([1], K, tl.int32)
    t = kth_largest(high[None, :], k)
    equal = (high == t) & (keys != EMPTY)
    above = high > t
    low = tl.where(equal, (keys & 0x7FFFFFFF).to(tl.int32) + 1, 0).to(tl.uint32)
    chosen = above | (equal & (low >= kth_largest(low[None, :], k - tl.sum(above.to(tl.int32), axis=0))))
    tl.debug_barrier()
    tl.store(base + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, keys, mask=chosen)
    return tl.min(tl.where(chosen, keys, 0x7FFFFFFFFFFFFFFF), axis=0)


@triton.jit(do_not_specialize=["L", "D"])
def rescue_kernel(
    x_ptr, w_ptr, bias_ptr, failed_ptr, n_failed_ptr, buffer_ptr, L, D,
    C: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Recompute the listed rows: the K largest of each of C/W stretches of the latents, into the row's own buffer.

    A piece of work is BM rows and one stretch, whose W slots hold the row's candidates; when fewer than BN are free,
    the K largest are kept and only larger keys enter from then on. Programs take pieces in turn.
    """
    n_failed = tl.load(n_failed_ptr)
    D = D // 8 * 8  # said so that loads are known to start on 16 bytes
    stretch = tl.cdiv(tl.cdiv(L, C // W), BN) * BN
    for piece in range(tl.program_id(0), tl.cdiv(n_failed, BM) * (C // W), tl.num_programs(0)):
        at = piece // (C // W) * BM + tl.arange(0, BM)
        live_row = at < n_failed
        rows = tl.load(failed_ptr + at, mask=live_row, other=0).to(tl.int64)
        part = piece % (C // W)
        stop = tl.minimum(part * stretch + stretch, L)
        base = rows * C + part * W
        n = tl.zeros([BM], tl.int32)
        floor = tl.full([BM], EMPTY, tl.int64)
        for column0 in range(part * stretch, stop, BN):
            columns = column0 + tl.arange(0, BN)
            depth = tl.arange(0, BK)
            x_at = x_ptr + rows[:, None] * D + depth[None, :]
            w_at = w_ptr + columns.to(tl.int64)[:, None] * D + depth[None, :]
            acc = tl.zeros((BM, BN), tl.float32)
            for k in range(0, D, BK):
                there = depth[None, :] < D - k
                a = tl.load(x_at + k, mask=there & live_row[:, None], other=0.0)
                b = tl.load(w_at + k, mask=there & (columns < L)[:, None], other=0.0)
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            acc += tl.load(bias_ptr + columns, mask=columns < L, other=0.0)[None, :]
            keys = make_key(acc, columns[None, :], SIGNED)
            enters = (keys > floor[:, None]) & live_row[:, None] & (columns < stop)[None, :]
            place = base[:, None] + n[:, None] + tl.cumsum(enters.to(tl.int32), axis=1) - 1
            tl.store(buffer_ptr + place, keys, mask=enters)
            n += tl.sum(enters.to(tl.int32), axis=1)
            if tl.max(n, axis=0) > W - BN:
                tl.debug_barrier()  # one thread reads below what another wrote
                for m in range(BM):
                    mine = tl.arange(0, BM) == m
                    n_m = tl.sum(tl.where(mine, n, 0), axis=0)
                    if n_m > K:
                        row_base = tl.sum(tl.where(mine, base, 0), axis=0)
                        floor = tl.where(mine, compact_row(buffer_ptr + row_base, n_m, W, K), floor)
                        n = tl.where(mine, K, n)
                tl.debug_barrier()
        slots = tl.arange(0, W)[None, :]
        at_slot = buffer_ptr + base[:, None] + slots
        tl.store(at_slot, tl.full([BM, W], EMPTY, tl.int64), mask=live_row[:, None] & (slots >= n[:, None]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a product of N tokens and L latents is cut up for K candidates a row."""

    slots: int
    """C: candidates that a row's buffer holds."""
    waves: tuple[tuple[int, int], ...]
    """The latents of each wave."""
    growth: float
    """How much further than all before it a wave reaches, at most."""


@functools.lru_cache(maxsize=256)
def plan(L: int, k: int, growth: float = 4.0, smallest: int = 256, largest: int = 4096) -> Plan:
    """Slots and waves.

    The first wave fills the buffer; a wave of growth g brings some (g - 1) K candidates, and a buffer of 16 K leaves
    room for rows whose large values come late. A buffer has at least `smallest` slots, at most `largest`.

    >>> plan(65536, 64).waves
    ((0, 1024), (1024, 4096), (4096, 16384), (16384, 65536))
    """
    slots = min(largest, max(smallest, triton.next_power_of_2(16 * k)))
    reach = min(slots, L)
    bounds = [0, reach]
    if reach < L:
        n = max(1, math.ceil(math.log(L / reach) / math.log(growth) - 1e-9))
        bounds += [min(L, -(-round(reach * (L / reach) ** (i / n)) // 256) * 256) for i in range(1, n + 1)]
        bounds[-1] = L
    waves = tuple((first, last) for first, last in itertools.pairwise(bounds) if first < last)
    return Plan(slots=slots, waves=waves, growth=growth)


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
    """Launch `wave_kernel` in a mode (FIRST, FILTER, THRESHOLD, DENSE) over the latents wave[0] <= l < wave[1]."""
    N, D = ops.x.shape
    first, last = wave
    x, w = _sources(ops, (tile.BM, tile.BK), (tile.BN, tile.BK), tile.tma)
    grid = (triton.cdiv(N, tile.BM) * triton.cdiv(last - first, tile.BN),)
    wave_kernel[grid](
        x=x, w=w, bias_ptr=ops.bias, tau_ptr=tau, buffer_ptr=buffer, count_ptr=count,
        N=N, L=len(ops.W), D=D, first=first, last=last,
        C=C, BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=tile.group, MODE=mode.value, LIMIT=LIMIT, TMA=tile.tma,
        PRECISION=ops.precision, SIGNED=signed, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _sources(ops: Operands, x_block: tuple[int, int], w_block: tuple[int, int], tma: bool) -> tuple[object, object]:
    """The operands as the kernels take them: descriptors for the copy engine, or the tensors themselves."""
    if not tma:
        return ops.x, ops.W
    return TensorDescriptor.from_tensor(ops.x, list(x_block)), TensorDescriptor.from_tensor(ops.W, list(w_block))


@dataclass(frozen=True)
class Candidates:
    """The keys of each row's candidates after the last wave."""

    buffer: Tensor
    """[N, C] int64: the first `count` of a row are live."""
    count: Tensor
    """[N] int32."""
    n_failed: Tensor
    """[1] int32: rows that were recomputed (by the rescue) or, for a caller that does not rescue, lost candidates."""


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """See `reference.topk_encode`: values [N, K] fp32 and indices [N, K] int32, with bf16 products unless `operands`
    is set otherwise. k is at most LARGEST_K; a signed code has at most MOST_SIGNED latents."""
    return topk_encode_counted(x, W_enc, b_enc, k, b_dec, signed=signed)[:2]


def topk_encode_counted(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`topk_encode`, and how many rows took the exact slow path: a [1] int32 tensor on the device."""
    N = len(x)
    values = torch.empty(N, k, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    n_failed = torch.zeros(1, dtype=torch.int32, device=x.device)
    if N == 0:
        return values, indices, n_failed
    ops = prepare(x, W_enc, b_enc, b_dec)
    if N <= SMALL_BATCH:
        keys = triton_select.reduce(small_batch_pre_activations(ops), k, chunk_of(k), signed=signed)
    else:
        tile = tiles.find(ops.shape(k), ops.dtype, x.device, signed)
        candidates = collect(ops, k, n_failed, tile, signed=signed)
        rescue(ops, candidates, k, signed=signed)
        keys = candidates.buffer
    triton_select.finish(keys, k, values, indices, signed=signed)
    return values, indices, n_failed


def chunk_of(k: int) -> int:
    """Columns that one program of `triton_select.reduce` sees: enough to throw most of them away."""
    return max(2048, triton.next_power_of_2(4 * k))


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


def collect(
    ops: Operands,
    k: int,
    n_failed: Tensor,
    tile: tiles.Tile,
    schedule: Plan | None = None,
    *,
    signed: bool = False,
) -> Candidates:
    """Run all waves: each row's candidates, among them its K largest unless its count says that some were lost."""
    N = len(ops.x)
    schedule = schedule or plan(len(ops.W), k)
    C = schedule.slots
    device = ops.x.device
    buffer = torch.empty(N, C, dtype=torch.int64, device=device)
    count = torch.full((N,), schedule.waves[0][1], dtype=torch.int32, device=device)
    tau = torch.full((N,), float("-inf"), device=device)
    for i, wave in enumerate(schedule.waves):
        if i == 0:
            plain = tiles.find_plain(ops.dtype, device, signed)
            launch_wave(ops, plain, FIRST, wave, tau, buffer, count, C, signed=signed)
        else:
            launch_wave(ops, tile, FILTER, wave, tau, buffer, count, C, signed=signed)
        if i < len(schedule.waves) - 1:
            triton_select.tighten(buffer, count, tau, k)
    return Candidates(buffer, count, n_failed)


def rescue(ops: Operands, candidates: Candidates, k: int, *, signed: bool = False) -> None:
    """Recompute the rows that lost candidates, then keep every row's K largest at the front of its buffer."""
    N, D = ops.x.shape
    C = candidates.buffer.shape[1]
    failed = torch.empty_like(candidates.count)
    tau = torch.empty(N, device=ops.x.device)
    triton_select.certify(candidates.count, failed, candidates.n_failed, C)
    tile = tiles.find_rescue(ops.dtype, ops.x.device)
    W = min(C, triton.next_power_of_2(k + tile.BN))
    rescue_kernel[(tiles.processors(ops.x.device),)](
        x_ptr=ops.x, w_ptr=ops.W, bias_ptr=ops.bias, failed_ptr=failed, n_failed_ptr=candidates.n_failed,
        buffer_ptr=candidates.buffer, L=len(ops.W), D=D,
        C=C, W=W, K=k, BM=tile.BM, BN=tile.BN, BK=tile.BK, PRECISION=ops.precision, SIGNED=signed,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    triton_select.tighten(candidates.buffer, candidates.count, tau, k)
