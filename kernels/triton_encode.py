"""Encode in Triton: a matrix product whose epilogue selects, so that the N x L pre-activations never reach memory.

The latents are taken in waves that grow by a factor of `growth`. The first wave writes its few pre-activations as
candidates into a buffer of C slots a row; after each wave `triton_select.tighten` keeps the K largest of a row, and a
few more, and sets `tau`, which at least K values so far reach. A later wave computes a tile of pre-activations in
registers and appends only what is above the row's tau. With growth 4 some 3K of a wave's values enter; a last, exact
selection and a sort give the code.

A row is exact, by construction, when it never had more candidates than slots: K values that belong to lower latents
reach tau, so a value that does not exceed it is behind K others, ties included; a NaN, the largest of all, always
enters. The other rows are listed on the device and recomputed by `rescue_kernel`, a fixed grid that walks the list and
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
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from steersman.kernels import tiles, triton_select
from steersman.kernels.operands import Operands, prepare
from steersman.kernels.triton_rescue import Candidates, rescue
from steersman.kernels.triton_wave import FILTER, FIRST, launch_wave, small_batch_pre_activations

SMALL_BATCH = 64
"""Tokens up to which W_enc's bytes, not the arithmetic, bound the encoder."""
LARGEST_K = 512
"""Active latents a token up to which the kernels select; above it, PyTorch does."""
MOST_SIGNED = 1 << 30
"""Latents that the keys of a signed code can number."""


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
    return largest(prepare(x, W_enc, b_enc, b_dec), k, signed=signed)


RaiseBound = Callable[[Tensor, Tensor, Tensor], None]
"""Called between two waves with the buffer of keys [N, C], the counts [N] and tau [N], which it may raise."""


def largest(
    ops: Operands, k: int, *, signed: bool = False, raise_bound: RaiseBound | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest of each row, values fp32 and indices int32 [N, K], and how many rows took the exact slow path [1].
    With `raise_bound`, only what reaches that bound is sure to be among them."""
    N, device = len(ops.x), ops.x.device
    values = torch.empty(N, k, device=device)
    indices = torch.empty(N, k, dtype=torch.int32, device=device)
    n_failed = torch.zeros(1, dtype=torch.int32, device=device)
    if N == 0:
        return values, indices, n_failed
    if N <= SMALL_BATCH:
        keys, count = triton_select.reduce(small_batch_pre_activations(ops), k, chunk_of(k), signed=signed), None
    else:
        tile = tiles.find(ops.shape(k), ops.dtype, device, signed)
        candidates = collect(ops, k, n_failed, tile, signed=signed, raise_bound=raise_bound)
        rescue(ops, candidates, k, signed=signed)
        keys, count = candidates.buffer, candidates.count
    triton_select.finish(keys, count, k, values, indices, signed=signed)
    return values, indices, n_failed


def chunk_of(k: int) -> int:
    """Columns that one program of `triton_select.reduce` sees: enough to throw most of them away."""
    return max(2048, triton.next_power_of_2(4 * k))


def collect(
    ops: Operands,
    k: int,
    n_failed: Tensor,
    tile: tiles.Tile,
    *,
    signed: bool = False,
    raise_bound: RaiseBound | None = None,
) -> Candidates:
    """Run all waves: each row's candidates, among them its K largest unless its count says that some were lost."""
    N = len(ops.x)
    schedule = plan(len(ops.W), k)
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
            if raise_bound is not None:
                raise_bound(buffer, count, tau)
    return Candidates(buffer, count, n_failed)
