"""Exact top-k encoding on processors with bf16 matrix units: find candidates in bf16, decide among them in fp32.

Such units (AMX) multiply bf16 matrices about eight times as fast as fp32 ones. The bf16 product Z~ proposes M > K
candidates a row; their pre-activations are computed again in fp32, and the K largest of those are the row's code if
no other latent can reach them. A latent that is no candidate has Z~ at most t, the smallest proposed value, and its
pre-activation differs from Z~ by at most

    |x - x~| max_l |w_l| + |x~| max_l |w_l - w~_l| + max_l |b_l - b~_l| + rounding of the result,

by Cauchy and Schwarz, with the norms of the rounding errors measured and not assumed. Rows whose K-th value is not
above t by more than that, and rows with ties or NaN, are left to the caller's plain path.

Shape letters: N tokens, L latents, D width, K active latents a token, M candidates of a token, C rows of a block.
"""

import functools
import math

import torch
from torch import Tensor

_BLOCK_BYTES = 8 << 20
"""Of pre-activations held at a time: they stay in the cache between product and selection."""


@functools.cache
def has_matrix_units() -> bool:
    """Whether this processor multiplies bf16 matrices in units of their own, and PyTorch uses them."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported() and torch.backends.mkldnn.is_available())


def worthwhile(x: Tensor, W_enc: Tensor, k: int) -> bool:
    """Whether screening is the faster way for x [N, D] and W_enc [L, D] on the CPU: enough rows to pay for rounding
    the weights, enough latents for the product to be most of the work."""
    N, L = len(x), len(W_enc)
    return has_matrix_units() and N >= 256 and L >= 2048 and x.shape[1] >= 64 and 8 * n_candidates(k) <= L


def n_candidates(k: int) -> int:
    """How many candidates a row proposes: more cost time, fewer leave more rows to the plain path."""
    return k + max(16, 3 * k // 4)


def screened_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest of `x W_enc^T + b_enc` for each row that allows it.

    Args:
        x: [N, D] fp32, already centred. W_enc: [L, D] fp32. b_enc: [L] fp32.

    Returns:
        values [N, K] fp32 before the ReLU and indices [N, K] int64, largest first, and `open` [N] bool: the rows that
        are not proven and must be computed in another way.
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
        proposed[start:stop], smallest[start:stop] = _propose(block, M)
    exact = _row_products(x, W_enc, proposed).add_(b_enc[proposed])
    values, chosen = exact.topk(k + 1, dim=1)
    bound = smallest + _largest_error(x, x16, W_enc, W16, b_enc, b16, smallest)
    distinct = (values[:, :-1] > values[:, 1:]).all(dim=1)  # false for NaN
    proven = distinct & (values[:, k - 1] > bound)
    return values[:, :k], proposed.gather(1, chosen[:, :k]), ~proven


def _propose(Z: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Columns [C, M] of M largest values of each row of Z [C, L] bf16, and the smallest of those values [C] fp32.

    By way of the maxima of groups, as in `torch_ops`: the M largest lie in the M groups of the largest maxima.
    """
    C, L = Z.shape
    G = 1 << max(2, round(math.log2(math.sqrt(L / M))))
    n_groups = L // G
    maxima = Z[:, : n_groups * G].view(C, G, n_groups).amax(dim=1).float()
    groups = maxima.topk(M, dim=1, sorted=False).indices
    candidates = (groups[:, :, None] + torch.arange(G) * n_groups).view(C, M * G)
    if n_groups * G < L:
        candidates = torch.cat([candidates, torch.arange(n_groups * G, L).expand(C, -1)], dim=1)
    values, chosen = Z.gather(1, candidates).float().topk(M, dim=1, sorted=False)
    return candidates.gather(1, chosen), values.amin(dim=1)


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
    from_operands = rounding * largest_row + norm * largest_rounding + (b_enc - b16.float()).abs().max()
    # bf16 keeps 8 bits: the product and the sum with the bias are each rounded by at most 2^-9. fp32 sums of D terms
    # are off by at most D 2^-24 of the sum of the terms' sizes, here and in the exact products.
    from_results = 1.01 * 2.0**-8 * (smallest.abs() + b16.float().abs().max())
    return from_operands + from_results + 2.0**-22 * x.shape[1] * norm * largest_row


def _row_products(x: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """`out[n, m] = x[n] . W[indices[n, m]]` [N, M] fp32, with no N x M x D tensor."""
    N, M = indices.shape
    bag_of = torch.arange(N).repeat_interleave(M)
    # The gradient of an embedding bag's weights is this product.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), W.contiguous(), indices.reshape(-1), torch.arange(0, N * M, M), bag_of, 0
    )
    return products.view(N, M)
