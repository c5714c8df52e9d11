"""Exact top-k encoding on processors with bf16 arithmetic: find candidates in bf16, decide among them in fp32.

AMX multiplies bf16 matrices about eight times as fast as fp32 ones, AVX-512 BF16 twice. The bf16 product Z~ proposes
M > K candidates a row; their pre-activations are computed again in fp32, and the K largest of those are the row's code
if no other latent can reach them. A latent that is no candidate has Z~ at most t, the smallest proposed value, and its
pre-activation differs from Z~ by at most

    |x - x~| max_l |w_l| + |x~| max_l |w_l - w~_l| + max_l |b_l - b~_l| + rounding of the result,

by Cauchy and Schwarz, with the norms of the rounding errors measured and not assumed. Rows whose K-th value is not
above t by more than that, and rows with ties or NaN, are left to the caller's plain path. For a signed code the same
holds of magnitudes: |z| differs from |Z~| by no more than z from Z~.

Shape letters: N tokens, L latents, D width, K active latents a token, M candidates of a token, C rows of a block.
"""

import functools
import math

import torch
from torch import Tensor

_BLOCK_BYTES = 8 << 20
"""Of pre-activations held at a time: they stay in the cache between product and selection."""
_SHORT = 512
"""Keys of a row that are partitioned at once."""


@functools.cache
def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices with instructions of their own, and PyTorch uses them."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    supported = (getattr(torch.cpu, name, None) for name in names)
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in supported)


def pays_off(x: Tensor, W_enc: Tensor, k: int) -> bool:
    """Whether screening is the faster way for x [N, D] and W_enc [L, D] on the CPU: enough rows to pay for rounding
    the weights, enough latents for the product to be most of the work."""
    N, L = len(x), len(W_enc)
    if L * n_candidates(k) > 1 << 30:  # more groups, or candidates, than `_keys` can number
        return False
    return has_fast_bf16() and N >= 256 and L >= 2048 and x.shape[1] >= 64 and 8 * n_candidates(k) <= L


def n_candidates(k: int) -> int:
    """How many candidates a row proposes: more cost time, fewer leave more rows to the plain path."""
    return k + max(16, 3 * k // 4)


def prefiltered_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, signed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest of `x W_enc^T + b_enc` for each row that allows it; with `signed`, the K of largest magnitude.

    Args:
        x: [N, D] fp32, already centred. W_enc: [L, D] fp32. b_enc: [L] fp32.

    Returns:
        values [N, K] fp32 before the ReLU and indices [N, K] int64, largest first, and `unproven` [N] bool: the rows
        that are not proven and must be computed in another way.
    """
    N, L, M = len(x), len(W_enc), n_candidates(k)
    x16, W16, b16 = x.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16()
    proposed = torch.empty(N, M, dtype=torch.int64)
    smallest = torch.empty(N)
    rows = max(1, min(N, _BLOCK_BYTES // (2 * L)))
    Z = torch.empty(rows, L, dtype=torch.bfloat16)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        block = Z[: stop - start]
        torch.addmm(b16, x16[start:stop], W16.T, out=block)
        if signed:
            block.abs_()
        proposed[start:stop], smallest[start:stop] = _propose(block, M)
    exact = _row_products(x, W_enc, proposed).add_(b_enc[proposed])
    values, chosen = (exact.abs() if signed else exact).topk(k + 1, dim=1)
    bound = smallest + _largest_error(x, x16, W_enc, W16, b_enc, b16, smallest)
    distinct = (values[:, :-1] > values[:, 1:]).all(dim=1)  # false for NaN
    proven = distinct & (values[:, k - 1] > bound)
    values, chosen = values[:, :k], chosen[:, :k]
    if signed:
        values = values.copysign(exact.gather(1, chosen))
    return values, proposed.gather(1, chosen), ~proven


def _propose(Z: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Columns [C, M] of M largest values of each row of Z [C, L] bf16, and the smallest of those values [C] fp32.

    By way of the maxima of groups, as in `torch_ops`: the M largest lie in the M groups of the largest maxima.
    """
    C, L = Z.shape
    G = 1 << max(2, round(math.log2(math.sqrt(L / M))))
    n_groups = L // G
    maxima = Z[:, : n_groups * G].view(C, G, n_groups).amax(dim=1)
    groups = (_largest_keys(_keys(maxima), M) & 0xFFFF).long()
    candidates = (groups[:, :, None] + torch.arange(G) * n_groups).view(C, M * G)
    if n_groups * G < L:
        candidates = torch.cat([candidates, torch.arange(n_groups * G, L).expand(C, -1)], dim=1)
    keys = _largest_keys(_keys(Z.gather(1, candidates)), M)
    columns = candidates.gather(1, (keys & 0xFFFF).long())
    return columns, _ordered((keys.amin(dim=1) >> 16).short()).view(torch.bfloat16).float()


def _ordered(bits: Tensor) -> Tensor:
    """The bits of bf16 numbers as int16 that compare as the numbers do, and back. A NaN lies beyond the infinities."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def _keys(values: Tensor) -> Tensor:
    """int32 keys [C, n] of values [C, n] bf16, n at most 65536: in order of value, the column in the lower half."""
    keys = torch.empty(*values.shape, 2, dtype=torch.int16)  # the lower half comes first on the processors meant here
    keys[:, :, 0] = torch.arange(values.shape[1], dtype=torch.int32).short()
    keys[:, :, 1] = _ordered(values.view(torch.int16))
    return keys.view(torch.int32).squeeze(2)


def _largest_keys(keys: Tensor, M: int) -> Tensor:
    """The M largest of each row of keys [C, n] int32, in no order; overwrites them.

    NumPy partitions short rows within vector registers, several times faster than `topk`, so long ones are cut up.
    """
    C, n = keys.shape
    while n > _SHORT and 2 * M <= _SHORT:
        n_parts = -(-n // _SHORT)
        width = -(-n // n_parts)
        if n_parts * width > n:
            keys = torch.nn.functional.pad(keys, (0, n_parts * width - n), value=torch.iinfo(torch.int32).min)
        keys = _largest_keys(keys.view(C * n_parts, width), M).reshape(C, n_parts * M)
        n = keys.shape[1]
    if n > _SHORT:
        return keys.topk(M, dim=1, sorted=False).values
    if n > M:
        keys.numpy().partition(n - M, axis=1)
    return keys[:, n - M :]


def _largest_error(
    x: Tensor, x16: Tensor, W_enc: Tensor, W16: Tensor, b_enc: Tensor, b16: Tensor, smallest: Tensor
) -> Tensor:
    """How far above its bf16 value any latent's pre-activation can be, for latents not above `smallest` -> [N]."""
    # In parts that stay in the cache.
    largest_row = torch.stack([part.square().sum(dim=1).max() for part in W_enc.split(1024)]).max().sqrt()
    parts = zip(W_enc.split(1024), W16.split(1024))
    largest_rounding = torch.stack([(w - w16.float()).square_().sum(dim=1).max() for w, w16 in parts]).max().sqrt()
    norm = torch.linalg.vector_norm(x16.float(), dim=1)
    rounding = torch.linalg.vector_norm(x - x16.float(), dim=1)
    size = norm * largest_row
    from_operands = rounding * largest_row + norm * largest_rounding + (b_enc - b16.float()).abs().max()
    # bf16 keeps 8 bits: the product and the sum with the bias are each rounded by at most 2^-9. fp32 sums of D terms
    # are off by at most D 2^-24 of the sum of the terms' sizes, here and in the exact products.
    from_results = 1.01 * 2.0**-8 * (smallest.abs() + b16.float().abs().max())
    bound = from_operands + from_results + 2.0**-22 * x.shape[1] * size
    return torch.where(size < 1e37, bound, float("inf"))  # NaN, and sums that may have overflowed: nothing is known


def _row_products(x: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """`out[n, m] = x[n] . W[indices[n, m]]` [N, M] fp32, with no N x M x D tensor."""
    N, M = indices.shape
    bag_of = torch.arange(N).repeat_interleave(M)
    # The gradient of an embedding bag's weights is this product.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), W.contiguous(), indices.reshape(-1), torch.arange(0, N * M, M), bag_of, 0
    )
    return products.view(N, M)
