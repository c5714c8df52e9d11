"""Training one SAE on several processes: what `train_sae` does when it was started with `torchrun`.

The path is that of one process, with a `ShardedTrainer`. What is measured at the end is measured by all ranks, each
with its latents and its replica's rows; the first rank collects the weights and writes the folder.

Shape letters: N tokens, L latents, D width, K active latents a token, R ranks of the latent axis.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.device import pick_device
from steersman.kernels import choose
from steersman.parallel import Mesh, RankGroup, Ranks
from steersman.progress import progress
from steersman.sae import SAE, SAEConfig, SparseCode
from steersman.sae.metrics import FeatureSums, ReconstructionSums
from steersman.train.capture.stream import ActivationStream
from steersman.train.mesh.sharded import ShardedTrainer
from steersman.train.mesh.shared_stream import SharedStream
from steersman.train.reports.plots import plot_run
from steersman.train.run.checkpoints import Checkpoints
from steersman.train.run.recipe import TrainConfig
from steersman.train.run.run_folder import RunFolder
from steersman.train.run.trainer import prepare, run
from steersman.train.store.batch import ActivationBatch, ActivationSource

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 4096


def train_on_ranks(source: ActivationSource, config: TrainConfig, out: Path, rank: int, n_ranks: int) -> SAE:
    """See `train_sae`. Called by the first `n_ranks` ranks of the job; each returns the SAE, all but the first on the
    CPU."""
    if isinstance(source, ActivationStream):
        source.run_part(rank, n_ranks)
    plan = prepare(source, config)
    sizes = {"d_sae": config.d_sae, "batch_size": plan.recipe.batch_size}
    mesh = Mesh.over(n_ranks, rank=rank, latent=config.latent_shards, **sizes)
    with Ranks(mesh, config.timeout_seconds) as ranks:
        if isinstance(source, ActivationStream):
            source = SharedStream(source, ranks)
        ranks.on_rank_zero(lambda: _start(out, plan.record))
        folder = RunFolder(out, plan.record)
        if folder.finished:
            log.info("%s is finished; loading it", out)
        else:
            trainer = ShardedTrainer(config, plan.recipe, source.stats(), plan.cfg, ranks)
            checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints, ranks.background)
            run(trainer, source, folder, checkpoints, ranks.control)
            _finish(trainer, source, folder)
        ranks.control.barrier()
    return SAE.load(out, pick_device(config.device) if rank == 0 else "cpu")


def _start(out: Path, record: dict[str, Any]) -> None:
    Checkpoints(RunFolder(out, record).checkpoints, 1).clear_unfinished()


class WholeSAE:
    """An SAE whose latents lie on the ranks of an axis, as far as measuring it needs one.

    All ranks of the axis call its methods together, with the same rows; `local` holds latents from `start` on.
    """

    def __init__(self, local: SAE, cfg: SAEConfig, start: int, axis: RankGroup) -> None:
        self.local, self.cfg, self._start, self._axis = local, cfg, start, axis

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The active features of x [N, D], as `SAE.encode_sparse` of the whole gives them."""
        values, indices = self.local._select(x)
        if not SAE.architectures[self.cfg.architecture].exact_k:  # each rank has as many columns as its fullest row
            width = int(self._axis.all_reduce_max_(torch.tensor([values.shape[1]], device=x.device)))
            wider = (0, width - values.shape[1])
            values, indices = torch.nn.functional.pad(values, wider), torch.nn.functional.pad(indices, wider)
        everyone = self._axis.all_gather(values).transpose(0, 1).flatten(1)
        ids = self._axis.all_gather(indices + self._start).transpose(0, 1).flatten(1)
        values, order = torch.sort(everyone, dim=1, descending=True, stable=True)
        if SAE.architectures[self.cfg.architecture].exact_k:
            values, order = values[:, : self.cfg.k], order[:, : self.cfg.k]
        return SparseCode(values, ids.gather(1, order).long())

    @torch.no_grad()
    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """The reconstruction [N, D] of a code, as `SAE.decode_sparse` of the whole gives it."""
        local = indices - self._start
        here = (local >= 0) & (local < self.local.cfg.d_sae)
        values = torch.where(here, values, torch.zeros_like(values))
        local = torch.where(here, local, torch.zeros_like(local))
        part = choose(values.device).sparse_decode(values, local, self.local.W_dec)
        return self._axis.all_reduce_sum_(part) + self.local.b_dec

    def collect(self, first: bool) -> SAE | None:
        """The whole SAE on the CPU of the `first` rank; None on the others."""
        whole = SAE(self.cfg) if first else None
        local = self.local
        if whole is not None:
            with torch.no_grad():
                whole.b_dec.copy_(local.b_dec)
                for name, buffer in whole.named_buffers():
                    buffer.copy_(getattr(local, name))
        n = local.cfg.d_sae
        for low in range(0, n, _ROWS_AT_ONCE):
            part = slice(low, min(low + _ROWS_AT_ONCE, n))
            for name in ("W_enc", "W_dec", "b_enc"):
                rows = getattr(local, name).detach()
                found = self._axis.all_gather(rows.T[part] if name == "W_enc" else rows[part])
                if whole is not None:
                    of_whole = getattr(whole, name).detach()
                    of_whole = of_whole.T if name == "W_enc" else of_whole
                    for rank, rows in enumerate(found):
                        of_whole[rank * n + part.start : rank * n + part.stop] = rows.cpu()
        return whole


def _finish(trainer: ShardedTrainer, source: ActivationSource, folder: RunFolder) -> None:
    """Measure on held-out rows, take the feature statistics, save and plot: `trainer._finish` on several ranks."""
    ranks, config, rows = trainer.ranks, trainer.config, trainer.recipe.batch_size
    sae = WholeSAE(trainer.finish(), trainer.cfg, trainer.held[0], ranks.latent)
    share = {"rank": ranks.mesh.data_index, "world_size": ranks.mesh.data}
    reading = {"heldout_fraction": config.heldout_fraction, "seed": config.seed, "drop_last": False, **share}
    heldout = ReconstructionSums(trainer.cfg.d_in, trainer.cfg.d_sae, trainer.device)
    heldout.shift = source.stats().mean.to(trainer.device)
    for x in _on(trainer.device, source.batches(rows, split="heldout", shuffle=False, **reading)):
        code = sae.encode_sparse(x)
        heldout.add(x, sae.decode_sparse(code.values, code.indices), code)
    for sums in (heldout.counts, heldout.sum, heldout.scalars):
        ranks.data.all_reduce_sum_(sums)
    heldout.n_tokens = _total(heldout.n_tokens, trainer)

    n_batches = max(1, config.statistics_tokens // rows)
    features = FeatureSums(trainer.cfg.d_sae, trainer.device)
    options = {} if ranks.is_rank_zero else {"disable": True}
    bar = progress(
        source.batches(rows, split="train", **reading), desc="feature statistics", total=n_batches, **options
    )
    for x, _ in zip(_on(trainer.device, bar), range(n_batches)):
        features.add(sae.encode_sparse(x))
    bar.close()
    ranks.data.all_reduce_max_(features.largest)
    ranks.data.all_reduce_sum_(features.total)
    ranks.data.all_reduce_sum_(features.counts)
    features.n_tokens = _total(features.n_tokens, trainer)

    whole = sae.collect(ranks.is_rank_zero)

    def save() -> None:
        if whole is not None:
            result = heldout.result()
            whole.feature_stats = features.stats(source.stats().median_norm)
            whole.cfg.metadata["heldout"] = result.record()
            log.info("held out: FVU %.4f, L0 %.1f, dead %.2f %%", result.fvu, result.l0, 100 * result.dead_fraction)
            plot_run(folder.metrics(), whole.feature_stats, folder.path)
            whole.save(folder.path)

    ranks.on_rank_zero(save)


def _on(device: torch.device, batches: Iterable[ActivationBatch]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch.x.to(device)


def _total(n: int, trainer: ShardedTrainer) -> int:
    return int(trainer.ranks.data.all_reduce_sum_(torch.tensor([n], dtype=torch.int64, device=trainer.device)))
