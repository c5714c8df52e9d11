"""The kernels in PyTorch: the CPU's fast path, and what other devices run where no better kernel is chosen.

Same results as `reference`, without the N x L pre-activations or any N x K x D tensor in memory: the encoder works on
blocks of rows that stay in cache, and the backward sums latent by latent through PyTorch's embedding bags, which
accumulate in fp32 in a fixed order.

Shape letters: N tokens, L latents, D width, K active latents a token, C rows of a block, G columns of a group.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.kernels import cpu_select, screen

# A block of pre-activations that stays in the last-level cache between product and selection.
BLOCK_BYTES = 8 << 20
# Rows of a block: fewer make the product read the weights more often than it pays, more make the blocks narrow.
ROWS_AT_ONCE = 1024
# A dense code that is held while a sparse one is made of it.
CODE_BYTES = 256 << 20


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """See `reference.topk_encode`. Works on blocks of rows, so that memory is N*K and one block.

    On a CPU with bf16 arithmetic, bf16 products choose the candidates (see `screen`) and fp32 decides.
    """
    x = x.float() if b_dec is None else x.float() - b_dec.float()
    W_enc, b_enc = W_enc.float(), b_enc.float()
    if x.device.type == "cpu" and screen.pays_off(x, W_enc, k):
        values, indices, unproven = screen.prefiltered_topk(x, W_enc, b_enc, k, signed=signed)
        if bool(unproven.any()):
            values[unproven], rest = _plain_topk(x[unproven], W_enc, b_enc, k, signed)
            indices[unproven] = rest.long()
        indices = indices.int()
    else:
        values, indices = _plain_topk(x, W_enc, b_enc, k, signed)
    return values if signed else values.relu_(), indices


def _plain_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """The K largest pre-activations, before the ReLU, and their indices [N, K] int32, all in fp32.

    On the CPU in blocks of rows and latents; rows with NaN or many ties once more, whole.
    """
    if x.device.type != "cpu":
        return _whole_rows(x, W_enc, b_enc, k, signed, _select_branch_free)
    N, L = len(x), len(W_enc)
    parts = []
    for start in range(0, max(N, 1), ROWS_AT_ONCE):
        x_block = x[start : start + ROWS_AT_ONCE]
        C = len(x_block)
        found, width = cpu_select.Largest(C, k, signed), max(1, BLOCK_BYTES // (4 * max(1, C)))
        Z = torch.empty(C * min(width, L))
        for first in range(0, L, width):
            W, b = W_enc[first : first + width], b_enc[first : first + width]
            tile = Z[: C * len(W)].view(C, len(W))
            torch.addmm(b, x_block, W.T, out=tile)
            found.add(tile, first)
        parts.append(found.finish())
    values, indices, left = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts))
    if bool(left.any()):
        values[left], indices[left] = _whole_rows(x[left], W_enc, b_enc, k, signed, _select_by_sort)
    return values, indices


def _whole_rows(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    signed: bool,
    select: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """`_plain_topk` by a selection that sees a row's L pre-activations at once."""
    N, L = len(x), len(W_enc)
    values = torch.empty(N, k, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    rows = max(1, min(N, BLOCK_BYTES // (4 * L)))
    Z = torch.empty(rows, L, device=x.device)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        Z_block = Z[: stop - start]
        torch.addmm(b_enc, x[start:stop], W_enc.T, out=Z_block)
        values[start:stop], indices[start:stop] = select(Z_block.abs() if signed else Z_block, k)
        if signed:
            values[start:stop].copy_(Z_block.gather(1, indices[start:stop].long()))
    return values, indices


def _select_by_sort(Z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(Z, dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].int()


def _select_branch_free(Z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K largest of each row of Z [C, L] with ties to the lower index and no question asked of the host."""
    L = Z.shape[1]
    lowest = Z.topk(k, dim=1).values[:, -1:]
    above, equal = lowest < Z, lowest == Z
    missing = k - above.sum(dim=1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=1) <= missing))
    column = torch.arange(L, 0, -1, device=Z.device, dtype=torch.int32)
    indices = (keep * column).topk(k, dim=1).indices  # the kept columns, lowest index first
    values = Z.gather(1, indices)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    # A NaN compares false with everything: such a row would lose it silently, so the whole row says NaN.
    return torch.where(lowest.isnan() | Z.isnan().any(dim=1, keepdim=True), lowest.new_tensor(float("nan")), values), (
        indices.gather(1, order).int()
    )


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.batch_topk_encode`.

    Each row proposes its `width` largest values. The N*K largest of all proposals are the N*K largest of all
    pre-activations unless some row had its every proposal taken, in which case the rows propose twice as many.
    """
    N, L = len(x), len(W_enc)
    width = min(L, 4 * k)
    while True:
        proposals, indices = topk_encode(x, W_enc, b_enc, width, b_dec)
        selected = _largest_flat(proposals.flatten(), N * k).view(N, width) & (proposals > 0)
        if width == L or not bool(selected[:, -1].any()):
            break
        width = min(L, 2 * width)
    values = torch.where(selected, proposals, torch.zeros_like(proposals))
    min_selected = torch.where(selected, proposals, proposals.new_tensor(float("inf"))).min()
    # Rows are sorted, so everything past the longest row is zero and need not be decoded.
    used = max(1, int(selected.sum(dim=1).max()))
    return values[:, :used].contiguous(), indices[:, :used].contiguous(), min_selected


def _largest_flat(values: Tensor, n: int) -> Tensor:
    """Which of values [M] fp32 are the n largest, [M] bool: equal ones in their order, which is by token and then by
    latent. A NaN counts as larger than any number, and of NaNs none need be among those named."""
    if values.device.type != "cpu" or not 0 < n <= len(values):
        order = torch.sort(values, descending=True, stable=True).indices[:n]
        return torch.zeros(len(values), dtype=torch.bool, device=values.device).index_fill_(0, order, True)
    array = values.numpy()
    lowest = np.partition(array, len(array) - n)[-n]
    above, equal = array > lowest, np.flatnonzero(array == lowest)
    above[equal[: n - np.count_nonzero(above) - np.count_nonzero(np.isnan(array))]] = True
    return torch.from_numpy(above)


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """See `reference.threshold_encode`."""
    x = x.float() if b_dec is None else x.float() - b_dec.float()
    Z = torch.addmm(b_enc.float(), x, W_enc.float().T)
    return torch.where(threshold.float() >= Z, torch.zeros_like(Z), Z).relu_()


def threshold_select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.threshold_select`. Reads one number from the device. On the CPU in blocks of rows and latents."""
    if x.device.type == "cpu":
        return _select_above(x, W_enc, b_enc, threshold, b_dec)
    return largest_of_code(lambda part: threshold_encode(x[part], W_enc, b_enc, threshold, b_dec), len(x), len(W_enc))


def _select_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x.float() if b_dec is None else x.float() - b_dec.float()
    W_enc, b_enc, L = W_enc.float(), b_enc.float(), len(W_enc)
    least = threshold.float().clamp_min(0.0).expand(L)
    parts = []
    for start in range(0, max(len(x), 1), ROWS_AT_ONCE):
        x_block = x[start : start + ROWS_AT_ONCE]
        C = len(x_block)
        found, width = cpu_select.Above(C), max(1, BLOCK_BYTES // (4 * max(1, C)))
        Z = torch.empty(C * min(width, L))
        for first in range(0, L, width):
            W = W_enc[first : first + width]
            tile = Z[: C * len(W)].view(C, len(W))
            torch.addmm(b_enc[first : first + width], x_block, W.T, out=tile)
            found.add(tile, least[first : first + width], first)
        parts.append(found.finish())
    return _same_width(parts)


def largest_of_code(dense: Callable[[slice], Tensor], N: int, L: int) -> tuple[Tensor, Tensor]:
    """A dense code [N, L] as values and int32 indices [N, K], largest first, K the fullest row's count and at least 1.

    `dense` gives the code of a slice of the rows, so that no more than CODE_BYTES of it exist at a time.
    """
    rows = max(1, CODE_BYTES // (4 * L))
    return _same_width([_largest_of_block(dense(slice(start, start + rows))) for start in range(0, max(N, 1), rows)])


def _same_width(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Codes of blocks of rows, one below the other."""
    if len(parts) == 1:
        return parts[0]
    width = max(values.shape[1] for values, _ in parts)
    return (
        torch.cat([F.pad(values, (0, width - values.shape[1])) for values, _ in parts]),
        torch.cat([F.pad(indices, (0, width - indices.shape[1])) for _, indices in parts]),
    )


def _largest_of_block(code: Tensor) -> tuple[Tensor, Tensor]:
    width = max(1, int((code != 0).sum(dim=1).max())) if len(code) else 1
    values, indices = code.topk(width, dim=1)
    return values, indices.int()


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """See `reference.sparse_decode`."""
    X_hat = F.embedding_bag(indices, W_dec.float(), mode="sum", per_sample_weights=values.float())
    return X_hat if b_dec is None else X_hat.add_(b_dec.float())


def decode_and_dots(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.decode_and_dots`."""
    residual = scaled(x, scale) - sparse_decode(values, indices, W_dec, b_dec)
    dots = value_gradient(residual, W_dec, indices).masked_fill_(values == 0, 0.0)
    return residual.to(dtype), residual.square().sum(dim=1), dots


def centre(x: Tensor, scale: float, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.centre`."""
    x = scaled(x, scale)
    return (x if b_dec is None else x - b_dec).to(dtype)


def scaled(x: Tensor, scale: float) -> Tensor:
    """`scale x` in fp32; x itself where it is that already."""
    return x.float() if scale == 1 else x.float() * scale


def mark_active(values: Tensor, indices: Tensor, fired: Tensor, n_active: Tensor) -> None:
    """Count a code, values and indices [N, K], in place: fired [L] fp32 becomes larger where a latent is active (its
    value is not 0), n_active [1] fp64 grows by the number of active entries."""
    active = (values.abs() > 0).float()
    fired.scatter_add_(0, indices.flatten().long(), active.flatten())
    n_active += active.sum()


def count_silence(silent_steps: Tensor, fired: Tensor, limits: Tensor) -> Tensor:
    """Count a step, in place: silent_steps [L] int32 is 0 where fired [L] is above 0 and grows by 1 elsewhere. Returns
    how many latents have been silent for at least each of limits [M] int32 steps, [M] int32."""
    silent_steps += 1
    silent_steps.masked_fill_(fired > 0, 0)
    return (silent_steps >= limits[:, None]).sum(dim=1, dtype=torch.int32)


def value_gradient(g: Tensor, W_dec: Tensor, indices: Tensor) -> Tensor:
    """See `reference.value_gradient`."""
    N, K = indices.shape
    tokens = torch.arange(N, device=g.device).repeat_interleave(K)
    return _pair_products(g, W_dec, tokens, indices.reshape(-1).long()).view(N, K)


def _pair_products(g: Tensor, W_dec: Tensor, tokens: Tensor, latents: Tensor) -> Tensor:
    """`<g[tokens[p]], W_dec[latents[p]]>` [P] fp32, without gathering P rows."""
    # The gradient of an embedding bag's weights is this product; where the bags start is not looked at in a sum.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g.float().contiguous(), W_dec.float().contiguous(), latents, latents.new_zeros(1), tokens, 0
    )


class LatentOrder:
    """The N*K (token, latent) pairs sorted by latent: one sort a step, shared by every gradient.

    indices [N, K]. `pairs` [N*K] lists positions in the flattened code, by latent, then token; `starts` [L] is where
    each latent's run begins.
    """

    def __init__(self, indices: Tensor, n_latents: int):
        flat = indices.reshape(-1).long()
        narrow = flat.to(torch.int16) if n_latents <= 32768 else flat  # a sort of 2-byte keys is several times faster
        self.indices, self.n_latents = indices, n_latents
        self.pairs = torch.argsort(narrow, stable=True)
        self.tokens = torch.div(self.pairs, indices.shape[1], rounding_mode="floor")
        counts = torch.bincount(flat, minlength=n_latents)
        self.starts = counts.cumsum(0) - counts
        self._reading = False

    @property
    def tensors(self) -> list[Tensor]:
        """What the sort made; with the indices it is all there is to the object."""
        return [self.pairs, self.tokens, self.starts]

    @classmethod
    def of(cls, indices: Tensor, n_latents: int, tensors: list[Tensor]) -> "LatentOrder":
        """The order of indices [N, K] whose `tensors` these are, without another sort."""
        order = cls.__new__(cls)
        order.indices, order.n_latents = indices, n_latents
        order.pairs, order.tokens, order.starts = tensors
        order._reading = False
        return order

    def reading(self, rows: Tensor) -> "LatentOrder":
        """The same order where each pair reads the row of a table that rows [N, K] names, not its token's."""
        order = LatentOrder.of(self.indices, self.n_latents, [self.pairs, rows.flatten()[self.pairs], self.starts])
        order._reading = True
        return order

    @staticmethod
    def shapes(indices: Tensor, n_latents: int) -> list[Tensor]:
        """Empty tensors like `tensors`."""
        n_pairs = indices.shape[0] * indices.shape[1]
        return [indices.new_empty(n, dtype=torch.int64) for n in (n_pairs, n_pairs, n_latents)]

    def value_gradient(self, g: Tensor, W_dec: Tensor) -> Tensor:
        """See `reference.value_gradient`: g [N, D], W_dec [L, D] -> [N, K]."""
        if len(W_dec) <= len(g) and not self._reading:
            return value_gradient(g, W_dec, self.indices)
        # Pair by pair in order of the longer matrix, so that the cache holds the one that is read out of order.
        flat = self.indices.reshape(-1).long()
        dz = torch.empty(len(flat), device=g.device)
        dz[self.pairs] = _pair_products(g, W_dec, self.tokens, flat[self.pairs])
        return dz.view(self.indices.shape)

    def scatter_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """See `reference.scatter_rows`: weights [N, K], rows [N, D] -> [L, D], in a fixed order of summation."""
        by_latent = weights.reshape(-1)[self.pairs].float()
        return F.embedding_bag(
            self.tokens, rows.float().contiguous(), self.starts, mode="sum", per_sample_weights=by_latent
        )

    def scatter(self, weights: Tensor) -> Tensor:
        """`out[l]` = the sum of weights [N, K] over the pairs of latent l -> [L]."""
        return self.scatter_rows(weights, weights.new_ones(len(weights), 1)).squeeze(1)
