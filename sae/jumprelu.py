"""JumpReLU (arXiv 2407.14435): every pre-activation above its latent's threshold. Inference only."""

from typing import ClassVar

import torch
from torch import Tensor

from steersman.kernels import choose
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig


def select_above(sae: SAE, x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The code of x [N, D] by threshold (a scalar or [L]): values and indices [N, K], K the fullest row's count."""
    code = choose(x.device).threshold_encode(x, sae.W_enc.T, sae.b_enc, threshold, sae.encoder_bias_in)
    width = max(1, int((code > 0).sum(dim=1).max())) if len(code) else 1
    values, indices = code.topk(width, dim=1)
    return values, indices.int()


class JumpReLUSAE(SAE):
    """`f = z H(z - threshold)`, `z = (x - b_dec) W_enc + b_enc` (eq. 3)."""

    activation: ClassVar[str] = "jumprelu"
    threshold: Tensor

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        self.register_buffer("threshold", torch.zeros(cfg.d_sae))

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return select_above(self, x, self.threshold)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        super().fold_input_scale(scale)
        self.threshold /= scale
