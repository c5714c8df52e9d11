"""TopK (arXiv 2406.04093): the K largest pre-activations of each token, with the AuxK loss against dead latents."""

from typing import ClassVar

import torch
from torch import Tensor

from steersman.kernels import AuxRows, choose, topk_encode
from steersman.sae.base import SAE, TrainingCode

_SMALL = 1 << 22
"""Comparisons (tokens x features x latents) up to which `encode_features` counts instead of selecting."""


class TopKSAE(SAE):
    """`f = ReLU(TopK((x - b_dec) W_enc + b_enc))` (eq. 2)."""

    activation: ClassVar[str] = "topk"

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return choose(x.device).topk_encode(x, self.W_enc.T, self.b_enc, self.cfg.k, self.encoder_bias_in)

    @torch.no_grad()
    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """See `SAE.encode_features`. A few features of a few tokens, as steering has them, need no selection: one is
        active when fewer than K pre-activations stand before it, ties to the lower index."""
        k, L = self.cfg.k, self.cfg.d_sae
        if len(x) * L * max(1, len(features)) > _SMALL:
            return super().encode_features(x, features)
        rows, _ = self._rows(x)
        rows = rows.float() if self.encoder_bias_in is None else rows.float() - self.encoder_bias_in.float()
        Z = torch.addmm(self.b_enc.float(), rows, self.W_enc.float())
        chosen = Z.index_select(1, features)
        lower = torch.arange(L, device=Z.device) < features[:, None]
        ahead = torch.where(lower, Z[:, None] >= chosen[..., None], Z[:, None] > chosen[..., None])
        return torch.where(ahead.sum(dim=-1) < k, chosen.relu(), torch.zeros_like(chosen))

    def training_code(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        rows = self.W_enc.T if W_enc is None else W_enc
        values, order = topk_encode(x, rows, self.b_enc, self.cfg.k, self.encoder_bias_in)
        return TrainingCode(values, order, None)


def auxk_loss(sae: SAE, x: Tensor, residual: Tensor, candidates: Tensor, alive: Tensor, k_aux: int) -> Tensor:
    """The squared error, summed over tokens, of the residual rebuilt from dead latents alone (app. A.2).

    x [N, D]; residual = x - x_hat [N, D], taken as a constant; candidates [A] feature ids; alive [A] is True for those
    that take no part. Only the candidates' rows of the encoder are multiplied: N*A*D work, no N x L matrix.
    """
    rows = sae.W_enc.T[candidates]
    centred = x if sae.encoder_bias_in is None else x - sae.encoder_bias_in.detach()
    Z = torch.addmm(sae.b_enc[candidates], centred, rows.T)
    Z = Z.masked_fill(alive, float("-inf"))
    values, chosen = Z.topk(min(k_aux, len(candidates)), dim=1, sorted=False)
    code = torch.zeros_like(Z).scatter(1, chosen, values.relu())
    rebuilt = code @ sae.W_dec[candidates]
    return (rebuilt - residual.detach()).square().sum()


@torch.no_grad()
def auxk_gradients(
    sae: SAE,
    W_enc: Tensor,
    W_dec: Tensor,
    centred: Tensor,
    residual: Tensor,
    candidates: Tensor,
    alive: Tensor,
    k_aux: int,
    scale: Tensor,
) -> tuple[Tensor, AuxRows]:
    """`auxk_loss`, and the gradients of `scale` times it for the candidates' rows, without autograd.

    W_enc, W_dec [L, D] and centred [N, D] are in the dtype of the products; residual [N, D] is fp32. Latents that are
    alive come back as L, which counts for nothing.
    """
    enc, dec = W_enc[candidates], W_dec[candidates]
    Z = _product(centred, enc.T) + sae.b_enc[candidates]
    Z = Z.masked_fill(alive, float("-inf"))
    values, chosen = Z.topk(min(k_aux, len(candidates)), dim=1, sorted=False)
    code = torch.zeros_like(Z).scatter(1, chosen, values.relu())
    small = code.to(centred.dtype)
    error = _product(small, dec) - residual
    g = (error * (2 * scale)).to(centred.dtype)
    d_code = _product(g, dec.T).masked_fill(code <= 0, 0.0)
    latents = torch.where(alive, sae.cfg.d_sae, candidates)
    dW_enc = _product(d_code.to(centred.dtype).T, centred)
    return error.square().sum(), AuxRows(latents, dW_enc, d_code.sum(dim=0), _product(small.T, g))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, from operands in fp32 or less."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
