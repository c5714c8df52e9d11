"""JumpReLU (arXiv 2407.14435): every pre-activation above its latent's threshold. Inference only."""

import torch
from torch import Tensor

from steersman.kernels import choose
from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen
from steersman.sae.config import SAEConfig


class JumpReLUSAE(ElementwiseSAE):
    """`f = z H(z - threshold)`, `z = (x - b_dec) W_enc + b_enc` (eq. 3)."""

    name = "jumprelu"
    threshold: Tensor

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        self.register_buffer("threshold", torch.zeros(cfg.d_sae))

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        return choose(rows.device).threshold_encode(
            rows,
            self._encoder(features),
            chosen(self.b_enc, features),
            chosen(self.threshold, features),
            self.input_bias,
        )

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return choose(x.device).threshold_select(x, self.W_enc.T, self.b_enc, self.threshold, self.input_bias)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        super().fold_input_scale(scale)
        self.threshold /= scale
