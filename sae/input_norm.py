"""Normalisations of each token that are undone after decoding.

`layer_norm`: `(x - mean) / (std + 1e-5)` with the unbiased standard deviation, undone as `y std + mean`
(OpenAI sparse_autoencoder's `LN`, SAELens). `constant_norm`: `x sqrt(D) / |x|`, undone as `y |x| / sqrt(D)`.

Shape letters: N tokens, D width.
"""

from typing import NamedTuple

from torch import Tensor

_EPSILON = 1e-5


class TokenNorm(NamedTuple):
    """The statistics of N tokens."""

    mean: Tensor | None
    """[N, 1]: what is subtracted first."""
    scale_in: Tensor
    """[N, 1]: what is divided by before encoding."""
    scale_out: Tensor
    """[N, 1]: what is multiplied by after decoding."""

    def apply(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, D] fp32 as the encoder reads it."""
        x = x.float()
        return (x if self.mean is None else x - self.mean) / self.scale_in

    def undo(self, y: Tensor) -> Tensor:
        """Decoded y [N, D] in the units of the input."""
        y = y * self.scale_out
        return y if self.mean is None else y + self.mean


def token_norm(kind: str, x: Tensor) -> TokenNorm:
    """The statistics of x [N, D] for a normalisation of the given kind.

    >>> import torch
    >>> token_norm("constant_norm", 3 * torch.ones(2, 4)).scale_in.flatten()
    tensor([3., 3.])
    """
    x = x.float()
    if kind == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        deviation = (x - mean).std(dim=-1, keepdim=True)
        return TokenNorm(mean, deviation + _EPSILON, deviation)
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return TokenNorm(None, scale, scale)
