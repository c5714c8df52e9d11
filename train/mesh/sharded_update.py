"""How the weights move when several ranks train one SAE: the updater of `sharded.py`.

A rank of the latent axis encodes with its own latents, keeps those of its proposals that are among the K largest of all
(`selection.py`) and decodes them; the sum of these parts over the axis is the reconstruction. Its gradient is then the
same on every rank, and all that follows from it, up to the optimiser's step, concerns latents of one rank only.
Replicas sum their gradients and each updates an equal share of its latents (as ZeRO does, arXiv 1910.02054), so that
optimiser state is never held twice.

Shape letters: N tokens of a rank's batch, L latents, D width, K active latents a token, P proposals, A dead latents.
"""

from typing import Any

import torch
from torch import Tensor

from steersman.kernels import choose, sparse_decode, with_gradient
from steersman.parallel import RankGroup, Ranks
from steersman.sae import SAE, AuxTerm, BatchTopKSAE, TrainingCode
from steersman.train.mesh.selection import keep_batch_topk, keep_topk
from steersman.train.run.optim import AutogradUpdater, Learned, check_many, parameters_of
from steersman.train.run.recipe import TrainConfig


class _SumOverRanks(torch.autograd.Function):
    """Forward: the sum of every rank's part. Backward: the gradient, which all ranks have, as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: RankGroup) -> Tensor:
        return axis.all_reduce_sum_(part.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None


class _UsedByRanks(torch.autograd.Function):
    """Forward: a tensor that all ranks have. Backward: the sum of the gradients of their uses of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: RankGroup) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.all_reduce_sum_(grad_outputs[0].clone()), None


class ShardedUpdater(AutogradUpdater):
    """Autograd and Adam on this rank's latents. All ranks call its methods together.

    `k` is that of the whole SAE; `own` says where the latents that this rank updates stand among those it holds.
    """

    def __init__(self, sae: SAE, config: TrainConfig, lr: float, ranks: Ranks, own: slice):
        check_many(config)
        self.ranks, self.k = ranks, config.k
        self.parameters = parameters_of(sae)
        """What the optimiser moves: what this rank holds, or its share of that where replicas divide it."""
        if ranks.mesh.data > 1:
            views = [sae.W_enc.detach()[:, own], sae.W_dec.detach()[own], sae.b_enc.detach()[own], sae.b_dec.detach()]
            self.parameters = views
        super().__init__(sae, config, lr)
        self.aux_width: int | None = None
        """Proposals of a rank to the AuxK selection; None while so few latents are dead that all take part."""

    def moved(self) -> list[Tensor]:
        return self.parameters

    def encode(self, x: Tensor) -> TrainingCode:
        """The code of x [N, D] by this rank's latents, with gradients."""
        sae, latent = self.sae, self.ranks.latent
        W_enc, bias = sae.W_enc.T, sae.input_bias
        with torch.no_grad():
            smallest = None
            if isinstance(sae, BatchTopKSAE):
                # All that the batch selects may lie here, so this rank proposes as many as the batch selects.
                replicas = self.ranks.mesh.data
                k = min(self.k * replicas, sae.cfg.d_sae)
                values, indices, _ = choose(x.device).batch_topk_encode(x, W_enc, sae.b_enc, k, bias)
                kept, smallest = keep_batch_topk(values, len(x) * replicas * self.k, latent, self.ranks.data)
            else:
                values, indices = choose(x.device).topk_encode(x, W_enc, sae.b_enc, sae.cfg.k, bias)
                kept = keep_topk(values, self.k, latent)
            values = torch.where(kept, values, torch.zeros_like(values))
            if x.device.type == "cpu":  # rows are ordered: what is past the fullest row needs no work
                width = max(1, int(kept.sum(dim=1).max()))
                values, indices = values[:, :width].contiguous(), indices[:, :width].contiguous()
        if bias is not None:
            shared: Any = _UsedByRanks.apply(bias, latent)
            bias = shared
        values, order = with_gradient(x, W_enc, sae.b_enc, bias, values, indices)
        return TrainingCode(values, order, smallest)

    def decode(self, code: TrainingCode) -> Tensor:
        """The reconstruction [N, D] from the codes of all ranks."""
        part = sparse_decode(code.values, code.order, self.sae.W_dec)
        whole: Any = _SumOverRanks.apply(part, self.ranks.latent)
        return whole + self.sae.b_dec

    def learn(self, x: Tensor, n_values: int, aux: AuxTerm | None) -> Learned:
        code = self.encode(x)
        residual = x - self.decode(code)
        squared_error = residual.square().sum()
        aux_loss = residual.new_zeros(())
        if aux is not None:
            part = self._dead_code(x, aux) @ self.sae.W_dec[aux.candidates]
            rebuilt: Any = _SumOverRanks.apply(part, self.ranks.latent)
            aux_loss = aux.weight * (rebuilt - residual.detach()).square().sum()
        ((squared_error + self.config.aux_coefficient * aux_loss) / n_values).backward()
        return Learned(code, squared_error.detach(), aux_loss.detach())

    def _dead_code(self, x: Tensor, aux: AuxTerm) -> Tensor:
        """The code [N, A] of x [N, D] by this rank's dead latents: all of them, or those among the k largest of all."""
        sae, width = self.sae, self.aux_width
        centred = x if sae.input_bias is None else x - sae.input_bias.detach()
        Z = torch.addmm(sae.b_enc[aux.candidates], centred, sae.W_enc.T[aux.candidates].T)
        if width is None:
            return Z.relu()
        values, chosen = Z.topk(min(width, Z.shape[1]), dim=1)
        proposals = torch.full((len(Z), width), float("-inf"), device=Z.device)
        proposals[:, : values.shape[1]] = values.detach()
        kept = keep_topk(proposals, aux.k, self.ranks.latent)[:, : values.shape[1]]
        return torch.zeros_like(Z).scatter(1, chosen, torch.where(kept, values, torch.zeros_like(values)).relu())

    @torch.no_grad()
    def apply(self, lr: float) -> None:
        if self.ranks.mesh.data > 1:
            self._reduce_gradients()
        W_enc, W_dec, b_enc, b_dec = self.parameters
        if W_dec.grad is not None:
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec)
        if self.config.grad_clip is not None:
            rows = sum((_gradient(p).square().sum() for p in (W_enc, W_dec, b_enc)), W_dec.new_zeros(()))
            norm = (self.ranks.world.all_reduce_sum_(rows) + _gradient(b_dec).square().sum()).sqrt()
            for p in self.parameters:
                _gradient(p).mul_((self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if self.ranks.mesh.data > 1:
            self.share_weights()

    def _reduce_gradients(self) -> None:
        """Sum the gradients over the replicas; each keeps those of the latents it updates."""
        sae, data = self.sae, self.ranks.data
        whole = [_gradient(p) for p in parameters_of(sae)]
        self.parameters[0].grad = data.reduce_scatter_sum(whole[0].T).T
        self.parameters[1].grad = data.reduce_scatter_sum(whole[1])
        self.parameters[2].grad = data.reduce_scatter_sum(whole[2])
        self.parameters[3].grad = data.all_reduce_sum_(whole[3])
        sae.zero_grad(set_to_none=True)

    def share_weights(self) -> None:
        """Give the other replicas the rows that this rank updated. (The bias of the decoder all of them updated.)"""
        sae, gather = self.sae, self.ranks.data.all_gather_later
        W_enc, W_dec, b_enc, _ = self.parameters
        waiting = [gather(W_enc.T), gather(W_dec), gather(b_enc)]
        for whole, finish in zip((sae.W_enc.T, sae.W_dec, sae.b_enc), waiting):
            whole.copy_(finish().view_as(whole))


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
