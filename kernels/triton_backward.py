"""The backward pass, latent by latent, in Triton: what `torch_ops.LatentOrder` and `value_gradient` compute.

The N*K (token, latent) pairs are sorted by latent once a step. The run of a latent then lists its tokens, and each
sum over them has one owner and one order, so that two runs give the same bits: no atomics. The sorted list is cut into
chunks of CHUNK pairs. Those that lie in the run of one latent are summed by programs of their own, and its owner adds
them in order: no program has more than 2 CHUNK pairs to gather. Sums are fp32, operands bf16 or fp32. Nothing is asked
of the host.

Shape letters: N tokens, L latents, D width, K active latents a token, P pairs, C = P // CHUNK chunks.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's decorator does not show what types a kernel takes.

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128
"""Pairs that a program of `chunk_sums` adds up."""
PAIRS = 8
"""Pairs whose rows are read together."""


@triton.jit
def columns(d, BLOCK_D: tl.constexpr):
    """Columns d to d + BLOCK_D - 1 of a row, four to a thread whatever their dtype: where there is a thread for every
    four columns, a tile of pairs x columns is added up over its pairs without any exchange between threads."""
    return d + tl.max_contiguous(tl.arange(0, BLOCK_D), 4)


@triton.jit
def sum_run(pairs, d, D, HOT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """`sum_p weights[p] rows[tokens[p], d : d + BLOCK_D]` over the pairs start <= p < stop, in a fixed order.

    pairs: pointers to rows [N, D], tokens and weights [P], and chunks [P // CHUNK, D]; start; stop. With HOT the chunks
    that lie in the run as a whole are taken from there.
    """
    rows_ptr, tokens_ptr, weights_ptr, chunks_ptr, start, stop = pairs
    cols = columns(d, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    end = stop
    if HOT:
        first, last = tl.cdiv(start, CHUNK), stop // CHUNK
        between = tl.maximum(last - first, 0) * CHUNK
        end = stop - between
        row = chunks_ptr + first.to(tl.int64) * D
        for _ in range(first, last):
            total += tl.load(row + cols, mask=cols < D, other=0.0)
            row += D
    for place in range(start, end, BLOCK_P):
        pair = place + tl.arange(0, BLOCK_P)
        if HOT:
            pair = tl.where((between > 0) & (pair >= first * CHUNK), pair + between, pair)
        there = pair < stop
        token = tl.load(tokens_ptr + pair, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + pair, mask=there, other=0.0)
        both = there[:, None] & (cols < D)[None, :]
        rows = tl.load(rows_ptr + token[:, None] * D + cols[None, :], mask=both, other=0.0).to(tl.float32)
        total += tl.sum(rows * weight[:, None], axis=0)
    return total


@triton.jit
def run_products(a_ptr, b_ptr, start, stop):
    """The sums of a and of a * b over the pairs start <= p < stop."""
    total = tl.zeros([32], tl.float32)
    product = tl.zeros([32], tl.float32)
    for first in range(start, stop, 32):
        pair = first + tl.arange(0, 32)
        a = tl.load(a_ptr + pair, mask=pair < stop, other=0.0)
        total += a
        product += a * tl.load(b_ptr + pair, mask=pair < stop, other=0.0)
    return tl.sum(total), tl.sum(product)


@triton.jit(do_not_specialize=["n_pairs", "n_halvings"])
def runs(
    latents_ptr, pairs_ptr, tokens_ptr, starts_ptr, n_pairs, n_halvings, K, L, BLOCK: tl.constexpr
):  # fmt: skip
    """tokens [P] of the sorted pairs, and starts [L + 1]: how many pairs belong to lower latents."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(pairs_ptr + at, mask=at < n_pairs, other=0).to(tl.int32)
    tl.store(tokens_ptr + at, pair // K, mask=at < n_pairs)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + n_pairs
    for _ in range(0, n_halvings):
        middle = (low + high) // 2
        looking = (low < high) & (at <= L)
        lower = tl.load(latents_ptr + middle, mask=looking, other=0) < at
        high = tl.where(looking & ~lower, middle, high)
        low = tl.where(looking & lower, middle + 1, low)
    tl.store(starts_ptr + at, low, mask=at <= L)


@triton.jit(do_not_specialize=["n_pairs"])
def sort_weights(
    values_ptr, dots_ptr, pairs_ptr, z_ptr, dz_ptr, n_pairs, scale, DOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """z [P]: the values in the order of the sorted pairs; with DOTS also dz [P], `scale dots`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(pairs_ptr + at, mask=at < n_pairs, other=0)
    tl.store(z_ptr + at, tl.load(values_ptr + pair, mask=at < n_pairs, other=0.0).to(tl.float32), mask=at < n_pairs)
    if DOTS:
        tl.store(dz_ptr + at, scale * tl.load(dots_ptr + pair, mask=at < n_pairs, other=0.0), mask=at < n_pairs)


@triton.jit(do_not_specialize=["n_pairs"])
def pair_dots(
    g_ptr, w_ptr, tokens_ptr, latents_ptr, pairs_ptr, out_ptr, n_pairs, L, D,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`<g[token], W[latent]>` of the sorted pairs, each written to its place in the code [N, K]; those of latent L (no
    latent) are 0.

    Pairs of one latent follow each other, so its row of W is read from memory once and then found in cache.
    """
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = pair < n_pairs
    latent = tl.load(latents_ptr + pair, mask=there, other=L).to(tl.int64)
    token = tl.load(tokens_ptr + pair, mask=there, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        cols = d + tl.arange(0, BLOCK_D)
        both = (latent < L)[:, None] & (cols < D)[None, :]
        g = tl.load(g_ptr + token[:, None] * D + cols[None, :], mask=both, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + latent[:, None] * D + cols[None, :], mask=both, other=0.0).to(tl.float32)
        total += g * w
    tl.store(out_ptr + tl.load(pairs_ptr + pair, mask=there, other=0), tl.sum(total, axis=1), mask=there)


@triton.jit
def chunk_sums(
    g_ptr, g_weights_ptr, g_chunks_ptr, g_rows_ptr, x_ptr, x_weights_ptr, x_chunks_ptr, tokens_ptr, latents_ptr, L, D,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row c of chunks [C, D]: the weighted sum of pairs c CHUNK to (c + 1) CHUNK - 1, where all of them are one
    latent's; other rows are never read. For rows g, of which a pair reads g_rows [P], and in programs of their own for
    its token's row of x."""
    c, d = tl.program_id(0), tl.program_id(1) * BLOCK_D
    start, stop = c * CHUNK, (c + 1) * CHUNK
    latent = tl.load(latents_ptr + start)
    if (latent < L) & (latent == tl.load(latents_ptr + stop - 1)):
        cols = columns(d, BLOCK_D)
        at = c.to(tl.int64) * D + cols
        if tl.program_id(2) == 0:
            pairs = (g_ptr, g_rows_ptr, g_weights_ptr, g_chunks_ptr, start, stop)
            tl.store(g_chunks_ptr + at, sum_run(pairs, d, D, False, CHUNK, BLOCK_P, BLOCK_D), mask=cols < D)
        else:
            pairs = (x_ptr, tokens_ptr, x_weights_ptr, x_chunks_ptr, start, stop)
            tl.store(x_chunks_ptr + at, sum_run(pairs, d, D, False, CHUNK, BLOCK_P, BLOCK_D), mask=cols < D)


@triton.jit
def row_sums(
    rows_ptr, tokens_ptr, weights_ptr, starts_ptr, chunks_ptr, out_ptr, D,
    HOT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row l of out [L, D]: the weighted sum over latent l's pairs."""
    latent, d = tl.program_id(0), tl.program_id(1) * BLOCK_D
    start, stop = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
    pairs = (rows_ptr, tokens_ptr, weights_ptr, chunks_ptr, start, stop)
    cols = columns(d, BLOCK_D)
    total = sum_run(pairs, d, D, HOT, CHUNK, BLOCK_P, BLOCK_D)
    tl.store(out_ptr + latent.to(tl.int64) * D + cols, total, mask=cols < D)


@triton.jit
def run_sums(weights_ptr, starts_ptr, sums_ptr):
    """sums[l] = the sum of the weights over latent l's pairs."""
    latent = tl.program_id(0)
    start, stop = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
    total, _ = run_products(weights_ptr, weights_ptr, start, stop)
    tl.store(sums_ptr + latent, total)


def width_block(D: int, largest: int = 512) -> int:
    """Columns of a tile: the power of two from 128 to `largest` that leaves the fewest lanes idle, larger ones first.

    >>> width_block(2304), width_block(768), width_block(4096), width_block(7)
    (256, 256, 512, 128)
    """
    sizes = [size for size in (512, 256, 128) if size <= largest]
    return min(sizes, key=lambda size: -(-D // size) * size)


class LatentOrder:
    """The N*K (token, latent) pairs sorted by latent: one sort a step, shared by every gradient.

    indices [N, K]; pairs that `active` [N, K] bool leaves out have no latent and stand last. `latents` and `tokens`
    [P] list the sorted pairs, `pairs` [P] their places in the flattened code, `starts` [L + 1] where each latent's run
    begins.
    """

    def __init__(self, indices: Tensor, n_latents: int, active: Tensor | None = None):
        keys = indices.int()
        if active is not None:
            keys = torch.where(active, keys, n_latents)
        self.indices, self.n_latents = indices, n_latents
        self.latents, self.pairs = torch.sort(keys.reshape(-1), stable=True)
        self.tokens = torch.empty_like(self.latents)
        self.starts = torch.empty(n_latents + 1, dtype=torch.int32, device=indices.device)
        n_pairs, block = len(self.latents), 512
        runs[(triton.cdiv(max(n_pairs, n_latents + 1), block),)](
            latents_ptr=self.latents, pairs_ptr=self.pairs, tokens_ptr=self.tokens, starts_ptr=self.starts,
            n_pairs=n_pairs, n_halvings=n_pairs.bit_length(), K=indices.shape[1], L=n_latents, BLOCK=block, num_warps=4,
        )  # fmt: skip

    @property
    def tensors(self) -> list[Tensor]:
        """What the sort made; with the indices it is all there is to the object."""
        return [self.latents, self.pairs, self.tokens, self.starts]

    @classmethod
    def of(cls, indices: Tensor, n_latents: int, tensors: list[Tensor]) -> "LatentOrder":
        """The order of indices [N, K] whose `tensors` these are, without another sort."""
        order = cls.__new__(cls)
        order.indices, order.n_latents = indices, n_latents
        order.latents, order.pairs, order.tokens, order.starts = tensors
        return order

    def reading(self, rows: Tensor) -> "LatentOrder":
        """The same order where each pair reads the row of a table that rows [N, K] names, not its token's."""
        tokens = rows.flatten()[self.pairs].int()
        return LatentOrder.of(self.indices, self.n_latents, [self.latents, self.pairs, tokens, self.starts])

    @staticmethod
    def shapes(indices: Tensor, n_latents: int) -> list[Tensor]:
        """Empty tensors like `tensors`."""
        P = indices.shape[0] * indices.shape[1]
        sizes = (P, P, P, n_latents + 1)
        kinds = [torch.int64 if i == 1 else torch.int32 for i in range(4)]
        return [indices.new_empty(size, dtype=kind) for size, kind in zip(sizes, kinds)]

    def sorted(self, values: Tensor, dots: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """values [N, K] in the order of the sorted pairs, fp32 [P], and `scale dots` (the first again where dots is
        None)."""
        z = torch.empty(len(self.pairs), device=values.device)
        dz = z if dots is None else torch.empty_like(z)
        sort_weights[(triton.cdiv(len(z), 1024),)](
            values_ptr=values.contiguous(), dots_ptr=z if dots is None else dots.contiguous(), pairs_ptr=self.pairs,
            z_ptr=z, dz_ptr=dz, n_pairs=len(z), scale=scale, DOTS=dots is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        return z, dz

    def chunk_tables(
        self,
        g_weights: Tensor,
        g: Tensor,
        x_weights: Tensor | None = None,
        x: Tensor | None = None,
        g_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sums over the chunks that are one latent's: sorted weights [P], rows [N, D] -> [C, D] fp32, of one or two
        kinds of rows. g_rows [P]: which row of g a pair reads; None: its token's."""
        D, C = g.shape[1], len(self.pairs) // CHUNK
        chunks = torch.empty(1 if x is None else 2, C, D, device=g.device)
        if C:
            block = width_block(D)
            chunk_sums[(C, triton.cdiv(D, block), len(chunks))](
                g_ptr=g, g_weights_ptr=g_weights, g_chunks_ptr=chunks[0],
                g_rows_ptr=self.tokens if g_rows is None else g_rows, x_ptr=g if x is None else x,
                x_weights_ptr=g_weights if x_weights is None else x_weights, x_chunks_ptr=chunks[-1],
                tokens_ptr=self.tokens, latents_ptr=self.latents, L=self.n_latents, D=D, CHUNK=CHUNK, BLOCK_P=PAIRS,
                BLOCK_D=block, num_warps=block // 128,
            )  # fmt: skip
        return chunks[0], chunks[-1]

    def scatter_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """See `reference.scatter_rows`: weights [N, K], rows [N, D] -> [L, D] fp32."""
        rows, weights = rows.contiguous(), self.sorted(weights)[0]
        D = rows.shape[1]
        out = torch.empty(self.n_latents, D, device=rows.device)
        chunks, block = self.chunk_tables(weights, rows)[0], width_block(D)
        row_sums[(self.n_latents, triton.cdiv(D, block))](
            rows_ptr=rows, tokens_ptr=self.tokens, weights_ptr=weights, starts_ptr=self.starts, chunks_ptr=chunks,
            out_ptr=out, D=D, HOT=len(chunks) > 0, CHUNK=CHUNK, BLOCK_P=PAIRS, BLOCK_D=block, num_warps=block // 128,
        )  # fmt: skip
        return out

    def scatter(self, weights: Tensor) -> Tensor:
        """`out[l]` = the sum of weights [N, K] over the pairs of latent l -> [L] fp32."""
        sums = torch.empty(self.n_latents, device=weights.device)
        run_sums[(self.n_latents,)](
            weights_ptr=self.sorted(weights)[0], starts_ptr=self.starts, sums_ptr=sums, num_warps=1
        )
        return sums

    def value_gradient(self, g: Tensor, W_dec: Tensor) -> Tensor:
        """See `reference.value_gradient`: g [N, D], W_dec [L, D] -> [N, K] fp32; 0 for pairs that have no latent."""
        n_pairs, D = len(self.pairs), g.shape[1]
        out = torch.empty(n_pairs, device=g.device)
        pair_dots[(triton.cdiv(n_pairs, PAIRS),)](
            g_ptr=g.contiguous(), w_ptr=W_dec.contiguous(), tokens_ptr=self.tokens, latents_ptr=self.latents,
            pairs_ptr=self.pairs, out_ptr=out, n_pairs=n_pairs, L=self.n_latents, D=D, BLOCK_P=PAIRS,
            BLOCK_D=width_block(D), num_warps=4,
        )  # fmt: skip
        return out.view(self.indices.shape)


def value_gradient(g: Tensor, W_dec: Tensor, indices: Tensor) -> Tensor:
    """See `reference.value_gradient`; `LatentOrder.value_gradient` saves the sort where there is one already."""
    return LatentOrder(indices, len(W_dec)).value_gradient(g, W_dec)
