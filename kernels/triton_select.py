# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""Choosing the largest of many candidates: the second half of the Triton encoders.

A candidate is one 64-bit key: the value in its upper half, in an integer order that equals the order of numbers with
NaN above all, and the latent in its lower half, so that of two equal values the lower latent has the larger key. No two
keys are equal, so "the K largest keys" has exactly one answer. `EMPTY` is below every key. With SIGNED the upper half
orders magnitudes, and the lower half's last bit, which never decides, is the sign.

A selection finds the K-th largest value by fixing one bit of it after the other, 32 counts over registers; a row's
candidates never have to be sorted, only the K that remain.

Shape letters: N tokens, K kept, C slots of a row's buffer, R rows of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EMPTY = tl.constexpr(-(1 << 63))
NAN_BITS = tl.constexpr(0x7FC00000)
LAST = tl.constexpr(0x7FFFFFFF)

SLOTS_PER_WARP = 1024
"""Keys that one warp holds in registers while it selects."""


@triton.jit
def make_key(values, latents, SIGNED: tl.constexpr):
    """fp32 values and int32 latents (of SIGNED keys below 2^30) -> int64 keys."""
    values = tl.where(values == 0.0, 0.0, values)  # -0.0 equals 0.0
    bits = tl.where(values != values, NAN_BITS, values.to(tl.int32, bitcast=True))
    if SIGNED:
        low = ((latents ^ (LAST >> 1)) << 1) | ((bits >> 31) & 1)
        return ((bits & LAST).to(tl.int64) << 32) | low.to(tl.int64)
    else:
        ordered = bits ^ ((bits >> 31) & LAST)
        return (ordered.to(tl.int64) << 32) | (latents ^ LAST).to(tl.int64)


@triton.jit
def key_value(keys, SIGNED: tl.constexpr):
    """The fp32 values of keys."""
    ordered = (keys >> 32).to(tl.int32)
    if SIGNED:
        return (ordered | (keys.to(tl.int32) << 31)).to(tl.float32, bitcast=True)
    else:
        return (ordered ^ ((ordered >> 31) & LAST)).to(tl.float32, bitcast=True)


@triton.jit
def key_latent(keys, SIGNED: tl.constexpr):
    """The int32 latents of keys."""
    low = (keys & LAST).to(tl.int32)
    if SIGNED:
        return (low >> 1) ^ (LAST >> 1)
    else:
        return low ^ LAST


@triton.jit
def kth_largest(x, k):
    """The largest t with at least k[r] of x[r] >= t: x [R, C] uint32, k [R] int32 -> [R] uint32; 0 where too few."""
    t = tl.zeros_like(k).to(tl.uint32)
    bit = tl.full(t.shape, 0x80000000, tl.uint32)
    for _ in range(32):
        trial = t | bit
        bit = bit >> 1
        enough = tl.sum((x >= trial[:, None]).to(tl.int32), axis=1) >= k
        t = tl.where(enough, trial, t)
    return t


@triton.jit
def select_largest(keys, K: tl.constexpr):
    """keys [R, C] -> which are among the K largest of their row, never an EMPTY one; and the K-th largest value as the
    unsigned integer that orders it."""
    high = (keys >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000
    wanted = tl.full([keys.shape[0]], K, tl.int32)
    t = kth_largest(high, wanted)
    above = high > t[:, None]
    equal = (high == t[:, None]) & (keys != EMPTY)
    missing = wanted - tl.sum(above.to(tl.int32), axis=1)
    n_equal = tl.sum(equal.to(tl.int32), axis=1)
    chosen = above | equal
    if tl.max(n_equal - missing, axis=0) > 0:  # ties at the boundary: the lowest latents of them
        low = tl.where(equal, (keys & LAST).to(tl.int32) + 1, 0).to(tl.uint32)
        chosen = above | (equal & (low >= kth_largest(low, missing)[:, None]))
    return chosen, t


@triton.jit
def order_value(t):
    """The fp32 value that an unsigned order integer stands for."""
    ordered = (t ^ 0x80000000).to(tl.int32, bitcast=True)
    return (ordered ^ ((ordered >> 31) & LAST)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["N"])
def tighten_kernel(buffer_ptr, count_ptr, tau_ptr, N, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """Move the K largest candidates of each row to the front of its buffer [N, C], and raise tau [N] to the smallest.

    count [N] is how many candidates a row has; one above C has lost some and is left as it is, with tau at infinity so
    that nothing more is added.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < N
    count = tl.load(count_ptr + rows, mask=inside, other=0)
    if tl.max(count, axis=0) > K:
        slots = tl.arange(0, C)
        base = buffer_ptr + rows.to(tl.int64)[:, None] * C
        lost = count > C
        live = inside[:, None] & (slots[None, :] < count[:, None])
        keys = tl.load(base + slots[None, :], mask=live, other=EMPTY)
        chosen, t = select_largest(keys, K)
        place = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
        grown = (count > K)[:, None]
        tl.debug_barrier()  # every key is read before one is written
        tl.store(base + place, keys, mask=chosen & grown & inside[:, None])
        # With K candidates that are NaN no number can enter; the encoder sends rows with a further NaN to the rescue.
        tau = order_value(t)
        tau = tl.where(lost | (tau != tau), float("inf"), tau)
        tl.store(tau_ptr + rows, tau, mask=inside & (count > K))
        tl.store(count_ptr + rows, tl.where(lost, count, K), mask=inside & (count > K))


@triton.jit(do_not_specialize=["N", "M", "n_chunks"])
def reduce_kernel(
    source_ptr, out_ptr, N, M, n_chunks,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, VALUES: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """The K largest of every C columns: source [N, M], fp32 values of latents 0..M-1 or keys -> keys [N, n_chunks * K].

    A chunk with fewer than K candidates is filled up with EMPTY.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    chunk = tl.program_id(1)
    columns = chunk * C + tl.arange(0, C)
    live = (rows < N)[:, None] & (columns < M)[None, :]
    at = source_ptr + rows.to(tl.int64)[:, None] * M + columns[None, :]
    if VALUES:
        keys = tl.where(live, make_key(tl.load(at, mask=live, other=0.0), columns[None, :], SIGNED), EMPTY)
    else:
        keys = tl.load(at, mask=live, other=EMPTY)
    chosen, _ = select_largest(keys, K)
    place = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    n_chosen = tl.sum(chosen.to(tl.int32), axis=1)
    base = out_ptr + rows.to(tl.int64)[:, None] * (n_chunks * K) + chunk * K
    tl.store(base + place, keys, mask=chosen)
    # The chosen fill the front, so the first columns that are left over number the slots that stay empty.
    slots = tl.arange(0, C)[None, :]
    tl.store(
        base + slots,
        tl.full([R, C], EMPTY, tl.int64),
        mask=(rows < N)[:, None] & (slots >= n_chosen[:, None]) & (slots < K),
    )


@triton.jit(do_not_specialize=["N"])
def finish_kernel(
    keys_ptr, values_ptr, indices_ptr, N,
    C: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, R: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Sort the first K keys of each row of keys [N, C], largest first, and write values, after ReLU unless SIGNED, and
    latents [N, K].

    K2 is the next power of two. A row with fewer than K candidates ends in value 0, latent 0.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    slots = tl.arange(0, K2)
    inside = (rows < N)[:, None] & (slots < K)[None, :]
    keys = tl.load(keys_ptr + rows.to(tl.int64)[:, None] * C + slots[None, :], mask=inside, other=EMPTY)
    keys = tl.sort(keys, 1, descending=True)
    values = key_value(keys, SIGNED)
    if SIGNED:
        values = tl.where(keys == EMPTY, 0.0, values)
    else:
        values = tl.where((keys == EMPTY) | (values < 0.0), 0.0, values)  # a NaN stays
    latents = tl.where(keys == EMPTY, 0, key_latent(keys, SIGNED))
    at = rows.to(tl.int64)[:, None] * K + slots[None, :]
    tl.store(values_ptr + at, values, mask=inside)
    tl.store(indices_ptr + at, latents, mask=inside)


@triton.jit(do_not_specialize=["N"])
def certify_kernel(count_ptr, failed_ptr, n_failed_ptr, N, C: tl.constexpr, BLOCK: tl.constexpr):
    """List the rows whose buffer overflowed: failed [N] their numbers, n_failed [1] how many. Their count becomes C."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bad = tl.load(count_ptr + rows, mask=rows < N, other=0) > C
    n_bad = tl.sum(bad.to(tl.int32), axis=0)
    if n_bad > 0:
        first = tl.atomic_add(n_failed_ptr, n_bad, sem="relaxed")
        place = first + tl.cumsum(bad.to(tl.int32), axis=0) - 1
        tl.store(failed_ptr + place, rows, mask=bad)
        tl.store(count_ptr + rows, C, mask=bad)


def rows_per_program(interpreted: bool) -> int:
    """Under the interpreter a program costs more than its arithmetic, so it takes many rows; on a GPU, one a warp."""
    return 16 if interpreted else 1


def tighten(buffer: Tensor, count: Tensor, tau: Tensor, k: int) -> None:
    """Launch `tighten_kernel` on buffer [N, C] int64, count [N] int32, tau [N] fp32."""
    N, C = buffer.shape
    R = rows_per_program(not buffer.is_cuda)
    tighten_kernel[(triton.cdiv(N, R),)](
        buffer_ptr=buffer, count_ptr=count, tau_ptr=tau, N=N, C=C, K=k, R=R, num_warps=max(1, C // SLOTS_PER_WARP)
    )


def certify(count: Tensor, failed: Tensor, n_failed: Tensor, C: int) -> None:
    """Launch `certify_kernel` on count [N], failed [N] and n_failed [1], all int32."""
    block = 1024 if count.is_cuda else triton.next_power_of_2(len(count))
    certify_kernel[(triton.cdiv(len(count), block),)](
        count_ptr=count, failed_ptr=failed, n_failed_ptr=n_failed, N=len(count), C=C, BLOCK=block, num_warps=4
    )


def reduce(source: Tensor, k: int, chunk: int, *, signed: bool = False) -> Tensor:
    """The keys [N, M'] of the K largest of each row of source [N, M] (fp32 values or keys), M' at most `chunk`."""
    N = len(source)
    while True:
        n_chunks = triton.cdiv(source.shape[1], chunk)
        out = source.new_empty((N, n_chunks * k), dtype=torch.int64)
        R = rows_per_program(not source.is_cuda)
        reduce_kernel[(triton.cdiv(N, R), n_chunks)](
            source_ptr=source, out_ptr=out, N=N, M=source.shape[1], n_chunks=n_chunks,
            K=k, C=chunk, R=R, VALUES=source.dtype != torch.int64, SIGNED=signed,
            num_warps=max(1, chunk // SLOTS_PER_WARP),
        )  # fmt: skip
        if n_chunks == 1:
            return out
        source = out


def finish(keys: Tensor, k: int, values: Tensor, indices: Tensor, *, signed: bool = False) -> None:
    """Launch `finish_kernel`: the first k of keys [N, C] -> values fp32 and indices int32 [N, k]."""
    N, C = keys.shape
    R = rows_per_program(not keys.is_cuda)
    K2 = max(2, triton.next_power_of_2(k))
    finish_kernel[(triton.cdiv(N, R),)](
        keys_ptr=keys, values_ptr=values, indices_ptr=indices, N=N,
        C=C, K=k, K2=K2, R=R, SIGNED=signed, num_warps=max(1, K2 // 256),
    )  # fmt: skip
