"""Baselines that learn no features: weights that stay at, or near, their random first values while the rest trains.

    decoder        W_dec stays as it began
    encoder        W_enc stays as it began, so that what each feature reads is random; biases and thresholds train
    soft_decoder   each row of W_dec keeps a cosine of at least 0.8 to its first value: a row that has moved further is
                   put onto the edge of that cone, at the point nearest to it

An SAE that has found something is better than these by far; on many measures most are not (arXiv 2602.14111, section
4.1, with its 0.8). They start from the same weights as the run without `frozen`.
"""

from typing import Literal

import torch
from torch import Tensor

Frozen = Literal["decoder", "encoder", "soft_decoder"]
SOFT_COSINE = 0.8
"""The least cosine of a softly frozen row to its first value."""


class Held:
    """What of the parameters stays: made of them as they begin, before a checkpoint is read."""

    def __init__(self, frozen: Frozen | None, parameters: dict[str, Tensor]) -> None:
        self.names = {"decoder": ("W_dec",), "encoder": ("W_enc",)}.get(frozen or "", ())
        """Parameters that do not move."""
        self._start = parameters["W_dec"].detach().clone() if frozen == "soft_decoder" else None

    def without_gradient(self, parameters: dict[str, Tensor]) -> None:
        """Forget the gradients of what does not move."""
        for name in self.names:
            parameters[name].grad = None

    @torch.no_grad()
    def project(self, W_dec: Tensor) -> None:
        """Put the rows [L, D] of a softly frozen decoder back into their cones; their lengths stay."""
        if self._start is None:
            return
        tiny = torch.finfo(W_dec.dtype).tiny
        lengths = W_dec.norm(dim=1, keepdim=True)
        rows, start = W_dec / lengths.clamp_min(tiny), self._start / self._start.norm(dim=1, keepdim=True)
        cosine = (rows * start).sum(dim=1, keepdim=True)
        across = rows - cosine * start
        across /= across.norm(dim=1, keepdim=True).clamp_min(tiny)
        edge = SOFT_COSINE * start + (1 - SOFT_COSINE**2) ** 0.5 * across
        W_dec.copy_(torch.where(cosine < SOFT_COSINE, edge * lengths, W_dec))
