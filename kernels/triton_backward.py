"""The backward pass, latent by latent, in Triton: what `torch_ops.LatentOrder` and `value_gradient` compute.

The N*K (token, latent) pairs are sorted by latent once a step. The run of a latent then lists its tokens, and each
sum over them has one owner and one order, so that two runs give the same bits: no atomics. A latent with more than
CHUNK pairs is cut into chunks of CHUNK that are summed by programs of their own; its owner adds the chunks in order.
Sums are fp32, operands bf16 or fp32. Nothing is asked of the host: tables have the size that the worst case needs.

Shape letters: N tokens, L latents, D width, K active latents a token, P pairs, C chunks.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# Triton's decorator does not show what types a kernel takes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from steersman.kernels.update import PART

CHUNK = 256
"""Pairs of one latent that a single program sums."""
PAIRS = 8
"""Pairs whose rows are read together."""


@triton.jit
def sum_rows(
    rows_ptr, tokens_ptr, weights_ptr, start, stop, cols, mask, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`sum_p weights[p] rows[tokens[p], cols]` over start <= p < stop, in a fixed order -> [BLOCK_D]."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_P):
        pair = first + tl.arange(0, BLOCK_P)
        there = pair < stop
        token = tl.load(tokens_ptr + pair, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + pair, mask=there, other=0.0)
        both = there[:, None] & mask[None, :]
        row = tl.load(rows_ptr + token[:, None] * D + cols[None, :], mask=both, other=0.0).to(tl.float32)
        total += tl.sum(row * weight[:, None], axis=0)
    return total


@triton.jit
def sum_chunks(chunks_ptr, first, stop, cols, mask, D, BLOCK_D: tl.constexpr):
    """The rows first <= c < stop of chunks [C, D], added in order -> [BLOCK_D]."""
    total = tl.zeros([BLOCK_D], tl.float32)
    row = chunks_ptr + first.to(tl.int64) * D
    for _ in range(first, stop):
        total += tl.load(row + cols, mask=mask, other=0.0)
        row += D
    return total


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
    rows_ptr, tokens_ptr, weights_ptr, starts_ptr, hot_starts_ptr, chunk_latents_ptr, chunks_ptr, L, D,
    SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row c of chunks [C, D]: the weighted sum of one chunk of one hot latent. Chunks past the last do nothing."""
    c = tl.program_id(0)
    if c < tl.load(hot_starts_ptr + L):
        latent = tl.load(chunk_latents_ptr + c)
        start = tl.load(starts_ptr + latent) + (c - tl.load(hot_starts_ptr + latent)) * SIZE
        stop = tl.minimum(start + SIZE, tl.load(starts_ptr + latent + 1))
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = sum_rows(rows_ptr, tokens_ptr, weights_ptr, start, stop, cols, cols < D, D, BLOCK_P, BLOCK_D)
        tl.store(chunks_ptr + c.to(tl.int64) * D + cols, total, mask=cols < D)


@triton.jit
def row_sums(
    rows_ptr, tokens_ptr, weights_ptr, starts_ptr, hot_starts_ptr, chunks_ptr, out_ptr, D,
    HOT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row l of out [L, D]: the weighted sum over latent l's pairs."""
    latent = tl.program_id(0)
    start, stop = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    if HOT:
        first, last = tl.load(hot_starts_ptr + latent), tl.load(hot_starts_ptr + latent + 1)
        total = sum_chunks(chunks_ptr, first, last, cols, mask, D, BLOCK_D)
        stop = tl.where(last > first, start, stop)
        total += sum_rows(rows_ptr, tokens_ptr, weights_ptr, start, stop, cols, mask, D, BLOCK_P, BLOCK_D)
    else:
        total = sum_rows(rows_ptr, tokens_ptr, weights_ptr, start, stop, cols, mask, D, BLOCK_P, BLOCK_D)
    tl.store(out_ptr + latent.to(tl.int64) * D + cols, total, mask=mask)


@triton.jit
def scalar_sums(a_ptr, b_ptr, starts_ptr, sums_ptr, product_sums_ptr, BOTH: tl.constexpr, BLOCK_P: tl.constexpr):
    """sums[l] = the sum of a over latent l's pairs; with BOTH also product_sums[l], that of a * b."""
    latent = tl.program_id(0)
    start, stop = tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1)
    total = tl.zeros([BLOCK_P], tl.float32)
    product = tl.zeros([BLOCK_P], tl.float32)
    for first in range(start, stop, BLOCK_P):
        pair = first + tl.arange(0, BLOCK_P)
        x = tl.load(a_ptr + pair, mask=pair < stop, other=0.0)
        total += x
        if BOTH:
            product += x * tl.load(b_ptr + pair, mask=pair < stop, other=0.0)
    tl.store(sums_ptr + latent, tl.sum(total))
    if BOTH:
        tl.store(product_sums_ptr + latent, tl.sum(product))


@triton.jit
def vector_matrix_parts(
    v_ptr, w_ptr, parts_ptr, L, D, ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Row i of parts: `sum_l v[l] W[l]` over the i-th ROWS latents."""
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    start = tl.program_id(0) * ROWS
    for first in range(start, tl.minimum(start + ROWS, L), BLOCK_L):
        latent = first + tl.arange(0, BLOCK_L)
        there = latent < L
        x = tl.load(v_ptr + latent, mask=there, other=0.0)
        both = there[:, None] & (cols < D)[None, :]
        w = tl.load(w_ptr + latent.to(tl.int64)[:, None] * D + cols[None, :], mask=both, other=0.0).to(tl.float32)
        total += tl.sum(x[:, None] * w, axis=0)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + cols, total, mask=cols < D)


def width_block(D: int, largest: int = 512) -> int:
    """Columns of a tile: the power of two from 128 to `largest` that leaves the fewest lanes idle, larger ones first.

    >>> width_block(2304), width_block(768), width_block(4096), width_block(7)
    (256, 256, 512, 128)
    """
    sizes = [size for size in (512, 256, 128) if size <= largest]
    return min(sizes, key=lambda size: -(-D // size) * size)


def _most_chunks(indices: Tensor) -> int:
    """Rows of the table of chunks: enough for any code of this shape."""
    n_pairs = indices.shape[0] * indices.shape[1]
    return 2 * n_pairs // CHUNK if n_pairs > CHUNK else 0


class LatentOrder:
    """The N*K (token, latent) pairs sorted by latent: one sort a step, shared by every gradient.

    indices [N, K]; pairs that `active` [N, K] bool leaves out have no latent and stand last. `latents` and `tokens`
    [P] list the sorted pairs, `pairs` [P] their places in the flattened code, `starts` [L + 1] where each latent's run
    begins. Latent l's chunks are rows `hot_starts[l]` to `hot_starts[l + 1] - 1` of a table of chunks, none where the
    latent has no more than CHUNK pairs; `chunk_latents` [C] says whose a chunk is.
    """

    def __init__(self, indices: Tensor, n_latents: int, active: Tensor | None = None):
        keys = indices.int()
        if active is not None:
            keys = torch.where(active, keys, n_latents)
        self.indices, self.n_latents = indices, n_latents
        self.latents, self.pairs = torch.sort(keys.reshape(-1), stable=True)
        self.tokens = torch.div(self.pairs, indices.shape[1], rounding_mode="floor").int()
        every = torch.arange(n_latents + 1, dtype=torch.int32, device=indices.device)
        self.starts = torch.searchsorted(self.latents, every, out_int32=True)
        counts = self.starts.diff()
        n_chunks = torch.where(counts > CHUNK, (counts + CHUNK - 1) // CHUNK, torch.zeros_like(counts))
        self.hot_starts = torch.cat([self.starts.new_zeros(1), n_chunks.cumsum(0, dtype=torch.int32)])
        # A hot latent with n pairs has fewer than 2 n / CHUNK chunks, so this table is large enough for any code.
        places = torch.arange(_most_chunks(indices), dtype=torch.int32, device=indices.device)
        owner = torch.searchsorted(self.hot_starts[1:], places, right=True, out_int32=True)
        self.chunk_latents = owner.clamp_max_(n_latents - 1)

    @property
    def tensors(self) -> list[Tensor]:
        """What the sort made; with the indices it is all there is to the object."""
        return [self.latents, self.pairs, self.tokens, self.starts, self.hot_starts, self.chunk_latents]

    @classmethod
    def of(cls, indices: Tensor, n_latents: int, tensors: list[Tensor]) -> "LatentOrder":
        """The order of indices [N, K] whose `tensors` these are, without another sort."""
        order = cls.__new__(cls)
        order.indices, order.n_latents = indices, n_latents
        order.latents, order.pairs, order.tokens, order.starts, order.hot_starts, order.chunk_latents = tensors
        return order

    @staticmethod
    def shapes(indices: Tensor, n_latents: int) -> list[Tensor]:
        """Empty tensors like `tensors`."""
        P = indices.shape[0] * indices.shape[1]
        sizes = (P, P, P, n_latents + 1, n_latents + 1, _most_chunks(indices))
        kinds = [torch.int64 if i == 1 else torch.int32 for i in range(6)]
        return [indices.new_empty(size, dtype=kind) for size, kind in zip(sizes, kinds)]

    def sorted(self, per_pair: Tensor) -> Tensor:
        """Numbers [N, K] in the order of the sorted pairs, fp32 [P]."""
        return per_pair.reshape(-1)[self.pairs].float()

    def chunk_table(self, weights: Tensor, rows: Tensor) -> Tensor:
        """The sums over the chunks of hot latents: sorted weights [P], rows [N, D] -> [C, D] fp32."""
        D, C = rows.shape[1], len(self.chunk_latents)
        chunks = torch.empty(C, D, device=rows.device)
        if C:
            block = width_block(D)
            chunk_sums[(C, triton.cdiv(D, block))](
                rows_ptr=rows, tokens_ptr=self.tokens, weights_ptr=weights, starts_ptr=self.starts,
                hot_starts_ptr=self.hot_starts, chunk_latents_ptr=self.chunk_latents, chunks_ptr=chunks,
                L=self.n_latents, D=D, SIZE=CHUNK, BLOCK_P=PAIRS, BLOCK_D=block, num_warps=4,
            )  # fmt: skip
        return chunks

    def scatter_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """See `reference.scatter_rows`: weights [N, K], rows [N, D] -> [L, D] fp32."""
        rows, weights = rows.contiguous(), self.sorted(weights)
        D = rows.shape[1]
        out = torch.empty(self.n_latents, D, device=rows.device)
        chunks, block = self.chunk_table(weights, rows), width_block(D)
        row_sums[(self.n_latents, triton.cdiv(D, block))](
            rows_ptr=rows, tokens_ptr=self.tokens, weights_ptr=weights, starts_ptr=self.starts,
            hot_starts_ptr=self.hot_starts, chunks_ptr=chunks, out_ptr=out, D=D,
            HOT=len(chunks) > 0, BLOCK_P=PAIRS, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
        return out

    def scatter(self, weights: Tensor) -> Tensor:
        """`out[l]` = the sum of weights [N, K] over the pairs of latent l -> [L] fp32."""
        return self.scatter_sorted(self.sorted(weights))[0]

    def scatter_sorted(self, a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sums over each latent's pairs of a [P], and of a * b: [L] and [L] (the first again where b is None)."""
        sums = torch.empty(self.n_latents, device=a.device)
        products = sums if b is None else torch.empty_like(sums)
        scalar_sums[(self.n_latents,)](
            a_ptr=a, b_ptr=a if b is None else b, starts_ptr=self.starts, sums_ptr=sums, product_sums_ptr=products,
            BOTH=b is not None, BLOCK_P=64, num_warps=1,
        )  # fmt: skip
        return sums, products

    def value_gradient(self, g: Tensor, W_dec: Tensor) -> Tensor:
        """See `reference.value_gradient`: g [N, D], W_dec [L, D] -> [N, K] fp32; 0 for pairs that have no latent."""
        n_pairs, D = len(self.pairs), g.shape[1]
        out = torch.empty(n_pairs, device=g.device)
        pair_dots[(triton.cdiv(n_pairs, PAIRS),)](
            g_ptr=g.contiguous(), w_ptr=W_dec.contiguous(), tokens_ptr=self.tokens, latents_ptr=self.latents,
            pairs_ptr=self.pairs, out_ptr=out, n_pairs=n_pairs, L=self.n_latents, D=D, BLOCK_P=PAIRS,
            BLOCK_D=width_block(D), num_warps=4,
        )  # fmt: skip
        return out.view(len(g), -1)


def value_gradient(g: Tensor, W_dec: Tensor, indices: Tensor) -> Tensor:
    """See `reference.value_gradient`; `LatentOrder.value_gradient` saves the sort where there is one already."""
    return LatentOrder(indices, len(W_dec)).value_gradient(g, W_dec)


def bias_parts(db_enc: Tensor, W_enc: Tensor, out: Tensor | None = None) -> Tensor:
    """See `update.bias_parts`; in a fixed order of summation, written to `out` [ceil(L / PART), D] if it is given."""
    L, D = W_enc.shape
    block, n_parts = width_block(D, 256), triton.cdiv(L, PART)
    parts = torch.empty(n_parts, D, device=W_enc.device) if out is None else out
    vector_matrix_parts[(n_parts, triton.cdiv(D, block))](
        v_ptr=db_enc, w_ptr=W_enc, parts_ptr=parts, L=L, D=D, ROWS=PART, BLOCK_L=16, BLOCK_D=block, num_warps=4
    )
    return parts
