"""Many SAEs from one reading of a store: sweeps over hook points, architectures, sizes, rates and seeds.

Runs that read the same rows in the same order (hook point, batch size, seed, held-out fraction) take each batch
together; the store is read once for all of them. Each is the run of `train_sae`, with a folder of its own, and ends
with the same bytes. Started by `torchrun`, every process takes a part of the runs, and they need nothing of each other;
a run that sets `latent_shards` is trained by all of them together.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from steersman.config import check_types, read_yaml, typed
from steersman.errors import SteersmanError
from steersman.parallel import Mesh, Ranks, process_group, rank_and_world_size, use_local_accelerator
from steersman.sae import SAE
from steersman.train.mesh.preemption import Preemption
from steersman.train.run.recipe import TrainConfig
from steersman.train.run.run import Run, mesh_of, train
from steersman.train.store.store import ActivationStore
from steersman.train.store.view import HookView


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One SAE of a sweep."""

    config: TrainConfig
    """How to train it."""
    hook: str | None = None
    """Which hook point of the store; the first if not given."""


def train_many(
    store: ActivationStore, runs: Mapping[str, SweepRun | TrainConfig], out: str | os.PathLike[str]
) -> dict[str, SAE]:
    """Train an SAE for each of `runs` in the folder `out`/name, reading the store once for those that can share it.

    Interrupted or asked to end, it saves all runs that are under way; the same call resumes each from its last
    checkpoint. Finished ones are loaded.

    Returns:
        name -> SAE; of several processes, each returns those that it had a part in.

    Raises:
        SteersmanError: what `train_sae` raises, with the run's name; no runs; a name that is no folder name.
    """
    if not runs:
        raise SteersmanError("no runs to train: give at least one configuration")
    for name in runs:
        if not name or "/" in name or name.startswith("."):
            raise SteersmanError(f"{name!r} cannot name a run's folder; use letters, digits, - and _")
    given = {name: run if isinstance(run, SweepRun) else SweepRun(config=run) for name, run in runs.items()}
    rank, n_ranks = rank_and_world_size()
    together = {name: run for name, run in given.items() if n_ranks > 1 and run.config.latent_shards is not None}
    alone = dict([item for item in given.items() if item[0] not in together][rank::n_ranks])
    with ExitStack() as stack:
        if n_ranks > 1:
            use_local_accelerator()
        if together:
            stack.enter_context(process_group(max(run.config.timeout_seconds for run in together.values())))
        ranks_of: dict[Mesh, Ranks] = {Mesh(): Ranks(Mesh())}
        opened: dict[str, Run] = {}
        for name, run in (alone | together).items():
            with _naming(name):
                if run.config.model_ranks:
                    raise SteersmanError("model_ranks is for training straight from a model: use 0 on a store")
                source = store if run.hook is None else HookView(store, run.hook)
                mesh = mesh_of(source, run.config, rank, n_ranks) if name in together else Mesh()
                if mesh not in ranks_of:
                    ranks_of[mesh] = stack.enter_context(Ranks(mesh, run.config.timeout_seconds))
                opened[name] = Run(source, run.config, Path(out) / name, ranks_of[mesh])
                stack.callback(opened[name].close)
        groups: dict[tuple[object, ...], list[Run]] = {}
        for run in opened.values():
            if not run.finished:
                groups.setdefault(run.reading, []).append(run)
        for group in groups.values():
            with Preemption(group[0].ranks.control) as preemption:
                train(group, preemption)
                if preemption.now():
                    raise preemption.error("asked to end between two trainings; the same command resumes from here")
        return {name: run.load() for name, run in opened.items()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of the block name the run."""
    try:
        yield
    except SteersmanError as error:
        raise type(error)(f"run {name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """Train many SAEs on one store, which is read once for all that can share it: one for each combination of what the
    lists say, or those of a file. All other settings are the same for all."""

    store: str
    """Folder of a store that `steersman cache` wrote."""
    out: str
    """Folder for the runs' folders. Runs that were interrupted are resumed, finished ones left as they are."""
    d_sae: int = 0
    """Number of features, where `d_saes` lists none."""
    hooks: tuple[str, ...] = ()
    """Hook points of the store; the first if none is given."""
    architectures: tuple[str, ...] = ()
    """Values of `architecture`."""
    d_saes: tuple[int, ...] = ()
    """Values of `d_sae`."""
    ks: tuple[int, ...] = ()
    """Values of `k`."""
    lrs: tuple[float, ...] = ()
    """Values of `lr`."""
    batch_sizes: tuple[int, ...] = ()
    """Values of `batch_size`; each is a reading of the store."""
    aux_coefficients: tuple[float, ...] = ()
    """Values of `aux_coefficient`."""
    seeds: tuple[int, ...] = ()
    """Values of `seed`; each is a reading of the store."""
    runs: str | None = None
    """YAML file with a mapping `runs`: name of each run -> the settings, and the `hook`, that it does not share with
    the others. In place of the lists."""

    def __post_init__(self) -> None:
        """Types alone are checked here: the rules are those of each run."""
        check_types(self)

    def each(self) -> dict[str, SweepRun]:
        """The runs by name, each name made of what differs. Raises a SteersmanError for settings that cannot be."""
        named = self._combinations() if self.runs is None else self._from_file(Path(self.runs))
        shared = {field.name: getattr(self, field.name) for field in fields(TrainConfig)}
        found = {}
        for name, settings in named.items():
            hook = settings.pop("hook", None)
            with _naming(name):
                found[name] = SweepRun(config=TrainConfig(**(shared | settings)), hook=hook)
        return found

    def _combinations(self) -> dict[str, dict[str, Any]]:
        lists = {name: getattr(self, many) for name, many in _LISTS.items() if getattr(self, many)}
        combinations = [dict(zip(lists, values)) for values in product(*lists.values())]
        return {"_".join(f"{name}-{value}" for name, value in one.items()) or "run": one for one in combinations}

    def _from_file(self, path: Path) -> dict[str, dict[str, Any]]:
        if any(getattr(self, many) for many in _LISTS.values()):
            raise SteersmanError(f"give either --runs, or {', '.join(_LISTS.values())}, not both")
        named = read_yaml(path, _RunsFile)["runs"]
        return {name: typed(settings, _RunOfFile, f"{path}: run {name}") for name, settings in named.items()}


_LISTS = {
    "hook": "hooks",
    "architecture": "architectures",
    "d_sae": "d_saes",
    "k": "ks",
    "lr": "lrs",
    "batch_size": "batch_sizes",
    "aux_coefficient": "aux_coefficients",
    "seed": "seeds",
}
"""Settings that `SweepConfig` has lists of."""


@dataclass(frozen=True, kw_only=True)
class _RunsFile:
    runs: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _RunOfFile(TrainConfig):
    hook: str | None = None
