"""TopK (arXiv 2406.04093): the K largest pre-activations of each token."""

import torch
from torch import Tensor

from steersman.kernels import choose, topk_encode, with_gradient
from steersman.sae.architectures.auxk import AuxKSAE
from steersman.sae.training import TrainingCode, keep_only

_SMALL = 1 << 22
"""Comparisons (tokens x features x latents) up to which `encode_features` counts instead of selecting."""


class TopKSAE(AuxKSAE):
    """`f = ReLU(TopK((x - b_dec) W_enc + b_enc))` (eq. 2). A `signed` subclass takes the K largest |z| as they are."""

    name = "topk"
    uses_k = exact_k = trainable = fused = True

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return choose(x.device).topk_encode(
            x, self.W_enc.T, self.b_enc, self.cfg.k, self.input_bias, signed=self.signed
        )

    @torch.no_grad()
    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """See `SAE.encode_features`. A few features of a few tokens, as steering has them, need no selection: one is
        active when fewer than K pre-activations stand before it, ties to the lower index."""
        k, L = self.cfg.k, self.cfg.d_sae
        if len(x) * L * max(1, len(features)) > _SMALL:
            return super().encode_features(x, features)
        rows, _ = self._rows(x)
        rows = rows.float() if self.input_bias is None else rows.float() - self.input_bias.float()
        Z = torch.addmm(self.b_enc.float(), rows, self.W_enc.float())
        chosen = Z.index_select(1, features)
        size, bar = (Z.abs(), chosen.abs()) if self.signed else (Z, chosen)
        lower = torch.arange(L, device=Z.device) < features[:, None]
        ahead = torch.where(lower, size[:, None] >= bar[..., None], size[:, None] > bar[..., None])
        code = chosen if self.signed else chosen.relu()
        return torch.where(ahead.sum(dim=-1) < k, code, torch.zeros_like(code))

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        rows, bias = (self.W_enc.T, self.input_bias) if W_enc is None else (W_enc, None)
        with torch.no_grad():
            values, order = topk_encode(x, rows, self.b_enc, self.cfg.k, bias, signed=self.signed)
            kept = self.latents.keep_topk(values.abs() if self.signed else values, self.whole_cfg.k)
            values, indices = keep_only(values, order.indices, kept)
        bias = None if bias is None else self.latents.uses(bias)
        values, order = with_gradient(x, rows, self.b_enc, bias, values, indices, signed=self.signed)
        return TrainingCode(values, order)
