# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""BatchTopK and JumpReLU in Triton, on the waves of `triton_wave`: one threshold for the batch, or one a latent.

BatchTopK: each row proposes its `width` largest values. After every wave the (N*K)-th largest of all proposals is a
lower bound of the batch's threshold, so what is below it enters no buffer any more. JumpReLU knows its thresholds, and
needs one wave.

The number of columns of both results depends on the data, so each reads one number from the device at its end.
Shape letters: N tokens, L latents, D width, K active latents a token on average, C slots of a row's buffer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels import tiles, torch_ops, triton_select
from steersman.kernels.operands import Operands, prepare
from steersman.kernels.triton_encode import LARGEST_K, SMALL_BATCH, chunk_of, plan
from steersman.kernels.triton_rescue import Candidates, rescue
from steersman.kernels.triton_wave import (
    DENSE,
    FILTER,
    FIRST,
    THRESHOLD,
    launch_wave,
    small_batch_pre_activations,
)  # fmt: skip

THRESHOLD_SLOTS = 1024
"""Slots of a row's buffer when the number of active latents is not known beforehand."""


@triton.jit(do_not_specialize=["M"])
def histogram_kernel(bits_ptr, histogram_ptr, state_ptr, M, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Count the 8-bit digits at SHIFT of those of bits [M] whose higher digits equal the prefix found so far."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + at, mask=at < M, other=0)
    prefix = tl.load(state_ptr)
    live = at < M
    if SHIFT < 24:
        live = live & ((bits >> (SHIFT + 8)) == prefix)
    counts = tl.histogram((bits >> SHIFT) & 255, 256, mask=live)
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


def rank_value(values: Tensor, rank: int) -> Tensor:
    """The rank-th largest (from 1) of values [M] fp32, none negative, as a tensor [1]; four counting passes."""
    bits = values.contiguous().view(torch.int32).reshape(-1)
    histogram = torch.zeros(256, dtype=torch.int32, device=values.device)
    state = torch.tensor([0, rank], dtype=torch.int32).to(values.device, non_blocking=True)
    block = 4096
    for shift in (24, 16, 8, 0):
        histogram_kernel[(triton.cdiv(len(bits), block),)](
            bits_ptr=bits, histogram_ptr=histogram, state_ptr=state, M=len(bits), SHIFT=shift, BLOCK=block, num_warps=4
        )
        digit_kernel[(1,)](histogram_ptr=histogram, state_ptr=state, num_warps=1)
    return state[:1].view(torch.float32)


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.batch_topk_encode`. A NaN among the proposals is passed on in the values."""
    N, L = len(x), len(W_enc)
    ops = prepare(x, W_enc, b_enc, b_dec)
    width = min(L, LARGEST_K, 4 * k)
    while N and k <= width:
        proposals, indices = propose(ops, k, width)
        t = rank_value(proposals, N * k)
        ties = proposals == t
        missing = N * k - (proposals > t).sum()
        selected = (proposals > t) | (ties & (ties.view(-1).cumsum(0).view(N, width) <= missing))
        nan = proposals.isnan()
        selected = (selected & (proposals > 0)) | nan
        full, used = torch.stack([(selected & ~nan)[:, -1].any().int(), selected.sum(dim=1).max().int()]).tolist()
        if not full or width == L:
            values = torch.where(selected, proposals, torch.zeros_like(proposals))
            min_selected = torch.where(selected, proposals, proposals.new_tensor(float("inf"))).min()
            used = max(1, used)
            return values[:, :used].contiguous(), indices[:, :used].contiguous(), min_selected
        if width == LARGEST_K:
            break
        width = min(L, LARGEST_K, 2 * width)
    return torch_ops.batch_topk_encode(x, W_enc, b_enc, k, b_dec)


def propose(ops: Operands, k: int, width: int) -> tuple[Tensor, Tensor]:
    """Each row's `width` largest values after ReLU, complete down to the batch's (N*K)-th largest: values fp32 and
    indices int32 [N, width]."""
    N, L = len(ops.x), len(ops.W)
    device = ops.x.device
    values = torch.empty(N, width, device=device)
    indices = torch.empty(N, width, dtype=torch.int32, device=device)
    if N <= SMALL_BATCH:
        keys = triton_select.reduce(small_batch_pre_activations(ops), width, chunk_of(width))
        triton_select.finish(keys, None, width, values, indices)
        return values, indices
    schedule = plan(L, width)
    tile = tiles.find(ops.shape(width), ops.dtype, device)
    buffer = torch.empty(N, schedule.slots, dtype=torch.int64, device=device)
    count = torch.full((N,), schedule.waves[0][1], dtype=torch.int32, device=device)
    tau = torch.full((N,), float("-inf"), device=device)
    for i, wave in enumerate(schedule.waves):
        first = i == 0
        in_use = tiles.find_plain(ops.dtype, device) if first else tile
        launch_wave(ops, in_use, FIRST if first else FILTER, wave, tau, buffer, count, schedule.slots)
        if i < len(schedule.waves) - 1:
            triton_select.tighten(buffer, count, tau, width)
            # The upper half of a key is the bits of a value that is not negative. Equal values of an earlier token
            # go before those of a later one, so the bound lets them in: it is the next number below.
            found = (buffer[:, :width] >> 32).clamp(min=0).int().view(torch.float32)
            below = (rank_value(found, N * k).view(torch.int32) - 1).clamp(min=0).view(torch.float32)
            torch.maximum(tau, below.nan_to_num(nan=float("inf")), out=tau)
    candidates = Candidates(buffer, count, torch.zeros(1, dtype=torch.int32, device=device))
    rescue(ops, candidates, width)
    triton_select.finish(buffer, count, width, values, indices)
    return values, indices


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
    """See `reference.threshold_select`.

    The N x L code is written only when some row holds more active latents than the buffers do.
    """
    ops = prepare(x, W_enc, b_enc, b_dec)
    threshold = _per_latent(threshold, len(W_enc))
    N, C = len(x), THRESHOLD_SLOTS
    if N > SMALL_BATCH:
        buffer = torch.empty(N, C, dtype=torch.int64, device=x.device)
        count = torch.zeros(N, dtype=torch.int32, device=x.device)
        tile = tiles.find_plain(ops.dtype, x.device)
        launch_wave(ops, tile, THRESHOLD, (0, len(W_enc)), threshold, buffer, count, C)
        width = max(1, int(count.max()))
        if width <= C:
            width_2 = triton.next_power_of_2(width)  # so that few widths are compiled
            values = torch.empty(N, width_2, device=x.device)
            indices = torch.empty(N, width_2, dtype=torch.int32, device=x.device)
            triton_select.finish(buffer, count, width_2, values, indices)
            return values[:, :width].contiguous(), indices[:, :width].contiguous()
    code = _dense(ops, threshold)
    return torch_ops.largest_of_code(lambda part: code[part], N, len(W_enc))
