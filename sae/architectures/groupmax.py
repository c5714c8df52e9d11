"""GroupMax, an option of sparsify: the latents in K groups of neighbours, and the largest of each. Inference
only."""

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig


class GroupMaxSAE(SAE):
    """`f_j = ReLU(z_j)` where z_j is the largest of its group of `d_sae / k` consecutive latents, else 0 (sparsify's
    `fused_encoder`)."""

    name = "groupmax"
    uses_k = True

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        super().check(cfg)
        if cfg.d_sae % cfg.k:
            raise SteersmanError(f"groupmax needs d_sae = {cfg.d_sae} to be a multiple of k = {cfg.k}")

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias, k = self.input_bias, self.cfg.k
        x = x.float() if bias is None else x.float() - bias.float()
        Z = torch.addmm(self.b_enc.float(), x, self.W_enc.float()).relu_()
        values, indices = Z.unflatten(1, (k, -1)).max(dim=2)
        indices += torch.arange(0, self.cfg.d_sae, self.cfg.d_sae // k, device=Z.device)
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, order).int()
