"""A trainer that is one rank of many: `Trainer` on this rank's latents and rows.

What differs from one process is here, in `sharded_update.py` (the gradients and the step) and in `selection.py` (which
latents are active). Everything else is the code of one process.

Shape letters: L latents, D width, A dead latents of a rank.
"""

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from torch import Tensor

from steersman.parallel import Ranks
from steersman.sae import SAE, AuxTerm, SAEConfig
from steersman.train.mesh.selection import keep_topk
from steersman.train.mesh.sharded_update import ShardedUpdater
from steersman.train.run.checkpoints import latent_axis
from steersman.train.run.recipe import Recipe, TrainConfig, training_batches
from steersman.train.run.trainer import Trainer, longest_silent
from steersman.train.store.batch import ActivationSource
from steersman.train.store.statistics import ActivationStats

_DRAWN_ROWS = 4096


def initial_rows(cfg: SAEConfig, seed: int, start: int, stop: int) -> Tensor:
    """Rows start..stop of the decoder that `SAE(cfg)` starts from, [stop - start, D], drawn in bounded memory."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for low in range(0, stop, _DRAWN_ROWS):
        drawn = torch.randn(min(_DRAWN_ROWS, cfg.d_sae - low), cfg.d_in, generator=generator)
        parts.append(drawn[max(start - low, 0) : stop - low])
    rows = torch.cat(parts)
    return rows / rows.norm(dim=1, keepdim=True)


class ShardedTrainer(Trainer):
    """The part of one SAE in training that a rank of a mesh does. All ranks call its methods together."""

    updater: ShardedUpdater  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, config: TrainConfig, recipe: Recipe, stats: ActivationStats, cfg: SAEConfig, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self.n_replicas = ranks.mesh.data
        self._dead: Callable[[], list[int]] | None = None
        super().__init__(config, recipe, stats, cfg)

    @property
    def held(self) -> tuple[int, int]:
        return self.ranks.mesh.local_latents(self.cfg.d_sae)

    @property
    def owned(self) -> tuple[int, int]:
        return self.ranks.mesh.owned_latents(self.cfg.d_sae)

    @property
    def _own(self) -> slice:
        """Where the latents that this rank updates stand among those it holds."""
        return slice(self.owned[0] - self.held[0], self.owned[1] - self.held[0])

    def _new_sae(self, cfg: SAEConfig) -> SAE:
        start, stop = self.held
        local = SAE(replace(cfg, d_sae=stop - start, k=min(cfg.k, stop - start)))
        with torch.no_grad():
            rows = initial_rows(cfg, self.config.seed, start, stop)
            local.W_dec.copy_(rows)
            local.W_enc.copy_(rows.T)
        return local

    def _new_updater(self) -> ShardedUpdater:
        return ShardedUpdater(self.sae, self.config, self.recipe.lr, self.ranks, self._own)

    def batches(self, source: ActivationSource) -> Generator[Tensor]:
        """The rows of this rank's replica. Each of its ranks reads a part, and while one batch is trained on they
        exchange the next."""
        mesh, latent = self.ranks.mesh, self.ranks.latent
        share = {"rank": mesh.rank, "world_size": mesh.world_size}
        ready: Callable[[], Tensor] | None = None
        for batch in training_batches(source, self.config, self.recipe, self.n_steps_done, **share):
            following = latent.all_gather_later(batch.x.to(self.device, non_blocking=True))
            if ready is not None:
                yield ready().flatten(0, 1)
            ready = following

    @property
    def parameters(self) -> list[Tensor]:
        return self.updater.parameters

    def _rebuild(self, x: Tensor) -> Tensor:
        return self.updater.decode(self.updater.encode(x))

    def _total(self, sums: Tensor) -> Tensor:
        return self.ranks.data.all_reduce_sum_(sums)

    # Dead latents

    def _count_silence(self, fired: Tensor) -> None:
        super()._count_silence(self.ranks.data.all_reduce_max_((fired > 0).to(torch.uint8)))
        self._dead = self._count_dead()

    def _count_dead(self) -> Callable[[], list[int]]:
        """How many latents of each rank of the latent axis are dead. Begun when a step ends and read in the next one,
        so that the host waits for the step before and not for the one it is queueing."""
        dead = (self.silent_steps >= self.recipe.dead_after_steps).sum(dtype=torch.int32)
        counts = self.ranks.latent.all_gather(dead[None]).flatten()
        if counts.device.type != "cuda":
            return counts.tolist
        here = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True).copy_(counts, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[int]:
            copied.synchronize()
            return here.tolist()

        return read

    def _aux_term(self) -> AuxTerm | None:
        """As in `Trainer`, with this rank's candidates: all of them dead, so that none must be left out later."""
        k_aux, latent = self.recipe.k_aux, self.ranks.latent
        if not self.config.aux_coefficient:
            return None
        self._dead = self._dead or self._count_dead()
        counts = self._dead()
        if not sum(counts):
            return None
        n_candidates = min(self.cfg.d_sae, max(4 * k_aux, 64))
        candidates = longest_silent(self.silent_steps, min(counts[latent.index], n_candidates))
        if sum(counts) > n_candidates:
            silence = torch.full((1, min(max(counts), n_candidates)), -1.0, dtype=torch.float64, device=self.device)
            silence[0, : len(candidates)] = self.silent_steps[candidates].double()
            candidates = candidates[keep_topk(silence, n_candidates, latent)[0, : len(candidates)]]
        self.updater.aux_width = min(k_aux, max(counts)) if sum(counts) > k_aux else None
        weight = torch.tensor(min(sum(counts) / k_aux, 1.0), device=self.device)
        alive = torch.zeros_like(candidates, dtype=torch.bool)
        return AuxTerm(candidates, alive, weight, k_aux, self.config.aux_coefficient)

    # What is read

    def read_metrics(self, n_tokens: int) -> dict[str, float]:
        self.sums.copy_(self.summed())
        dead = (self.silent_steps >= self.recipe.dead_after_steps).double().mean()
        share = float(self.ranks.latent.all_reduce_sum_(dead)) / self.ranks.mesh.latent
        return super().read_metrics(n_tokens) | {"dead_share": share}

    def summed(self) -> Tensor:
        """`sums` over all ranks: errors are those of a replica's rows, active features those of a rank's latents."""
        sums = self.ranks.data.all_reduce_sum_(self.sums.clone())
        sums[2:] = self.ranks.latent.all_reduce_sum_(sums[2:].clone())
        return sums

    def state(self) -> dict[str, Tensor]:
        """Of what belongs to latents, the part that this rank updates; the rest on the first rank alone."""
        own = {}
        for name, tensor in (super().state() | {"sums": self.summed()}).items():
            of_held = name.startswith(("sae.", "silent"))
            low, high = self.held if of_held else self.owned
            axis = latent_axis(name, tensor, high - low)
            if axis is None and not self.ranks.is_rank_zero:
                continue
            if axis is not None and of_held:
                tensor = tensor[self._own] if axis == 0 else tensor[:, self._own]
            own[name] = tensor
        return own

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        # Sums over all ranks: errors count once a replica, active features once a rank.
        sums = tensors["sums"].clone()
        if self.ranks.mesh.data_index:
            sums[:2] = 0
        if not self.ranks.is_rank_zero:
            sums[2:] = 0
        super().restore(tensors | {"sums": sums}, step)

    @torch.no_grad()
    def finish(self) -> SAE:
        """This rank's latents of the trained SAE, for inputs as they are."""
        for average, parameter in zip(self.ema, self.parameters):
            parameter.copy_(average)
        if self.ema and self.n_replicas > 1:
            self.updater.share_weights()
        self.ema = []
        return super().finish()
