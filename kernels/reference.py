"""What every kernel of a sparse autoencoder must compute, written in the plainest PyTorch.

These functions define the results; the fast paths in this folder are tested against them. They materialise the N x L
pre-activations and sort them, so they are for small shapes.

Shape letters: N tokens, L latents (`d_sae`), D width (`d_in`), K active latents a token.
"""

import torch
from torch import Tensor


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`(x - b_dec) W_enc^T + b_enc`: x [N, D], W_enc [L, D] latent-major, b_enc [L], b_dec [D] -> [N, L] in fp32.

    >>> pre_activations(torch.randn(5, 4), torch.randn(7, 4), torch.zeros(7)).shape
    torch.Size([5, 7])
    """
    x = x.float()
    centred = x if b_dec is None else x - b_dec.float()
    return centred @ W_enc.float().T + b_enc.float()


def centre(x: Tensor, scale: float, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`scale x - b_dec` [N, D], computed in fp32 and rounded to `dtype`: what the encoder multiplies of rows x [N, D]
    in any dtype."""
    scaled = x.float() * scale
    return (scaled if b_dec is None else scaled - b_dec.float()).to(dtype)


def active(values: Tensor, signed: bool = False) -> Tensor:
    """Which entries of a code count: the positive ones, or of a signed code those that are not 0. bool, as `values`."""
    return values != 0 if signed else values > 0


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The K largest pre-activations of each token, largest first, then ReLU (TopK: arXiv 2406.04093, eq. 2); `signed`
    takes the K of largest magnitude, with their sign and no ReLU (AbsTopK: arXiv 2510.00404).

    Equal values (magnitudes) go to the lower latent first. Selection comes before the ReLU, so a row with fewer than K
    positive pre-activations still returns K indices, and the values of the others are 0. A NaN counts as larger than
    any number.

    Returns values [N, K] fp32 and indices [N, K] int32.
    """
    Z = pre_activations(x, W_enc, b_enc, b_dec)
    indices = torch.sort(Z.abs() if signed else Z, dim=1, descending=True, stable=True).indices[:, :k]
    values = Z.gather(1, indices)
    return values if signed else values.relu(), indices.int()


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The N*K largest positive pre-activations of the whole batch (arXiv 2412.06410, sec. 3).

    Equal values go to the earlier token, then to the lower latent.

    Returns values [N, width] fp32, largest first and 0 where nothing is selected, and indices [N, width] int32, width
    the fullest row's count and at least 1; and the smallest selected value (a scalar; inf when nothing is positive),
    which training averages into the threshold that inference uses.
    """
    Z = pre_activations(x, W_enc, b_enc, b_dec).relu()
    flat = Z.flatten()
    values, order = torch.sort(flat, descending=True, stable=True)
    values, order = values[: k * len(Z)], order[: k * len(Z)]
    code = torch.zeros_like(flat).scatter_(0, order, values).view_as(Z)
    min_selected = torch.where(code > 0, code, code.new_tensor(float("inf"))).min()
    return *_largest_first(code), min_selected


def _largest_first(code: Tensor) -> tuple[Tensor, Tensor]:
    """A dense code [N, L] that is never negative as values and int32 indices [N, width], width at least 1."""
    width = max(1, int((code != 0).sum(dim=1).max()))
    values, indices = torch.sort(code, dim=1, descending=True, stable=True)
    return values[:, :width], indices[:, :width].int()


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """JumpReLU (arXiv 2407.14435, eq. 3): the pre-activation where it is above its threshold and positive, else 0.

    threshold is [L] or a scalar; returns the dense code [N, L] in fp32. A pre-activation that is NaN stays NaN.
    """
    Z = pre_activations(x, W_enc, b_enc, b_dec)
    return torch.where(threshold.float() >= Z, torch.zeros_like(Z), Z).relu()


def threshold_select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The code of `threshold_encode` as values and int32 indices [N, width], largest first, width the fullest row's
    count and at least 1. Entries that are not active have the value 0."""
    return _largest_first(threshold_encode(x, W_enc, b_enc, threshold, b_dec))


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`sum_k values[n, k] W_dec[indices[n, k]] + b_dec`: values, indices [N, K], W_dec [L, D], b_dec [D] -> [N, D]."""
    code = torch.zeros(len(values), len(W_dec), dtype=torch.float32, device=values.device)
    code.scatter_add_(1, indices.long(), values.float())
    X_hat = code @ W_dec.float()
    return X_hat if b_dec is None else X_hat + b_dec.float()


def decode_and_dots(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a training step takes from the decoder's rows of a code: x [N, D] in any dtype, the rest as in
    `sparse_decode`.

    Returns the residual `r = scale x - x_hat` [N, D] in `dtype`, each token's squared error |r|^2 [N] fp32, and
    `<r_n, W_dec[indices[n, k]]>` [N, K] fp32, 0 where the value is 0. The sums are those of r before it is rounded.
    """
    residual = x.float() * scale - sparse_decode(values, indices, W_dec, b_dec)
    dots = value_gradient(residual, W_dec, indices)
    return residual.to(dtype), residual.square().sum(dim=1), torch.where(values != 0, dots, torch.zeros_like(dots))


def value_gradient(g: Tensor, W_dec: Tensor, indices: Tensor) -> Tensor:
    """`<g_n, W_dec[indices[n, k]]>`: the gradient of the values, g [N, D], indices [N, K] -> [N, K]."""
    return (g.float() @ W_dec.float().T).gather(1, indices.long())


def scatter_rows(weights: Tensor, rows: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """`out[l] = sum over (n, k) with indices[n, k] = l of weights[n, k] rows[n]`: weights, indices [N, K], rows [N, D]
    -> [L, D]. The gradient of W_dec (weights = values, rows = g) and of W_enc (weights = dz, rows = x - b_dec)."""
    code = torch.zeros(len(weights), n_latents, dtype=torch.float32, device=weights.device)
    code.scatter_add_(1, indices.long(), weights.float())
    return code.T @ rows.float()
