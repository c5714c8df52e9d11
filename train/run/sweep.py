"""Many SAEs from one reading of a store: sweeps over hook points, sizes, rates and seeds.

Runs that read the same rows in the same order (hook point, batch size, seed, held-out share) take each batch together;
the store is read once for all of them. Each run is that of `train_sae`, with a folder of its own, and ends with the
same bytes. Started by `torchrun`, every process takes a part of the runs, and they need nothing of each other.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from steersman.errors import PreemptedError, SteersmanError
from steersman.parallel import RankGroup, rank_and_world_size, use_local_accelerator
from steersman.sae import SAE
from steersman.train.run.checkpoints import Checkpoints
from steersman.train.run.metrics_log import Journal
from steersman.train.run.preemption import Preemption
from steersman.train.run.recipe import TrainConfig, training_batches
from steersman.train.run.run_folder import RunFolder
from steersman.train.run.trainer import Trainer, finish_run, prepare
from steersman.train.store.batch import ActivationSource
from steersman.train.store.store import ActivationStore, HookView

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One SAE of a sweep."""

    config: TrainConfig
    """How to train it."""
    hook: str | None = None
    """Which hook point of the store; the first if not given."""


@dataclass
class _Running:
    """A run that is not finished."""

    name: str
    source: ActivationSource
    trainer: Trainer
    folder: RunFolder
    checkpoints: Checkpoints
    journal: Journal | None = field(default=None)

    @property
    def reading(self) -> tuple[object, ...]:
        """Runs with the same reading take the same batches."""
        config, recipe = self.trainer.config, self.trainer.recipe
        return self.source.hook_name, recipe.batch_size, config.seed, config.heldout_fraction


def train_many(
    store: ActivationStore, runs: Mapping[str, SweepRun | TrainConfig], out: str | os.PathLike[str]
) -> dict[str, SAE]:
    """Train an SAE for each of `runs` in the folder `out`/name, reading the store once for those that can share it.

    Interrupted, the same call goes on with each run from its last checkpoint; finished ones are loaded.

    Returns:
        name -> SAE; of several processes, each returns those that it trained.

    Raises:
        SteersmanError: what `train_sae` raises, with the run's name; no runs; a name that is no folder name.
    """
    if not runs:
        raise SteersmanError("no runs to train: give at least one configuration")
    for name in runs:
        if not name or "/" in name or name.startswith("."):
            raise SteersmanError(f"{name!r} cannot name a run's folder; use letters, digits, - and _")
    rank, n_ranks = rank_and_world_size()
    if n_ranks > 1:
        use_local_accelerator()
    mine = list(runs.items())[rank::n_ranks]
    trained: dict[str, SAE] = {}
    groups: dict[tuple[object, ...], list[_Running]] = {}
    for name, run in mine:
        run = run if isinstance(run, SweepRun) else SweepRun(config=run)
        try:
            found = _open(name, store, run, Path(out))
        except SteersmanError as error:
            raise type(error)(f"run {name}: {error}") from error
        if isinstance(found, SAE):
            trained[name] = found
        else:
            groups.setdefault(found.reading, []).append(found)
    with Preemption(RankGroup()) as preemption:
        for group in groups.values():
            _train_together(group, preemption)
            for run in group:
                trained[run.name] = finish_run(run.trainer, run.source, run.folder)
    return trained


def _open(name: str, store: ActivationStore, run: SweepRun, out: Path) -> "_Running | SAE":
    source: ActivationSource = store if run.hook is None else HookView(store, run.hook)
    plan = prepare(source, run.config)
    folder = RunFolder(out / name, plan.record)
    if folder.finished:
        return SAE.load(folder.path)
    trainer = Trainer(run.config, plan.recipe, source.stats(), plan.cfg)
    checkpoints = Checkpoints(folder.checkpoints, run.config.keep_checkpoints)
    checkpoints.clear_unfinished()
    if trainer.resume(checkpoints):
        log.info("%s: going on from step %d of %d", name, trainer.n_steps_done, plan.recipe.n_steps)
    return _Running(name, source, trainer, folder, checkpoints)


def _train_together(group: list[_Running], preemption: Preemption) -> None:
    with ExitStack() as stack:
        for run in group:
            if run.trainer.n_steps_done == 0:
                with closing(run.trainer.batches(run.source)) as batches:
                    run.trainer.fit_encoder_scale(next(batches))
            run.journal = stack.enter_context(closing(Journal(run.trainer, run.folder)))
            stack.callback(run.checkpoints.settle)
        for step, x in _shared_batches(group):
            for run in group:
                if run.trainer.n_steps_done == step < run.trainer.recipe.n_steps:
                    run.trainer.step(x)
                    _after_step(run)
            if preemption.now():
                for run in group:
                    run.trainer.save(run.checkpoints)
                    run.checkpoints.wait()
                raise PreemptedError(f"asked to end at step {step + 1}; the same command goes on from here")
    for run in group:
        run.checkpoints.wait()


def _shared_batches(group: list[_Running]) -> Iterator[tuple[int, Tensor]]:
    first = group[0]
    start = min(run.trainer.n_steps_done for run in group)
    stop = max(run.trainer.recipe.n_steps for run in group)
    batches = training_batches(first.source, first.trainer.config, first.trainer.recipe, start)
    for step in range(start, stop):
        yield step, next(batches).x


def _after_step(run: _Running) -> None:
    trainer = run.trainer
    if run.journal is not None:
        run.journal.step_done()
    step = trainer.n_steps_done
    if step % trainer.config.checkpoint_every == 0 and step < trainer.recipe.n_steps:
        trainer.save(run.checkpoints)
