# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""The exact slow path of the Triton encoders: rows that lost candidates are computed again, whatever their values.

Shape letters: N tokens, L latents, D width, K kept, C slots of a row's buffer, W slots of one stretch of latents.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels import tiles, triton_select
from steersman.kernels.operands import Operands
from steersman.kernels.triton_select import EMPTY, kth_largest, make_key


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
