"""AuxK (arXiv 2406.04093, app. A.2): dead latents learn to rebuild what the live ones leave over.

Shape letters: N tokens, L latents, D width, A candidates.
"""

import torch
from torch import Tensor

from steersman.kernels import AuxRows, gather_rows
from steersman.sae.base import SAE
from steersman.sae.fused import FusedBatch, Gradients, product
from steersman.sae.training import AuxTerm, Step, TrainingState


class AuxKSAE(SAE):
    """An SAE whose dead latents are trained by AuxK: the squared error and, while latents are dead, `aux`."""

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        code = self.encode_training(x)
        residual = target - self.decode_training(code)
        losses, logged = {"squared_error": residual.square().sum()}, {}
        if (aux := state.aux) is not None:
            loss = aux.weight * auxk_loss(self, x, residual, aux.candidates, aux.alive, aux.k, aux.width)
            losses["aux"], logged["aux"] = aux.coefficient * loss, loss.detach()
        return Step(code, losses, logged)

    @torch.no_grad()
    def fused_gradients(self, batch: FusedBatch) -> tuple[Step, Gradients]:
        weights, aux = batch.weights, batch.state.aux
        code = self.encode_training(batch.x, weights.enc_rows)
        residual, squares, dots = batch.decoded(code, self.latents)
        losses, logged, aux_rows = {"squared_error": squares.sum()}, {}, None
        if aux is not None:
            weight = aux.weight * (aux.coefficient / batch.n_values)
            loss, aux_rows = auxk_gradients(self, weights.enc_rows, weights.dec_rows, batch.x, residual, aux, weight)
            logged["aux"] = aux.weight * loss
            losses["aux"] = aux.coefficient * logged["aux"]
        return Step(code, losses, logged), Gradients(residual, -2 / batch.n_values, dots, aux_rows)


def auxk_loss(
    sae: SAE, x: Tensor, residual: Tensor, candidates: Tensor, alive: Tensor, k_aux: int, width: int | None = None
) -> Tensor:
    """The squared error, summed over tokens, of the residual rebuilt from dead latents alone (app. A.2).

    x [N, D]; residual = x - x_hat [N, D], taken as a constant; candidates [A] feature ids; alive [A] is True for those
    that take no part; width as in `AuxTerm`. Only the candidates' rows of the encoder are multiplied: N*A*D work, no
    N x L matrix.
    """
    code = auxk_code(sae, x, candidates, alive, k_aux, width)
    rebuilt = sae.latents.sum(code @ gather_rows(sae.W_dec, candidates))
    return (rebuilt - residual.detach()).square().sum()


def auxk_code(
    sae: SAE,
    x: Tensor,
    candidates: Tensor,
    alive: Tensor,
    k: int,
    width: int | None,
    rows: Tensor | None = None,
) -> Tensor:
    """The activations [N, A] of the dead latents among the candidates [A] that a token uses, 0 elsewhere. With the
    candidates' encoder `rows` [A, D] in the dtype of the products, x is what they multiply, and nothing has gradients.
    """
    if rows is None:
        centred = x if sae.input_bias is None else x - sae.input_bias.detach()
        Z = torch.addmm(sae.code_bias[candidates], centred, gather_rows(sae.W_enc, candidates, dim=1).T)
    else:
        Z = product(x, rows.T) + sae.code_bias[candidates]
    return _code(sae, Z, alive, k, width)


def _code(sae: SAE, Z: Tensor, alive: Tensor, k: int, width: int | None) -> Tensor:
    """The activations [N, A] of the dead latents that a token uses, 0 elsewhere: of pre-activations Z [N, A] the k
    largest, of a signed code those of largest magnitude."""
    if width is None and k >= Z.shape[1]:  # all of them
        return (Z if sae.signed else Z.relu()).masked_fill(alive, 0.0)
    size = (Z.abs() if sae.signed else Z).masked_fill(alive, float("-inf"))
    n = min(k if width is None else width, Z.shape[1])
    values, chosen = size.topk(n, dim=1, sorted=width is not None)
    kept = None
    if width is not None:
        proposals = torch.full((len(Z), width), float("-inf"), device=Z.device)
        proposals[:, :n] = values.detach()
        kept = sae.latents.keep_topk(proposals, k)
    values = Z.masked_fill(alive, 0.0).gather(1, chosen) if sae.signed else values.relu()
    if kept is not None:
        values = torch.where(kept[:, :n], values, torch.zeros_like(values))
    return torch.zeros_like(Z).scatter(1, chosen, values)


@torch.no_grad()
def auxk_gradients(
    sae: SAE,
    W_enc: Tensor,
    W_dec: Tensor,
    centred: Tensor,
    residual: Tensor,
    aux: AuxTerm,
    scale: Tensor,
) -> tuple[Tensor, AuxRows]:
    """`auxk_loss` of a term, and the gradients of `scale` times it for its candidates' rows, without autograd.

    W_enc, W_dec [L, D], centred and residual [N, D] are in the dtype of the products. Latents that are alive come back
    as L, which counts for nothing.
    """
    candidates, alive = aux.candidates, aux.alive
    enc, dec = W_enc[candidates], W_dec[candidates]
    code = auxk_code(sae, centred, candidates, alive, aux.k, aux.width, enc)
    small = code.to(centred.dtype)
    error = sae.latents.sum(product(small, dec)) - residual
    g = (error * (2 * scale)).to(centred.dtype)
    d_code = product(g, dec.T).masked_fill(code == 0 if sae.signed else code <= 0, 0.0)
    latents = torch.where(alive, sae.cfg.d_sae, candidates)
    dW_enc = product(d_code.to(centred.dtype).T, centred)
    return error.square().sum(), AuxRows(latents, dW_enc, d_code.sum(dim=0), product(small.T, g))
