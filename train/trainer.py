"""The training loop of a top-k SAE, from activations to a saved folder.

Inputs are scaled to unit variance per dimension while training, and the scale is folded into the weights at the end.
A step makes no host synchronisation: losses and counters stay on the device and are read every `log_every` steps.

Shape letters: N tokens of a batch, L latents, D width, K active latents a token, A candidates of the AuxK loss.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steersman import __version__
from steersman.errors import SteersmanError
from steersman.progress import progress
from steersman.sae import SAE, BatchTopKSAE, SAEConfig, auxk_loss
from steersman.sae.metrics import collect_feature_stats, measure_reconstruction
from steersman.train.batch import ActivationBatch
from steersman.train.plots import plot_run
from steersman.train.recipe import Recipe, TrainConfig, resolve
from steersman.train.run_folder import RunFolder
from steersman.train.statistics import ActivationStats

log = logging.getLogger(__name__)


class ActivationSource(Protocol):
    """What can be trained on: an `ActivationStore`, an `ActivationStream`, or anything that reads like one."""

    @property
    def hook_name(self) -> str: ...
    @property
    def model_name(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def stats(self) -> ActivationStats: ...
    def n_batches(
        self, batch_size: int, *, split: Any = "train", heldout_fraction: float = 0.05, drop_last: bool = True
    ) -> int | None: ...
    def batches(
        self,
        batch_size: int,
        *,
        split: Any = "train",
        heldout_fraction: float = 0.05,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        drop_last: bool = True,
    ) -> Iterator[ActivationBatch]: ...


class Trainer:
    """One SAE in training: its weights, its optimiser and its counters, advanced by `step`."""

    def __init__(self, config: TrainConfig, recipe: Recipe, stats: ActivationStats, cfg: SAEConfig):
        variance = stats.mean_squared_norm - float(stats.mean.double().square().sum())
        if not (math.isfinite(variance) and variance > 1e-12 * max(stats.mean_squared_norm, 1e-30)):
            raise SteersmanError("the activations do not vary: there is nothing for an SAE to learn from them")
        self.config, self.recipe = config, recipe
        self.device = pick_device(config.device)
        self.scale = math.sqrt(cfg.d_in / variance)
        self.sae = SAE(cfg, torch.Generator().manual_seed(config.seed)).to(self.device)
        with torch.no_grad():
            self.sae.b_dec.copy_(stats.mean * self.scale)
        weights, biases = [self.sae.W_enc, self.sae.W_dec], [self.sae.b_enc, self.sae.b_dec]
        groups = [{"params": weights, "ratio": 1.0}, {"params": biases, "ratio": config.bias_lr_ratio}]
        self.optimizer = torch.optim.Adam(groups, lr=recipe.lr, betas=config.betas, fused=True)
        self.ema = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.n_steps_done = 0
        self.silent_steps = torch.zeros(cfg.d_sae, dtype=torch.int32, device=self.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        """Squared error, AuxK loss and active features, summed since the last log line."""

    @property
    def parameters(self) -> list[Tensor]:
        return [self.sae.W_enc, self.sae.W_dec, self.sae.b_enc, self.sae.b_dec]

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
        rebuilt = sae.decode_training(sae.training_code(x)) - sae.b_dec
        factor = (centred * rebuilt).sum() / rebuilt.square().sum()
        sae.W_enc.mul_(torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor)))

    def step(self, x: Tensor) -> None:
        """One optimiser step on a batch of activations [N, D], in `grad_accumulation` parts."""
        sae, recipe = self.sae, self.recipe
        x = self.scaled(x)
        fired = torch.zeros(sae.cfg.d_sae, device=self.device)
        for part in x.chunk(self.config.grad_accumulation):
            code = sae.training_code(part)
            residual = part - sae.decode_training(code)
            squared_error = residual.square().sum()
            aux = self._aux_loss(part, residual)
            # x has unit variance per dimension, so this is an estimate of FVU, whatever the batch holds.
            ((squared_error + self.config.aux_coefficient * aux) / x.numel()).backward()
            active = (code.values.detach() > 0).float()
            fired.scatter_add_(0, code.order.indices.flatten().long(), active.flatten())
            self.sums += torch.stack([squared_error.detach(), aux.detach(), active.sum()]).double()
            if isinstance(sae, BatchTopKSAE) and code.smallest is not None:
                self._track_threshold(sae, code.smallest)
        self._update(recipe.lr * recipe.lr_factor(self.n_steps_done))
        self.silent_steps += 1
        self.silent_steps.masked_fill_(fired > 0, 0)
        self.n_steps_done += 1

    def _aux_loss(self, x: Tensor, residual: Tensor) -> Tensor:
        """AuxK over the longest-silent latents, weighted down while fewer than `k_aux` are dead."""
        sae, recipe = self.sae, self.recipe
        dead = self.silent_steps >= recipe.dead_after_steps
        if not self.config.aux_coefficient or (self.device.type == "cpu" and not bool(dead.any())):
            return residual.new_zeros(())
        n_candidates = min(sae.cfg.d_sae, max(4 * recipe.k_aux, 64))
        candidates = self.silent_steps.topk(n_candidates).indices
        weight = (dead.sum() / recipe.k_aux).clamp(max=1.0)
        return weight * auxk_loss(sae, x, residual, candidates, ~dead[candidates], recipe.k_aux)

    @torch.no_grad()
    def _track_threshold(self, sae: BatchTopKSAE, smallest: Tensor) -> None:
        usable = torch.where(smallest.isfinite(), smallest, sae.threshold)
        moved = 0.99 * sae.threshold + 0.01 * usable
        sae.threshold.copy_(torch.where(sae.threshold < 0, usable, moved))

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        """Project the decoder's gradient off its rows, clip, step, and make the rows unit vectors again."""
        W_dec = self.sae.W_dec
        grad = W_dec.grad
        if grad is not None:  # moving along a unit row would only be undone below
            grad.sub_((grad * W_dec).sum(dim=1, keepdim=True) * W_dec)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.normalize_decoder()
        for average, parameter in zip(self.ema, self.parameters):
            average.lerp_(parameter, 1 - self.config.ema)

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
        tensors = {f"sae.{name}": value.contiguous() for name, value in self.sae.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{i}.{name}"] = value.contiguous()
        tensors |= {f"ema.{i}": value.contiguous() for i, value in enumerate(self.ema)}
        return tensors | {"silent_steps": self.silent_steps, "sums": self.sums, "rng": torch.get_rng_state()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Go on from what `state` gave."""
        for name, value in self.sae.state_dict().items():
            value.copy_(tensors[f"sae.{name}"])
        for i, parameter in enumerate(self.parameters):
            self.optimizer.state[parameter] = {
                name: torch.empty_like(parameter).copy_(tensors[f"adam.{i}.{name}"])
                if name != "step"
                else tensors[f"adam.{i}.{name}"].to(self.device)
                for name in ("step", "exp_avg", "exp_avg_sq")
            }
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


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SteersmanError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def train_sae(source: ActivationSource, config: TrainConfig, out: str | os.PathLike[str]) -> SAE:
    """Train an SAE on `source` and save it in the run folder `out`; see `run_folder` for what it holds.

    Running it again with the same arguments goes on from the last checkpoint and ends with the same weights, bit for
    bit, as a run that was never interrupted; a finished run is loaded.

    Args:
        source: an `ActivationStore`, or a stream.
        config: the settings; `TrainConfig(d_sae=..., k=...)` is enough.
        out: the run folder.

    Returns:
        The SAE in eval form on the training device, with its feature statistics.

    Raises:
        SteersmanError: a folder that holds another run, too few rows, activations that do not vary, a loss that is not
            finite, a full disk.
    """
    out = Path(out)
    n_rows = source.n_batches(1, split="train", heldout_fraction=config.heldout_fraction)
    recipe = resolve(config, source.d_in, n_rows)
    provenance = {"hook_name": source.hook_name, "model_name": source.model_name, "fingerprint": source.fingerprint}
    cfg = SAEConfig(
        d_in=source.d_in,
        d_sae=config.d_sae,
        k=config.k,
        activation=config.activation,
        hook_name=source.hook_name,
        model_name=source.model_name,
        metadata={
            "version": __version__,
            "training": asdict(config) | asdict(recipe),
            "data": provenance["fingerprint"],
        },
    )
    folder = RunFolder(out, {"training": asdict(config), "recipe": asdict(recipe), "data": provenance})
    if folder.finished:
        log.info("%s is finished; loading it", out)
        return SAE.load(out, pick_device(config.device))
    trainer = Trainer(config, recipe, source.stats(), cfg)
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        first = next(iter(source.batches(recipe.batch_size, **_reading(config))))
        trainer.fit_encoder_scale(first.x)
    else:
        tensors, state = checkpoint
        trainer.restore(tensors, state["step"])
        log.info("going on from step %d of %d", state["step"], recipe.n_steps)
    _run(trainer, source, folder)
    return _finish(trainer, source, folder)


def _reading(config: TrainConfig) -> dict[str, Any]:
    return {"split": "train", "heldout_fraction": config.heldout_fraction, "seed": config.seed}


def _training_batches(source: ActivationSource, config: TrainConfig, recipe: Recipe, step: int) -> Iterator[Tensor]:
    """The batches of steps `step`, `step + 1`, ..., epoch after epoch."""
    an_epoch = source.n_batches(recipe.batch_size, split="train", heldout_fraction=config.heldout_fraction)
    epoch, start = divmod(step, an_epoch) if an_epoch else (0, step)
    while True:
        for batch in source.batches(recipe.batch_size, epoch=epoch, start=start, **_reading(config)):
            yield batch.x
        epoch, start = epoch + 1, 0


def _run(trainer: Trainer, source: ActivationSource, folder: RunFolder) -> None:
    config, recipe = trainer.config, trainer.recipe
    wandb_run = _start_wandb(config, recipe, folder)
    metrics_file = folder.open_metrics(trainer.n_steps_done)
    last_logged = trainer.n_steps_done - trainer.n_steps_done % config.log_every
    clock, since = time.monotonic(), trainer.n_steps_done
    bar = progress(desc="training", total=recipe.n_steps * recipe.batch_size, unit="tok", unit_scale=True)
    bar.update(trainer.n_steps_done * recipe.batch_size)

    def save() -> None:
        folder.save_checkpoint(trainer.n_steps_done, trainer.state(), {}, config.keep_checkpoints)

    try:
        remaining = recipe.n_steps - trainer.n_steps_done
        batches = _training_batches(source, config, recipe, trainer.n_steps_done)
        for x in batches if remaining else ():
            trainer.step(x)
            step = trainer.n_steps_done
            bar.update(len(x))
            if step % config.log_every == 0 or step == recipe.n_steps:
                metrics = trainer.read_metrics((step - last_logged) * recipe.batch_size)
                now = time.monotonic()
                metrics |= {"lr": recipe.lr * recipe.lr_factor(step - 1)}
                metrics |= {"tokens_per_second": (step - since) * recipe.batch_size / max(now - clock, 1e-9)}
                last_logged, clock, since = step, now, step
                line = {"step": step, "tokens": step * recipe.batch_size, **metrics}
                folder.append(metrics_file, line)
                bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("loss", "fvu", "l0", "dead_share")})
                if wandb_run is not None:
                    wandb_run.log(line, step=step)
            if step == recipe.n_steps:
                break
            if step % config.checkpoint_every == 0:
                save()
    except KeyboardInterrupt:
        save()
        log.warning("interrupted at step %d; the same command goes on from here", trainer.n_steps_done)
        raise
    finally:
        bar.close()
        metrics_file.close()
        if wandb_run is not None:
            wandb_run.finish()


def _start_wandb(config: TrainConfig, recipe: Recipe, folder: RunFolder) -> Any:
    if config.wandb_project is None:
        return None
    import wandb

    try:
        return wandb.init(
            project=config.wandb_project,
            name=folder.path.name,
            dir=str(folder.path),
            config=asdict(config) | {"recipe": asdict(recipe)},
            resume="allow",
        )
    except wandb.Error as error:
        raise SteersmanError(f"Weights & Biases: {error} WANDB_MODE=offline logs to the run folder.") from error


def _finish(trainer: Trainer, source: ActivationSource, folder: RunFolder) -> SAE:
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
    sae.cfg.metadata["heldout"] = asdict(heldout)
    log.info("held out: FVU %.4f, L0 %.1f, dead %.2f %%", heldout.fvu, heldout.l0, 100 * heldout.dead_share)
    plot_run(folder.metrics(), sae.feature_stats, folder.path)
    sae.save(folder.path)
    return sae
