"""The training loop of a top-k SAE, from activations to a saved folder.

Inputs are scaled to unit variance per dimension while training, and the scale is folded into the weights at the end.
A step makes no host synchronisation: losses and counters stay on the device and are read every `log_every` steps.

Shape letters: N tokens of a batch, L latents, D width, K active latents a token, A candidates of the AuxK loss.
"""

import logging
import math
import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steersman import __version__
from steersman.device import pick_device
from steersman.errors import PreemptedError, SteersmanError
from steersman.kernels import using
from steersman.parallel import RankGroup, rank_and_world_size, use_local_accelerator
from steersman.progress import progress
from steersman.sae import SAE, AuxTerm, BatchTopKSAE, SAEConfig
from steersman.sae.metrics import collect_feature_stats, measure_reconstruction
from steersman.train.reports.plots import plot_run
from steersman.train.run.checkpoints import Checkpoints
from steersman.train.run.graph import GraphedStep
from steersman.train.run.metrics_log import Journal
from steersman.train.run.optim import Updater, make_updater, parameters_of
from steersman.train.run.preemption import Preemption
from steersman.train.run.recipe import Recipe, TrainConfig, resolve, training_batches
from steersman.train.run.run_folder import RunFolder
from steersman.train.store.batch import ActivationSource
from steersman.train.store.statistics import ActivationStats

log = logging.getLogger(__name__)

_PLACE = ("latent_shards", "model_ranks", "timeout_seconds")
"""Settings that say only where a run is computed."""


class Trainer:
    """One SAE in training: its weights, its optimiser and its counters, advanced by `step`."""

    def __init__(self, config: TrainConfig, recipe: Recipe, stats: ActivationStats, cfg: SAEConfig):
        variance = stats.mean_squared_norm - float(stats.mean.double().square().sum())
        if not (math.isfinite(variance) and variance > 1e-12 * max(stats.mean_squared_norm, 1e-30)):
            raise SteersmanError("the activations do not vary: there is nothing for an SAE to learn from them")
        self.config, self.recipe, self.cfg = config, recipe, cfg
        self.device = pick_device(config.device)
        self.scale = math.sqrt(cfg.d_in / variance)
        self.sae = self._new_sae(cfg).to(self.device)
        with torch.no_grad():
            self.sae.b_dec.copy_(stats.mean * self.scale)
        self.updater: Updater = self._new_updater()
        self.ema = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.n_steps_done = 0
        self.silent_steps = torch.zeros(self.sae.cfg.d_sae, dtype=torch.int32, device=self.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        """Squared error, AuxK loss and active features, summed since the last log line."""
        self._graph = GraphedStep(self) if config.cuda_graph else None

    # What a trainer that is one of several ranks does its own way; see `sharded.py`.

    n_replicas = 1
    """Processes that share the batch, each with an equal part of it."""

    @property
    def held(self) -> tuple[int, int]:
        """First and end latent whose weights are here."""
        return 0, self.cfg.d_sae

    @property
    def owned(self) -> tuple[int, int]:
        """First and end latent that this process moves."""
        return self.held

    def batches(self, source: ActivationSource) -> Generator[Tensor]:
        """This process's rows of the batches to come, epoch after epoch."""
        for batch in training_batches(source, self.config, self.recipe, self.n_steps_done):
            yield batch.x

    def _new_sae(self, cfg: SAEConfig) -> SAE:
        return SAE(cfg, torch.Generator().manual_seed(self.config.seed))

    def _new_updater(self) -> Updater:
        return make_updater(self.sae, self.config, self.recipe.lr)

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors, or those parts of them that this process moves."""
        return parameters_of(self.sae)

    def _rebuild(self, x: Tensor) -> Tensor:
        return self.sae.decode_training(self.sae.encode_training(x))

    def _total(self, sums: Tensor) -> Tensor:
        """Sums over this process's rows -> over the whole batch."""
        return sums

    def _count_silence(self, fired: Tensor) -> None:
        self.silent_steps += 1
        self.silent_steps.masked_fill_(fired > 0, 0)

    # The step

    def scaled(self, x: Tensor) -> Tensor:
        """Activations [N, D] as the SAE sees them while training: fp32, on the device, unit variance."""
        return x.to(self.device, non_blocking=True).float() * self.scale

    @torch.no_grad()
    def fit_encoder_scale(self, x: Tensor) -> None:
        """Scale the encoder so that the first reconstruction of x [N, D] has the best length.

        With the encoder the transpose of an overcomplete decoder, the K features together overshoot; least squares
        gives the one factor that helps most, and saves the first tenth of a short run.
        """
        sae, x = self.sae, self.scaled(x)
        centred = x - sae.b_dec
        rebuilt = self._rebuild(x) - sae.b_dec
        along, squared = self._total(torch.stack([(centred * rebuilt).sum(), rebuilt.square().sum()]))
        factor = along / squared
        sae.W_enc.mul_(torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor)))

    def step(self, x: Tensor) -> None:
        """One optimiser step on a batch of activations [N, D]."""
        if self._graph is not None:
            self._graph(x)
        else:
            self.take_step(x)

    def take_step(self, x: Tensor) -> None:
        """`step` without a CUDA graph, in `grad_accumulation` parts."""
        sae, recipe = self.sae, self.recipe
        x = self.scaled(x)
        fired = torch.zeros(sae.cfg.d_sae, device=self.device)
        aux_term = self._aux_term()
        for part in x.chunk(self.config.grad_accumulation):
            # x has unit variance per dimension, so the loss a number is an estimate of FVU, whatever the batch holds.
            code, squared_error, aux = self.updater.learn(part, x.numel() * self.n_replicas, aux_term)
            active = (code.values.detach() > 0).float()
            fired.scatter_add_(0, code.order.indices.flatten().long(), active.flatten())
            self.sums += torch.stack([squared_error, aux, active.sum()]).double()
            if isinstance(sae, BatchTopKSAE) and code.min_selected is not None:
                self._track_threshold(sae, code.min_selected)
        self.updater.apply(recipe.lr * recipe.lr_factor(self.n_steps_done))
        for average, parameter in zip(self.ema, self.parameters):
            average.lerp_(parameter.detach(), 1 - self.config.ema)
        self._count_silence(fired)
        self.n_steps_done += 1

    def _aux_term(self) -> AuxTerm | None:
        """AuxK over the longest-silent latents, weighted down while fewer than `k_aux` are dead."""
        recipe = self.recipe
        dead = self.silent_steps >= recipe.dead_after_steps
        if not self.config.aux_coefficient or (self.device.type == "cpu" and not bool(dead.any())):
            return None
        n_candidates = min(self.sae.cfg.d_sae, max(4 * recipe.k_aux, 64))
        candidates = longest_silent(self.silent_steps, n_candidates)
        weight = (dead.sum() / recipe.k_aux).clamp(max=1.0)
        return AuxTerm(candidates, ~dead[candidates], weight, recipe.k_aux, self.config.aux_coefficient)

    @torch.no_grad()
    def _track_threshold(self, sae: BatchTopKSAE, smallest: Tensor) -> None:
        usable = torch.where(smallest.isfinite(), smallest, sae.threshold)
        moved = 0.99 * sae.threshold + 0.01 * usable
        sae.threshold.copy_(torch.where(sae.threshold < 0, usable, moved))

    def read_metrics(self, n_tokens: int) -> dict[str, float]:
        """Losses over the `n_tokens` since the last reading: the one place where the host waits for the device."""
        squared_error, aux, active = (self.sums / n_tokens).tolist()
        self.sums.zero_()
        fvu, aux = squared_error / self.sae.cfg.d_in, aux / self.sae.cfg.d_in
        dead = float((self.silent_steps >= self.recipe.dead_after_steps).float().mean())
        loss = fvu + self.config.aux_coefficient * aux
        if not math.isfinite(loss):
            raise SteersmanError(
                f"the loss is not finite at step {self.n_steps_done}; try a lower --lr (it was {self.recipe.lr:.2g})"
            )
        return {"loss": loss, "fvu": fvu, "aux": aux, "l0": active, "dead_share": dead}

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as named tensors."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        tensors |= self.updater.state()
        tensors |= {f"ema.{i}": value for i, value in enumerate(self.ema)}
        return tensors | {"silent_steps": self.silent_steps, "sums": self.sums, "rng": torch.get_rng_state()}

    def save(self, checkpoints: Checkpoints) -> None:
        """Have the state written as a checkpoint, in the background."""
        checkpoints.save(self.n_steps_done, self.state(), self.owned, self.cfg, self.scale)

    def resume(self, checkpoints: Checkpoints) -> bool:
        """Go on from the newest checkpoint; False when there is none."""
        found = checkpoints.load(lambda name: self.held if name.startswith(("sae.", "silent")) else self.owned)
        if found is not None:
            self.restore(found[0], found[1]["step"])
        return found is not None

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Go on from what `state` gave."""
        for name, value in self.sae.state_dict().items():
            value.copy_(tensors[f"sae.{name}"])
        self.updater.restore(tensors)
        for i, average in enumerate(self.ema):
            average.copy_(tensors[f"ema.{i}"])
        self.silent_steps.copy_(tensors["silent_steps"])
        self.sums.copy_(tensors["sums"])
        torch.set_rng_state(tensors["rng"])
        self.n_steps_done = step

    @torch.no_grad()
    def finish(self) -> SAE:
        """The trained SAE for inputs as they are: averaged if asked, the scale folded in."""
        for average, parameter in zip(self.ema, self.parameters):
            parameter.copy_(average)
        self.sae.normalize_decoder()
        self.sae.fold_input_scale(self.scale)
        return self.sae


def longest_silent(silent_steps: Tensor, n: int) -> Tensor:
    """The ids of the n latents that have been silent longest, longest first, equal ones by id: [n] int64.

    >>> longest_silent(torch.tensor([3, 9, 3, 0, 9], dtype=torch.int32), 3)
    tensor([1, 4, 0])
    """
    L = len(silent_steps)
    return (silent_steps.long() * L + torch.arange(L - 1, -1, -1, device=silent_steps.device)).topk(n).indices


def train_sae(
    source: ActivationSource | Callable[[], ActivationSource], config: TrainConfig, out: str | os.PathLike[str]
) -> SAE:
    """Train an SAE on `source` and save it in the run folder `out`; see `run_folder` for what it holds.

    Running it again with the same arguments goes on from the last checkpoint and ends with the same weights, bit for
    bit, as a run that was never interrupted; a finished run is loaded.

    Args:
        source: an `ActivationStore`, a stream, or a function that makes one. With `model_ranks` only those ranks call
            the function, so that only they load the model.
        config: the settings; `TrainConfig(d_sae=..., k=...)` is enough.
        out: the run folder.

    Returns:
        The SAE in eval form on the training device, with its feature statistics.

    Raises:
        SteersmanError: a folder that holds another run, too few rows, activations that do not vary, a loss that is not
            finite, a full disk.
    """
    out = Path(out)
    rank, n_ranks = rank_and_world_size()
    if config.model_ranks:
        from steersman.train.mesh.model_ranks import train_from_model_ranks

        with using(config.kernels):
            return train_from_model_ranks(source if callable(source) else lambda: source, config, out)
    if n_ranks == 1:
        return train_alone(source() if callable(source) else source, config, out)
    from steersman.train.mesh.cluster import train_on_ranks

    use_local_accelerator()
    with using(config.kernels):
        return train_on_ranks(source() if callable(source) else source, config, out, rank, n_ranks)


def train_alone(source: ActivationSource, config: TrainConfig, out: Path) -> SAE:
    """`train_sae` of one process."""
    plan = prepare(source, config)
    folder = RunFolder(out, plan.record)
    if folder.finished:
        log.info("%s is finished; loading it", out)
        return SAE.load(out, pick_device(config.device))
    with using(config.kernels, pick_device(config.device)):
        trainer = Trainer(config, plan.recipe, source.stats(), plan.cfg)
        checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints)
        checkpoints.clear_unfinished()
        run(trainer, source, folder, checkpoints)
        return finish_run(trainer, source, folder)


class Plan(NamedTuple):
    """What is settled before training starts."""

    recipe: Recipe
    cfg: SAEConfig
    record: dict[str, Any]
    """What the run folder remembers, to tell this run from others."""


def prepare(source: ActivationSource, config: TrainConfig) -> Plan:
    """Settle the schedule and the SAE's configuration; raises a SteersmanError for too few rows."""
    n_rows = source.n_batches(1, split="train", heldout_fraction=config.heldout_fraction)
    recipe = resolve(config, source.d_in, n_rows)
    provenance = {"hook_name": source.hook_name, "model_name": source.model_name, "fingerprint": source.fingerprint}
    # Where a run is computed does not change what it gives.
    settings = {name: value for name, value in asdict(config).items() if name not in _PLACE}
    cfg = SAEConfig(
        d_in=source.d_in,
        d_sae=config.d_sae,
        k=config.k,
        architecture=config.activation,
        hook_name=source.hook_name,
        model_name=source.model_name,
        metadata={
            "version": __version__,
            "training": settings | asdict(recipe),
            "data": provenance["fingerprint"],
        },
    )
    return Plan(recipe, cfg, {"training": settings, "recipe": asdict(recipe), "data": provenance})


def run(
    trainer: Trainer,
    source: ActivationSource,
    folder: RunFolder,
    checkpoints: Checkpoints,
    control: RankGroup | None = None,
) -> None:
    """Train to the end, from the newest checkpoint on if there is one. `control` holds all processes of the run."""
    control = control or RankGroup()
    if trainer.resume(checkpoints):
        log.info("going on from step %d of %d", trainer.n_steps_done, trainer.recipe.n_steps)
    else:
        batches = trainer.batches(source)
        trainer.fit_encoder_scale(next(batches))
        batches.close()
    preemption = Preemption(control, lambda: getattr(source, "preempted", False))
    with preemption, closing(Journal(trainer, folder, control.index == 0)) as journal:
        try:
            _steps(trainer, source, checkpoints, journal, preemption)
        except KeyboardInterrupt:
            if control.size == 1:  # several ranks are not interrupted in the same step
                trainer.save(checkpoints)
            log.warning("interrupted at step %d; the same command goes on from here", trainer.n_steps_done)
            raise
        finally:
            checkpoints.settle()
    checkpoints.wait()


def _steps(
    trainer: Trainer, source: ActivationSource, checkpoints: Checkpoints, journal: Journal, preemption: Preemption
) -> None:
    config, recipe = trainer.config, trainer.recipe
    if trainer.n_steps_done >= recipe.n_steps:
        return
    with closing(trainer.batches(source)) as batches:
        for x in batches:
            trainer.step(x)
            journal.step_done()
            step = trainer.n_steps_done
            if step == recipe.n_steps:
                return
            if preemption.now():
                trainer.save(checkpoints)
                checkpoints.wait()
                raise PreemptedError(f"asked to end at step {step}, which is saved; the same command goes on from here")
            if step % config.checkpoint_every == 0:
                trainer.save(checkpoints)


def finish_run(trainer: Trainer, source: ActivationSource, folder: RunFolder) -> SAE:
    """Fold the scale in, measure on held-out rows, take the feature statistics, save and plot."""
    config = trainer.config
    sae, rows = trainer.finish(), trainer.recipe.batch_size
    train = {"heldout_fraction": config.heldout_fraction, "seed": config.seed, "drop_last": False}
    heldout = measure_reconstruction(
        sae, (batch.x for batch in source.batches(rows, split="heldout", shuffle=False, **train))
    )
    n_batches = max(1, config.statistics_tokens // rows)
    bar = progress(source.batches(rows, split="train", **train), desc="feature statistics", total=n_batches)
    counted = (batch.x for batch, _ in zip(bar, range(n_batches)))
    sae.feature_stats = collect_feature_stats(sae, counted, source.stats().median_norm)
    bar.close()
    sae.cfg.metadata["heldout"] = heldout.record()
    log.info("held out: FVU %.4f, L0 %.1f, dead %.2f %%", heldout.fvu, heldout.l0, 100 * heldout.dead_fraction)
    plot_run(folder.metrics(), sae.feature_stats, folder.path)
    sae.save(folder.path)
    return sae
