# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""Choosing the largest of many candidates: the second half of the Triton encoders.

A candidate is one 64-bit key: the value in its upper half, in an integer order that equals the order of numbers with
NaN above all, and the latent in its lower half, so that of two equal values the lower latent has the larger key. No two
keys are equal, so "the K largest keys" has exactly one answer. `EMPTY` is below every key. With SIGNED the upper half
orders magnitudes, and the lower half's last bit, which never decides, is the sign.

A selection halves an interval of upper halves that holds the K-th largest, by counts over registers, and ends as soon
as K keys are not below its lower end; a row's candidates never have to be sorted, only the K that remain. Where any
lower bound of the K-th largest will do, it ends a little earlier: with up to SLACK keys more.

Shape letters: N tokens, K kept, C slots of a row's buffer, R rows of a program, T its threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EMPTY = tl.constexpr(-(1 << 63))
NAN_BITS = tl.constexpr(0x7FC00000)
LAST = tl.constexpr(0x7FFFFFFF)
ORDER_OF_LOWEST = tl.constexpr(-0x7F800001)
"""The upper half of -inf."""

KEYS_PER_WARP = 1024
"""Keys that one warp holds in registers while it selects, at most."""


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


def key_ptx(value: str, signed: bool) -> str:
    """PTX of `make_key`: the upper half of a value's key in the register `bits`; the lower half is `latent`, to which a
    signed key adds its sign."""
    if signed:
        halves = "shr.u32 sign, bits, 31;\nand.b32 bits, bits, 0x7fffffff;\nor.b32 latent, latent, sign;"
    else:
        halves = "shr.s32 sign, bits, 31;\nand.b32 sign, sign, 0x7fffffff;\nxor.b32 bits, bits, sign;"
    return f"""add.rn.f32 value, {value}, 0f00000000;
setp.nan.f32 isnan, value, value;
mov.b32 bits, value;
selp.b32 bits, 0x7fc00000, bits, isnan;
{halves}"""


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
def lower_bound(x, n, t, k, SLACK: tl.constexpr):
    """A t' >= t that at least k of x reach, and how many of x reach it: no more than k + SLACK, unless more than that
    equal the k-th largest, which then is t'.

    x [R, C] int32, of which n reach t, at least k; n, t, k [R] int32. In a row with n < k, t and n stay.
    """
    # The k-th largest is one of the `span` numbers from t on.
    span = (tl.max(x, axis=1) - t).to(tl.uint32, bitcast=True) + 1
    unsure = (n > k + SLACK) & (span > 1)
    while tl.max(unsure.to(tl.int32), axis=0) > 0:
        half = span >> 1
        middle = t + half.to(tl.int32, bitcast=True)
        n_middle = tl.sum((x >= middle[:, None]).to(tl.int32), axis=1)
        enough = unsure & (n_middle >= k)
        t = tl.where(enough, middle, t)
        n = tl.where(enough, n_middle, n)
        span = tl.where(enough, span - half, half)
        unsure = (n > k + SLACK) & (span > 1)
    return t, n


@triton.jit
def choose(keys, n, K: tl.constexpr, SLACK: tl.constexpr):
    """keys [R, C] of which n [R] are not EMPTY -> which are among the K largest of their row, with up to SLACK of
    the next ones; how many they are [R]; and a lower bound of their values [R], in the order of the upper halves.

    A row with fewer than K keys loses none.
    """
    order = (keys >> 32).to(tl.int32)
    k = tl.full(n.shape, K, tl.int32)
    least = tl.min(tl.where(keys == EMPTY, LAST, order), axis=1)
    t, n = lower_bound(order, n, least, k, SLACK)
    chosen = order >= t[:, None]
    if tl.max(n, axis=0) > K + SLACK:  # ties at the boundary, where t is the K-th largest: the lowest latents of them
        tied = n > K + SLACK
        above = order > t[:, None]
        n_above = tl.sum(above.to(tl.int32), axis=1)
        low = tl.where(chosen & ~above, (keys & LAST).to(tl.int32), -1)
        lowest, _ = lower_bound(low, n - n_above, tl.zeros_like(n), k - n_above, 0)
        chosen = chosen & (above | (low >= lowest[:, None]) | ~tied[:, None])
        n = tl.where(tied, k, n)
    return chosen, n, t


@triton.jit
def rank(chosen, T: tl.constexpr):
    """Numbers the chosen ones of each row of chosen [R, C] from 0, in an order of its own.

    Column by column of a table of T columns: a thread holds whole ones when T is the number of threads, and asks the
    others only for what stands before.
    """
    R: tl.constexpr = chosen.shape[0]
    C: tl.constexpr = chosen.shape[1]
    one = tl.reshape(chosen.to(tl.int32), (R, C // T, T))
    in_column = tl.sum(one, axis=1)
    before = tl.cumsum(in_column, axis=1) - in_column
    return tl.reshape(before[:, None, :] + tl.cumsum(one, axis=1) - one, (R, C))


@triton.jit
def keep_largest(base, n, K: tl.constexpr, SLACK: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr):
    """Move the K largest, with up to SLACK of the next ones, of the first n [R] <= WIDTH keys of the buffers at base
    [R] to their front, in no particular order -> how many they are, and a lower bound of them as `choose` gives it."""
    slots = tl.arange(0, WIDTH)[None, :]
    keys = tl.load(base[:, None] + slots, mask=slots < n[:, None], other=EMPTY)
    chosen, n, t = choose(keys, n, K, SLACK)
    tl.debug_barrier()  # every key is read before one is written
    tl.store(base[:, None] + rank(chosen, T), keys, mask=chosen)
    return n, t


@triton.jit
def order_value(t):
    """The fp32 value that an upper half stands for; -inf for all that are below every value."""
    t = tl.maximum(t, ORDER_OF_LOWEST)
    return (t ^ ((t >> 31) & LAST)).to(tl.float32, bitcast=True)


@triton.jit
def tighten_rows(base, count_ptr, tau_ptr, rows, count, inside, C: tl.constexpr, K: tl.constexpr, SLACK: tl.constexpr,
                 WIDTH: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """`tighten_kernel` for rows with at most WIDTH candidates, or with C."""
    n, t = keep_largest(base, tl.where(inside, tl.minimum(count, C), 0), K, SLACK, WIDTH, T)
    lost = count > C
    # With K candidates that are NaN no number can enter.
    tau = order_value(t)
    tau = tl.where(lost | (tau != tau), float("inf"), tau)
    tl.store(tau_ptr + rows, tau, mask=inside & (count >= K))
    tl.store(count_ptr + rows, tl.where(lost, count, n), mask=inside)


@triton.jit(do_not_specialize=["N", "stride"])
def tighten_kernel(
    buffer_ptr, count_ptr, tau_ptr, N, stride,
    C: tl.constexpr, K: tl.constexpr, SLACK: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Move the K largest candidates of each row, with up to SLACK of the next ones, to the front of its buffer [N, C],
    and raise tau [N] to a lower bound of them.

    A value of a later latent that does not exceed tau is behind K others, ties included: at least K candidates reach
    tau, and those are of lower latents. It need not be the K-th largest value for that. Of those that reach tau, only
    ones that are behind K others are dropped, too.

    count [N] is how many candidates a row has; one above C has lost some and is left as it is, with tau at infinity so
    that no number is added.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < N
    count = tl.load(count_ptr + rows, mask=inside, other=0)
    base = buffer_ptr + rows.to(tl.int64) * stride
    most = tl.max(count, axis=0)
    # The buffer was full once, after the first wave; then a few K are live.
    if most > K + SLACK:
        if most <= C // 4:
            tighten_rows(base, count_ptr, tau_ptr, rows, count, inside, C, K, SLACK, C // 4, T)
        elif most <= C // 2:
            tighten_rows(base, count_ptr, tau_ptr, rows, count, inside, C, K, SLACK, C // 2, T)
        else:
            tighten_rows(base, count_ptr, tau_ptr, rows, count, inside, C, K, SLACK, C, T)


@triton.jit(do_not_specialize=["N", "M", "n_chunks"])
def reduce_kernel(
    source_ptr, out_ptr, N, M, n_chunks,
    K: tl.constexpr, K2: tl.constexpr, C: tl.constexpr, R: tl.constexpr, T: tl.constexpr, VALUES: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """The K largest of every C columns: source [N, M], fp32 values of latents 0..M-1 or keys -> keys [N, n_chunks * K].

    A chunk with fewer than K candidates is filled up with EMPTY. K2 is the power of two from K on.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = (rows < N)[:, None]
    chunk = tl.program_id(1)
    columns = chunk * C + tl.arange(0, C)[None, :]
    live = inside & (columns < M)
    at = source_ptr + rows.to(tl.int64)[:, None] * M + columns
    if VALUES:
        keys = tl.where(live, make_key(tl.load(at, mask=live, other=0.0), columns, SIGNED), EMPTY)
    else:
        keys = tl.load(at, mask=live, other=EMPTY)
    chosen, n_chosen, _ = choose(keys, tl.sum((keys != EMPTY).to(tl.int32), axis=1), K, 0)
    base = out_ptr + rows.to(tl.int64)[:, None] * (n_chunks * K) + chunk * K
    tl.store(base + rank(chosen, T), keys, mask=chosen)
    slots = tl.arange(0, K2)[None, :]
    left_over = inside & (slots >= n_chosen[:, None]) & (slots < K)
    tl.store(base + slots, tl.full([R, K2], EMPTY, tl.int64), mask=left_over)


@triton.jit(do_not_specialize=["N", "stride"])
def finish_kernel(
    keys_ptr, count_ptr, values_ptr, indices_ptr, N, stride,
    C: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, R: tl.constexpr, T: tl.constexpr, COUNTED: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """The K largest keys of each row of keys [N, C], largest first, as values, after ReLU unless SIGNED, and latents
    [N, K].

    With COUNTED, the first count [N] keys of a row are live, at most all C; else the first K are. K2 is the power of
    two from K on. A row with fewer than K candidates ends in value 0, latent 0.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    base = keys_ptr + rows.to(tl.int64) * stride
    n = tl.where(rows < N, K, 0)
    if COUNTED:
        count = tl.minimum(tl.load(count_ptr + rows, mask=rows < N, other=0), C)
        most = tl.max(count, axis=0)
        if most > K:
            if most <= C // 4:
                keep_largest(base, count, K, 0, C // 4, T)
            elif most <= C // 2:
                keep_largest(base, count, K, 0, C // 2, T)
            else:
                keep_largest(base, count, K, 0, C, T)
            tl.debug_barrier()  # one thread reads below what another wrote
        n = tl.minimum(n, count)
    slots = tl.arange(0, K2)[None, :]
    keys = tl.load(base[:, None] + slots, mask=slots < n[:, None], other=EMPTY)
    keys = tl.sort(keys, 1, descending=True)
    values = key_value(keys, SIGNED)
    if SIGNED:
        values = tl.where(keys == EMPTY, 0.0, values)
    else:
        values = tl.where((keys == EMPTY) | (values < 0.0), 0.0, values)  # a NaN stays
    latents = tl.where(keys == EMPTY, 0, key_latent(keys, SIGNED))
    at = rows.to(tl.int64)[:, None] * K + slots
    inside = (rows < N)[:, None] & (slots < K)
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


def shape_of(C: int, *, interpreted: bool = False) -> dict[str, int]:
    """How a program looks at the C slots of a buffer: R rows of it, T columns, `num_warps`.

    >>> shape_of(1024), shape_of(4096)["T"]
    ({'R': 1, 'T': 32, 'num_warps': 1}, 128)
    """
    warps = max(1, C // KEYS_PER_WARP)
    return {"R": rows_per_program(interpreted), "T": min(16 if interpreted else 32 * warps, C // 4), "num_warps": warps}


def slack_of(k: int) -> int:
    """Candidates beyond k that `tighten` may leave: finding where they end takes a third of its passes, and they let
    in a twentieth more."""
    return k // 8


def tighten(buffer: Tensor, count: Tensor, tau: Tensor, k: int) -> None:
    """Launch `tighten_kernel` on buffer [N, C] int64, count [N] int32, tau [N] fp32."""
    N, C = buffer.shape
    shape = shape_of(C, interpreted=not buffer.is_cuda)
    tighten_kernel[(triton.cdiv(N, shape["R"]),)](
        buffer_ptr=buffer, count_ptr=count, tau_ptr=tau, N=N, stride=C, C=C, K=k, SLACK=slack_of(k), **shape
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
    shape = shape_of(chunk, interpreted=not source.is_cuda)
    while True:
        n_chunks = triton.cdiv(source.shape[1], chunk)
        out = source.new_empty((N, n_chunks * k), dtype=torch.int64)
        reduce_kernel[(triton.cdiv(N, shape["R"]), n_chunks)](
            source_ptr=source, out_ptr=out, N=N, M=source.shape[1], n_chunks=n_chunks,
            K=k, K2=triton.next_power_of_2(k), C=chunk, VALUES=source.dtype != torch.int64, SIGNED=signed, **shape,
        )  # fmt: skip
        if n_chunks == 1:
            return out
        source = out


def finish(
    keys: Tensor, count: Tensor | None, k: int, values: Tensor, indices: Tensor, *, signed: bool = False
) -> None:
    """The k largest keys of each row of keys [N, C] -> values fp32 and indices int32 [N, k].

    Of a row the first count [N] int32 are live, at most all C; without a count the first k are.
    """
    N, C = keys.shape
    K2 = max(2, triton.next_power_of_2(k))
    shape = shape_of(max(4 * K2, C if count is not None else 0), interpreted=not keys.is_cuda)
    finish_kernel[(triton.cdiv(N, shape["R"]),)](
        keys_ptr=keys, count_ptr=keys if count is None else count, values_ptr=values, indices_ptr=indices,
        N=N, stride=C, C=C, K=k, K2=K2, COUNTED=count is not None, SIGNED=signed, **shape,
    )  # fmt: skip
