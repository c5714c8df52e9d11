# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""The exact slow path of the Triton encoders: rows that lost candidates are computed again, whatever their values.

The rows are taken in blocks of BM, and the latents in as many stretches as keep every program busy, so that one row
takes the whole GPU. A piece of work is a block and a stretch; it keeps its K largest keys so far in W slots. Where many
blocks leave few stretches, the slots are the row's own buffer. A few blocks have more stretches than that buffer has
room for: then each program has slots of its own, and `merge_kernel` brings a row's together. Grids are fixed, nothing
is asked of the host, and what is kept beside the buffers does not grow with N.

Shape letters: N tokens, L latents, D width, K kept, C slots of a row's buffer, W slots of one stretch of latents, P
programs, T threads of one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels import tiles, triton_select
from steersman.kernels.operands import Operands
from steersman.kernels.triton_select import EMPTY, keep_largest, make_key, rank

PROGRAMS = 2
"""Programs a processor: while one waits for memory, another multiplies."""


@dataclass(frozen=True)
class Candidates:
    """The keys of each row's candidates after the last wave."""

    buffer: Tensor
    """[N, C] int64: the first `count` of a row are live."""
    count: Tensor
    """[N] int32."""
    n_failed: Tensor
    """[1] int32: rows that were recomputed (by the rescue) or, for a caller that does not rescue, lost candidates."""


@triton.jit
def stretches(n_blocks, n_programs, FEWEST: tl.constexpr):
    """Into how many stretches the latents are cut. With more than FEWEST, no program has two pieces."""
    return tl.maximum(n_programs // tl.maximum(n_blocks, 1), FEWEST)


@triton.jit(do_not_specialize=["L", "D"])
def rescue_kernel(
    x_ptr, w_ptr, bias_ptr, failed_ptr, n_failed_ptr, buffer_ptr, scratch_ptr, L, D,
    C: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Recompute the listed rows: the K largest of each stretch of the latents, into W slots of the row's buffer or of
    scratch [P, BM, W].

    When fewer than BN slots of a row are free, its K largest are kept, and only larger values enter from then on.
    Programs take pieces in turn.
    """
    tl.assume(D > 0)
    n_failed = tl.load(n_failed_ptr)
    D = D // 8 * 8  # said so that loads are known to start on 16 bytes
    n_blocks = tl.cdiv(n_failed, BM)
    parts = stretches(n_blocks, tl.num_programs(0), C // W)
    stretch = tl.cdiv(tl.cdiv(L, parts), BN) * BN
    for piece in range(tl.program_id(0), n_blocks * parts, tl.num_programs(0)):
        at = piece // parts * BM + tl.arange(0, BM)
        live_row = at < n_failed
        rows = tl.load(failed_ptr + at, mask=live_row, other=0).to(tl.int64)
        part = piece % parts
        stop = tl.minimum(part * stretch + stretch, L)
        base = buffer_ptr + rows * C + part * W
        if parts > C // W:
            base = scratch_ptr + (piece * BM + tl.arange(0, BM)).to(tl.int64) * W
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
            place = n[:, None] + tl.cumsum(enters.to(tl.int32), axis=1) - 1
            tl.store(base[:, None] + place, keys, mask=enters)
            n += tl.sum(enters.to(tl.int32), axis=1)
            if tl.max(n, axis=0) > W - BN:
                tl.debug_barrier()  # one thread reads below what another wrote
                for m in range(BM):
                    mine = tl.arange(0, BM) == m
                    n_m = tl.sum(tl.where(mine, n, 0), axis=0)
                    if n_m > W - BN:
                        slots = tl.sum(tl.where(mine, base.to(tl.int64), 0), axis=0).to(tl.pointer_type(tl.int64))
                        _, t = keep_largest(slots + tl.zeros([1], tl.int32), n_m + tl.zeros([1], tl.int32), K, 0, W, T)
                        # A value of a later latent that does not exceed t is behind K others.
                        floor = tl.where(mine, (t.to(tl.int64) << 32) | 0x7FFFFFFF, floor)
                        n = tl.where(mine, K, n)
                tl.debug_barrier()
        for first in range(0, W, BN):
            slots = first + tl.arange(0, BN)[None, :]
            left_over = live_row[:, None] & (slots >= n[:, None])
            tl.store(base[:, None] + slots, tl.full([BM, BN], EMPTY, tl.int64), mask=left_over)


@triton.jit(do_not_specialize=["stride", "room"])
def merge_kernel(
    failed_ptr, n_failed_ptr, buffer_ptr, count_ptr, scratch_ptr, stride, room,
    C: tl.constexpr, W: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Bring what `rescue_kernel`, of as many programs, left of a row in scratch [P, BM, W] into its buffer [N, C], and
    say in count [N] how much it is. Does nothing where the keys lie in the buffer."""
    n_failed = tl.load(n_failed_ptr)
    parts = stretches(tl.cdiv(n_failed, BM), tl.num_programs(0), C // W)
    n_rows = tl.where(parts > C // W, n_failed, 0)
    for i in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.load(failed_ptr + i).to(tl.int64)
        base = buffer_ptr + row * stride + tl.zeros([1], tl.int64)
        source = scratch_ptr + (i // BM * parts * BM + i % BM).to(tl.int64) * room
        n = tl.zeros([1], tl.int32)
        floor = tl.full([1], EMPTY, tl.int64)
        for first in range(0, parts * W, C // 2):
            if tl.max(n, axis=0) > C // 2:
                tl.debug_barrier()  # one thread reads what another wrote
                n, t = keep_largest(base, n, K, 0, C, T)
                tl.debug_barrier()
                floor = (t.to(tl.int64) << 32) - 1  # equal values may be of lower latents
            at = first + tl.arange(0, C // 2)
            keys = tl.load(source + at // W * (BM * W) + at % W, mask=at < parts * W, other=EMPTY)[None, :]
            enters = keys > floor[:, None]
            tl.store(base[:, None] + n[:, None] + rank(enters, T), keys, mask=enters)
            n += tl.sum(enters.to(tl.int32), axis=1)
        tl.store(count_ptr + row + tl.zeros([1], tl.int32), n)


def slots_of(k: int, C: int, BN: int) -> int:
    """W: room for k keys and two tiles of BN, so that most tiles find room; at most C."""
    return min(C, triton.next_power_of_2(k + 2 * BN))


def rescue(ops: Operands, candidates: Candidates, k: int, *, signed: bool = False) -> None:
    """Recompute the rows that lost candidates: then the first `count` of every row's keys hold its K largest."""
    D = ops.x.shape[1]
    C = candidates.buffer.shape[1]
    device = ops.x.device
    failed = torch.empty_like(candidates.count)
    triton_select.certify(candidates.count, failed, candidates.n_failed, C)
    tile = tiles.find_rescue(ops.dtype, device)
    W = slots_of(k, C, tile.BN)
    P = PROGRAMS * tiles.processors(device)
    scratch = torch.empty(P, tile.BM, W, dtype=torch.int64, device=device)
    threads = 32 * tile.warps if device.type == "cuda" else 16
    rescue_kernel[(P,)](
        x_ptr=ops.x, w_ptr=ops.W, bias_ptr=ops.bias, failed_ptr=failed, n_failed_ptr=candidates.n_failed,
        buffer_ptr=candidates.buffer, scratch_ptr=scratch, L=len(ops.W), D=D,
        C=C, W=W, K=k, BM=tile.BM, BN=tile.BN, BK=tile.BK, T=min(W, threads),
        PRECISION=ops.precision, SIGNED=signed, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    merge_kernel[(P,)](
        failed_ptr=failed, n_failed_ptr=candidates.n_failed, buffer_ptr=candidates.buffer, count_ptr=candidates.count,
        scratch_ptr=scratch, stride=C, room=W,
        C=C, W=W, K=k, BM=tile.BM, T=min(C // 2, threads), num_warps=tile.warps,
    )  # fmt: skip
