"""What a run says while it trains: metrics.jsonl, the progress bar and, if asked, Weights & Biases."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from steersman.errors import SteersmanError
from steersman.progress import progress
from steersman.train.run.run_folder import RunFolder

if TYPE_CHECKING:
    from steersman.train.run.trainer import Trainer


class Journal:
    """Reads the trainer's metrics every `log_every` steps and, on the `first` of several processes, writes them down.

    Reading them is done by all processes together. Close it at the end.
    """

    def __init__(self, trainer: "Trainer", folder: RunFolder, first: bool = True) -> None:
        self.trainer, self.folder = trainer, folder
        config, recipe, done = trainer.config, trainer.recipe, trainer.n_steps_done
        self._last_logged = done - done % config.log_every
        self._clock, self._since = time.monotonic(), done
        self._wandb = _start_wandb(trainer, folder) if first else None
        self._file = folder.open_metrics(done) if first else None
        total = recipe.n_steps * recipe.batch_size
        options: dict[str, Any] = {} if first else {"disable": True}
        self._bar = progress(desc="training", total=total, unit="tok", unit_scale=True, **options)
        self._bar.update(done * recipe.batch_size)

    def step_done(self) -> None:
        """Take note of a step; every `log_every` of them, and after the last, log the metrics."""
        trainer, recipe, step = self.trainer, self.trainer.recipe, self.trainer.n_steps_done
        self._bar.update(recipe.batch_size)
        if step % trainer.config.log_every and step != recipe.n_steps:
            return
        metrics = trainer.read_metrics((step - self._last_logged) * recipe.batch_size)
        now = time.monotonic()
        metrics |= {"lr": recipe.lr * recipe.lr_factor(step - 1)}
        metrics |= {"tokens_per_second": (step - self._since) * recipe.batch_size / max(now - self._clock, 1e-9)}
        self._last_logged, self._clock, self._since = step, now, step
        line = {"step": step, "tokens": step * recipe.batch_size, **metrics}
        if self._file is not None:
            self.folder.append(self._file, line)
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


def _start_wandb(trainer: "Trainer", folder: RunFolder) -> Any:
    config, recipe = trainer.config, trainer.recipe
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
