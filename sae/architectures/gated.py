"""Gated SAEs (arXiv 2404.16014): one path decides which latents are active, another how strongly. Inference only."""

import torch
from torch import Tensor, nn

from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen
from steersman.sae.config import SAEConfig


class GatedSAE(ElementwiseSAE):
    """`f = H(p + b_gate) ReLU(exp(r_mag) p + b_mag)`, `p = (x - b_dec) W_enc` (eq. 6 with the weight sharing of eq. 7).

    `b_enc` is None: there are two encoder biases.
    """

    name = "gated"

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        del self.b_enc
        self.register_parameter("b_enc", None)
        self.b_gate = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(cfg.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(cfg.d_sae))

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        x, bias = rows.float(), self.input_bias
        p = (x if bias is None else x - bias.float()) @ self._encoder(features).float().T
        magnitude = p * chosen(self.r_mag, features).float().exp() + chosen(self.b_mag, features).float()
        return torch.where(p + chosen(self.b_gate, features).float() > 0, magnitude.relu(), torch.zeros_like(p))

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        for bias in (self.b_gate, self.b_mag, self.b_dec):
            bias /= scale
