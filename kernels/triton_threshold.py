# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""BatchTopK and JumpReLU in Triton, on the waves of `triton_wave`: one threshold for the batch, or one a latent.

BatchTopK: each row proposes its `width` largest values. After every wave the (N*K)-th largest of all candidates is a
lower bound of the batch's threshold, so what is below it enters no buffer any more. JumpReLU knows its thresholds, and
needs one wave. A row of which that does not show enough (its every proposal is taken, its buffer overflows) is computed
again by itself, from all of its pre-activations, in blocks of rows that take no more than CODE_BYTES; the other rows
stay as they are.

The number of columns of both results depends on the data, so each reads the device once at its end, and more often only
where rows are computed again.
Shape letters: N tokens, L latents, D width, K active latents a token on average, C slots of a row's buffer.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels import tiles, torch_ops, triton_select
from steersman.kernels.operands import Operands, prepare
from steersman.kernels.triton_encode import LARGEST_K, SMALL_BATCH, largest
from steersman.kernels.triton_wave import (
    DENSE,
    THRESHOLD,
    launch_wave,
    small_batch_pre_activations,
)  # fmt: skip

THRESHOLD_SLOTS = 1024
"""Slots of a row's buffer when the number of active latents is not known beforehand."""


@triton.jit(do_not_specialize=["N", "M", "width"])
def histogram_kernel(
    bits_ptr, count_ptr, histogram_ptr, state_ptr, N, M, width,
    SHIFT: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the 8-bit digits at SHIFT of those bits whose higher digits equal the prefix found so far.

    The bits are the M numbers of N rows of `width`; or with KEYS the upper halves, 0 if negative, of the first count
    [N] of each of N rows of `width` keys, as int32.
    """
    prefix = tl.load(state_ptr)
    counts = tl.zeros([256], tl.int32)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        start = row * tl.cast(width, tl.int64)
        if KEYS:
            n = tl.minimum(tl.load(count_ptr + row), width)
        else:
            n = tl.minimum(M - start, width).to(tl.int32)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            live = at < n
            place = 2 * (start + at) + 1 if KEYS else start + at
            bits = tl.maximum(tl.load(bits_ptr + place, mask=live, other=0), 0)
            if SHIFT < 24:
                live = live & ((bits >> (SHIFT + 8)) == prefix)
            counts += tl.histogram((bits >> SHIFT) & 255, 256, mask=live)
    tl.atomic_add(histogram_ptr + tl.arange(0, 256), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def digit_kernel(histogram_ptr, state_ptr):
    """Append to the prefix the digit in which the sought number lies, and clear the histogram."""
    digits = tl.arange(0, 256)
    counts = tl.load(histogram_ptr + digits)
    rank = tl.load(state_ptr + 1)
    at_least = tl.cumsum(counts, axis=0, reverse=True)
    digit = tl.max(tl.where(at_least >= rank, digits, 0), axis=0)
    above = tl.sum(tl.where(digits > digit, counts, 0), axis=0)
    tl.store(state_ptr, tl.load(state_ptr) * 256 + digit)
    tl.store(state_ptr + 1, rank - above)
    tl.store(histogram_ptr + digits, tl.zeros([256], tl.int32))


def rank_bits(source: Tensor, rank: int, count: Tensor | None = None) -> Tensor:
    """The bits, a tensor [1] int32, of the rank-th largest (from 1) of fp32 values of any shape, none negative; or with
    a count [N] int32 of the values of the first count of each row of keys [N, C], where negative ones are 0. A NaN is
    larger than any number. Four counting passes, and 0 where there are too few."""
    device = source.device
    histogram = torch.zeros(256, dtype=torch.int32, device=device)
    state = torch.zeros(2, dtype=torch.int32, device=device)
    state[1:].fill_(rank)
    bits = source.view(torch.int32)
    width = 4096 if count is None else source.shape[1]
    N = triton.cdiv(bits.numel(), width) if count is None else len(source)
    programs = min(N, 8 * tiles.processors(device))
    for shift in (24, 16, 8, 0):
        histogram_kernel[(programs,)](
            bits_ptr=bits, count_ptr=bits if count is None else count, histogram_ptr=histogram, state_ptr=state,
            N=N, M=bits.numel(), width=width, SHIFT=shift, KEYS=count is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        digit_kernel[(1,)](histogram_ptr=histogram, state_ptr=state, num_warps=1)
    return state[:1]


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.batch_topk_encode`. A NaN among the proposals is passed on in the values."""
    N, L = len(x), len(W_enc)
    width = min(L, LARGEST_K, 4 * k)
    if not N or k > width:
        return torch_ops.batch_topk_encode(x, W_enc, b_enc, k, b_dec)
    ops = prepare(x, W_enc, b_enc, b_dec)
    values, indices = propose(ops, k, width)
    least = rank_bits(values, N * k)
    above, equal = _compare(values, least)
    taken = _taken(above, equal, least, N * k)
    full = (taken == width) & ~values[:, -1].isnan() if width < L else torch.zeros_like(taken, dtype=torch.bool)
    n_full, used = torch.stack([full.sum(), taken.max()]).tolist()
    again = None
    if n_full:
        # Every row's values down to `least` are known now, and the batch's threshold can only be higher.
        rows = full.nonzero().squeeze(1)
        again = rows, *_values_from(ops, rows, least)
        least = rank_bits(torch.cat([values[~full].view(-1), again[1].view(-1)]), N * k)
        above, equal = _compare(values, least)
        above[rows], equal[rows] = _compare(again[1], least)
        taken = _taken(above, equal, least, N * k)
        used = int(taken.max())
    used = max(1, used)
    values, indices = _resized(values, used), _resized(indices, used)
    if again is not None:
        rows, more_values, more_indices = again
        values[rows], indices[rows] = _resized(more_values, used), _resized(more_indices, used)
    column = torch.arange(used, dtype=torch.int32, device=x.device)
    values = values.masked_fill_(column >= taken[:, None], 0.0)
    last = values.gather(1, (taken - 1).clamp(min=0).long()[:, None])
    min_selected = torch.where(taken[:, None] > 0, last, last.new_tensor(float("inf"))).min()
    return values, indices, min_selected


def _compare(values: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row's values [N, M] are above the number with the bits `least`, and how many equal: [N] int32.
    None is negative."""
    bits = values.view(torch.int32)
    return (bits > least).sum(dim=1, dtype=torch.int32), (bits == least).sum(dim=1, dtype=torch.int32)


def _taken(above: Tensor, equal: Tensor, least: Tensor, rank: int) -> Tensor:
    """How many values of each row, of which each has its largest first, are among the `rank` largest of all and
    positive -> [N] int32. Of equal values those of the earlier row go first."""
    before = equal.cumsum(0) - equal
    admitted = torch.minimum((rank - above.sum() - before).clamp(min=0), equal)
    return (above + admitted * (least > 0)).int()


def _values_from(ops: Operands, rows: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The positive values of the listed rows that are not below the number with the bits `least`, largest first and
    lower latents first among equals, padded with others: fp32 and int32 [len(rows), M], M what the fullest needs."""
    L = len(ops.W)
    parts = []
    zero = ops.bias.new_zeros(L)
    for some in rows.split(max(1, torch_ops.CODE_BYTES // (16 * L))):  # a sort holds four numbers a value
        code = _dense(replace(ops, x=ops.x[some]), zero)
        code.masked_fill_(code.isnan(), float("nan"))  # one NaN of the many
        code, latents = torch.sort(code, dim=1, descending=True, stable=True)
        M = max(1, int((code.view(torch.int32) >= least.clamp(min=1)).sum(dim=1).max()))
        parts.append((code[:, :M].clone(), latents[:, :M].int()))
    M = max(code.shape[1] for code, _ in parts)
    return torch.cat([_resized(p[0], M) for p in parts]), torch.cat([_resized(p[1], M) for p in parts])


def _resized(rows: Tensor, width: int) -> Tensor:
    """A contiguous tensor of the first `width` columns, zeros where there are fewer."""
    return F.pad(rows, (0, width - rows.shape[1])).contiguous()


def propose(ops: Operands, k: int, width: int) -> tuple[Tensor, Tensor]:
    """Each row's `width` largest values after ReLU, complete down to the batch's (N*K)-th largest: values fp32 and
    indices int32 [N, width]."""

    def raise_bound(buffer: Tensor, count: Tensor, tau: Tensor) -> None:
        # Equal values of an earlier token go before those of a later one, so the bound lets them in: it is the next
        # number below.
        below = (rank_bits(buffer, len(ops.x) * k, count) - 1).clamp(min=0).view(torch.float32)
        torch.maximum(tau, below.nan_to_num(nan=float("inf")), out=tau)

    return largest(ops, width, raise_bound=raise_bound)[:2]


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """See `reference.threshold_encode`: the dense code [N, L] fp32, written once. A NaN stays a NaN."""
    return _dense(prepare(x, W_enc, b_enc, b_dec), _per_latent(threshold, len(W_enc)))


def _per_latent(threshold: Tensor, L: int) -> Tensor:
    return threshold.float().expand(L).contiguous()


def _dense(ops: Operands, threshold: Tensor) -> Tensor:
    N, L = len(ops.x), len(ops.W)
    if N <= SMALL_BATCH:
        Z = small_batch_pre_activations(ops) if N else torch.empty(0, L, device=ops.x.device)
        return Z.masked_fill_(threshold.clamp(min=0) >= Z, 0.0)
    code = torch.empty(N, L, device=ops.x.device)
    count = torch.empty(0, dtype=torch.int32, device=ops.x.device)
    launch_wave(ops, tiles.find_plain(ops.dtype, ops.x.device), DENSE, (0, L), threshold, code, count, 1)
    return code


def threshold_select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.threshold_select`. Only of rows with more active latents than a buffer holds is all computed."""
    ops = prepare(x, W_enc, b_enc, b_dec)
    threshold = _per_latent(threshold, len(W_enc))
    N, L, C = len(x), len(W_enc), THRESHOLD_SLOTS
    if N <= SMALL_BATCH:
        return _from_dense(ops, threshold)
    buffer = torch.empty(N, C, dtype=torch.int64, device=x.device)
    count = torch.zeros(N, dtype=torch.int32, device=x.device)
    launch_wave(ops, tiles.find_plain(ops.dtype, x.device), THRESHOLD, (0, L), threshold, buffer, count, C)
    lost = count > C
    n_lost, width = torch.stack([lost.sum(), count.masked_fill(lost, 0).max()]).tolist()
    width_2 = triton.next_power_of_2(max(1, width))  # so that few widths are compiled
    values = torch.empty(N, width_2, device=x.device)
    indices = torch.empty(N, width_2, dtype=torch.int32, device=x.device)
    triton_select.finish(buffer, count, width_2, values, indices)
    if not n_lost:
        return _resized(values, max(1, width)), _resized(indices, max(1, width))
    rows = lost.nonzero().squeeze(1)
    more_values, more_indices = _from_dense(replace(ops, x=ops.x[rows]), threshold)
    width = max(1, width, more_values.shape[1])
    values, indices = _resized(values[:, :width], width), _resized(indices[:, :width], width)
    values[rows], indices[rows] = _resized(more_values, width), _resized(more_indices, width)
    return values, indices


def _from_dense(ops: Operands, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return torch_ops.largest_of_code(
        lambda part: _dense(replace(ops, x=ops.x[part]), threshold), len(ops.x), len(ops.W)
    )
