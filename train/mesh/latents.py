"""An SAE whose latents lie on the ranks of a mesh: what its training step needs of the others, and what measuring and
saving it needs.

A rank of the latent group encodes with its own latents, keeps those of its proposals that are among the K largest of
all (`selection.py`) and decodes them; the sum of these parts over the group is the reconstruction. Its gradient is then
the same on every rank, and all that follows from it, up to the optimiser's step, concerns latents of one rank only.

Shape letters: N tokens, L latents, D width, K active latents a token, P proposals of a rank.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from steersman.kernels import choose
from steersman.parallel import RankGroup, Ranks
from steersman.sae import SAE, SAEConfig, SparseCode
from steersman.sae.training import Latents
from steersman.train.mesh.selection import keep_batch_topk, keep_topk

_ROWS_AT_ONCE = 4096


class _SumOverRanks(torch.autograd.Function):
    """Forward: the sum of every rank's part. Backward: the gradient, which all ranks have, as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: RankGroup) -> Tensor:
        return group.all_reduce_sum_(part.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None


class _UsedByRanks(torch.autograd.Function):
    """Forward: a tensor that all ranks have. Backward: the sum of the gradients of their uses of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_reduce_sum_(grad_outputs[0].clone()), None


class ShardedLatents(Latents):
    """The latents of the SAE `whole`, shared by the ranks of a mesh. All ranks call its methods together."""

    def __init__(self, whole: SAEConfig, ranks: Ranks) -> None:
        self.whole, self.n_replicas = whole, ranks.mesh.data
        self.first, _ = ranks.mesh.local_latents(whole.d_sae)
        self._latent, self._data = ranks.latent, ranks.data

    def uses(self, x: Tensor) -> Tensor:
        used: Any = _UsedByRanks.apply(x, self._latent)
        return used

    def sum(self, part: Tensor) -> Tensor:
        whole: Any = _SumOverRanks.apply(part, self._latent)
        return whole

    def total(self, value: Tensor) -> Tensor:
        return self.sum(value)

    def over_batch(self, value: Tensor) -> Tensor:
        summed = self._latent.all_reduce_sum_(value.detach().clone().reshape(1))
        return self._data.all_reduce_sum_(summed).reshape(value.shape)

    def keep_topk(self, values: Tensor, k: int) -> Tensor | None:
        return None if self._latent.size == 1 else keep_topk(values, k, self._latent)

    def keep_batch_topk(self, values: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        return keep_batch_topk(values, budget, self._latent, self._data)


def initial_rows(cfg: SAEConfig, seed: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows start..stop of the encoder and decoder that `SAE(cfg)` starts from, each [stop - start, its width], drawn in
    bounded memory."""
    generator, found = torch.Generator().manual_seed(seed), []
    for width in (cfg.d_in, cfg.out_width) if cfg.transcoder else (cfg.d_in,):
        parts = []
        for low in range(0, cfg.d_sae if cfg.transcoder else stop, _ROWS_AT_ONCE):
            drawn = torch.randn(min(_ROWS_AT_ONCE, cfg.d_sae - low), width, generator=generator)
            parts.append(drawn[max(start - low, 0) : max(stop - low, 0)])
        rows = torch.cat(parts)
        found.append(rows / rows.norm(dim=1, keepdim=True))
    return found[0], found[-1]


def new_sae(cfg: SAEConfig, seed: int, ranks: Ranks) -> SAE:
    """This rank's latents of the SAE that training `cfg` with `seed` starts from; all of them in a job of one rank.

    What an architecture adds to the weights must start from the same numbers for every latent and seed.
    """
    mesh = ranks.mesh
    if mesh.world_size == 1:
        return SAE(cfg, torch.Generator().manual_seed(seed))
    start, stop = mesh.local_latents(cfg.d_sae)
    groups = _groups_within(cfg.group_sizes, start, stop)
    sae = SAE(replace(cfg, d_sae=stop - start, k=min(cfg.k, stop - start), group_sizes=groups))
    encoder, decoder = initial_rows(cfg, seed, start, stop)
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_(encoder.T)
    sae.latents = ShardedLatents(cfg, ranks)
    return sae


def _groups_within(sizes: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    """How many latents of each group lie in start..stop, of the groups that have any there.

    >>> _groups_within((2, 4, 6), 4, 8)
    (2, 2)
    """
    ends = [0, *accumulate(sizes)]
    parts = [min(high, stop) - max(low, start) for low, high in pairwise(ends)]
    return tuple(part for part in parts if part > 0)


class WholeSAE:
    """An SAE whose latents lie on the ranks of a group, as far as measuring it needs one.

    All ranks of the group call its methods together, with the same rows; `local` holds this rank's latents.
    """

    def __init__(self, local: SAE, cfg: SAEConfig, group: RankGroup) -> None:
        self.local, self.cfg, self._group = local, cfg, group
        self._start = group.index * local.cfg.d_sae

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The active features of x [N, D], as `SAE.encode_sparse` of the whole gives them."""
        values, indices = self.local.encode_sparse(x)
        if not self.local.exact_k:  # each rank has as many columns as its fullest row
            width = int(self._group.all_reduce_max_(torch.tensor([values.shape[1]], device=x.device)))
            wider = (0, width - values.shape[1])
            values, indices = torch.nn.functional.pad(values, wider), torch.nn.functional.pad(indices, wider)
        values = self._group.all_gather(values).transpose(0, 1).flatten(1)
        indices = self._group.all_gather(indices + self._start).transpose(0, 1).flatten(1)
        sizes = values.abs() if self.local.signed else values
        order = torch.sort(sizes, dim=1, descending=True, stable=True).indices
        if self.local.exact_k:
            order = order[:, : self.cfg.k]
        return SparseCode(values.gather(1, order), indices.gather(1, order))

    @torch.no_grad()
    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """The reconstruction [N, D] of a code, as `SAE.decode_sparse` of the whole gives it."""
        local = indices - self._start
        here = (local >= 0) & (local < self.local.cfg.d_sae)
        values = torch.where(here, values, torch.zeros_like(values))
        local = torch.where(here, local, torch.zeros_like(local))
        part = choose(values.device).sparse_decode(values, local, self.local.W_dec)
        return self._group.all_reduce_sum_(part) + self.local.b_dec

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, SparseCode]:
        """The reconstruction [N, D_out] of x [N, D] and its code, as `SAE.reconstruct` of the whole gives them."""
        code = self.encode_sparse(x)
        y = self.decode_sparse(code.values, code.indices)
        return y + self.local.skip(x) if self.cfg.skip_connection else y, code

    @torch.no_grad()
    def collect(self, here: bool) -> SAE | None:
        """The whole SAE on the CPU of the rank that says `here`; None on the others."""
        whole, n = SAE(self.cfg) if here else None, self.local.cfg.d_sae
        targets: Mapping[str, Tensor] = {} if whole is None else whole.state_dict()
        for name, mine in self.local.state_dict().items():
            dim = self.local.latent_dim(name)
            if dim is None:
                if name in targets:
                    targets[name].copy_(mine)
                continue
            mine = mine.movedim(dim, 0)
            for low in range(0, n, _ROWS_AT_ONCE):
                parts = self._group.all_gather(mine[low : low + _ROWS_AT_ONCE])
                if name in targets:
                    of_whole = targets[name].movedim(dim, 0)
                    for rank, rows in enumerate(parts):
                        start = rank * n + low
                        of_whole[start : start + len(rows)] = rows.cpu()
        return whole
