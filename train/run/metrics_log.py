"""What a run logs while it trains: metrics.jsonl, the progress bar and, if asked, Weights & Biases."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from steersman.errors import SteersmanError
from steersman.progress import progress
from steersman.train.run.recipe import Recipe, TrainConfig
from steersman.train.run.run_folder import RunFolder


class MetricsLogger:
    """Reads metrics every `log_every` steps and, on rank 0, writes them down. All ranks of a run call its methods
    together. Close it at the end."""

    def __init__(
        self, folder: RunFolder, config: TrainConfig, recipe: Recipe, start: int, *, rank_zero: bool = True
    ) -> None:
        """`start` is the number of steps done before."""
        self.folder, self.config, self.recipe = folder, config, recipe
        self._clock, self._since = time.monotonic(), start
        self._wandb = _start_wandb(folder, config, recipe) if rank_zero else None
        self._file = folder.open_metrics(start) if rank_zero else None
        total = recipe.n_steps * recipe.batch_size
        self._bar = progress(desc="training", total=total, unit="tok", unit_scale=True, shown=rank_zero)
        self._bar.update(start * recipe.batch_size)

    def step_done(self, step: int, read_metrics: Callable[[], dict[str, float]]) -> None:
        """After step number `step`; every `log_every` of them, and after the last, log what `read_metrics` gives."""
        recipe = self.recipe
        self._bar.update(recipe.batch_size)
        if step % self.config.log_every and step != recipe.n_steps:
            return
        metrics = read_metrics()
        now = time.monotonic()
        metrics |= {"lr": recipe.lr * recipe.lr_factor(step - 1)}
        metrics |= {"tokens_per_second": (step - self._since) * recipe.batch_size / max(now - self._clock, 1e-9)}
        self._clock, self._since = now, step
        line = {"step": step, "tokens": step * recipe.batch_size, **metrics}
        if self._file is not None:
            self._file.append(line)
        self._bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("loss", "fvu", "l0", "dead_share")})
        if self._wandb is not None:
            self._wandb.log(line, step=step)

    def close(self) -> None:
        """Finish the bar and close the files."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: RunFolder, config: TrainConfig, recipe: Recipe) -> Any:
    if config.wandb_project is None:
        return None
    import wandb

    try:
        known = folder.wandb_id(config.wandb_project)
        run = wandb.init(
            project=config.wandb_project,
            name=folder.path.name,
            dir=str(folder.path),
            config=asdict(config) | {"recipe": asdict(recipe)},
            id=known,
            resume="allow",
        )
        if known is None:
            folder.set_wandb_id(config.wandb_project, run.id)
        return run
    except (wandb.Error, OSError) as error:
        raise SteersmanError(f"Weights & Biases: {error} WANDB_MODE=offline logs to the run folder.") from error
