"""A training run from activations to a saved folder: the one path, for one process and many, one SAE and a sweep.

`Run` is one SAE on its way: opened (the schedule is settled and the folder checked), trained from its newest checkpoint
on, finished (measured, saved, plotted). `train` takes the steps of runs that read the same batches together.
`train_sae` opens its source and trains one; `sweep.py` trains many.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.config import merged
from steersman.device import pick_device
from steersman.errors import SteersmanError
from steersman.files import check_place
from steersman.kernels import using
from steersman.lm.origin import canonical_hook, runs_before
from steersman.parallel import Mesh, Ranks, rank_and_world_size, use_local_accelerator
from steersman.progress import progress
from steersman.sae import SAE, SAEConfig
from steersman.sae.architectures.crosscoder import MEDIAN_NORMS, SIDE_FVUS
from steersman.sae.metrics import FeatureSums, ReconstructionSums, defined
from steersman.train.capture.stream import ActivationStream
from steersman.train.mesh.latents import WholeSAE
from steersman.train.mesh.model_ranks import stream_from_model_ranks
from steersman.train.mesh.preemption import Preemption
from steersman.train.mesh.shared_stream import SharedStream
from steersman.train.reports.plots import plot_run
from steersman.train.run.batches import split_options, training_batches
from steersman.train.run.checkpoints import Checkpoints
from steersman.train.run.covariance import sample_covariance
from steersman.train.run.initial import InitialSAE
from steersman.train.run.inputs import make_inputs, scaled_inputs
from steersman.train.run.large_rows import largest_ordinary, ordinary_stats, say_large_rows, which_large
from steersman.train.run.metrics_log import MetricsLogger
from steersman.train.run.recipe import Recipe, TrainConfig, as_recorded, resolve, tokens_of
from steersman.train.run.run_folder import RunFolder, record_in
from steersman.train.run.trainer import Trainer
from steersman.train.store.batch import ActivationSource, HasContents, HooksSideBySide
from steersman.train.store.side_by_side import SideBySide, sides_of, stats_of_sides
from steersman.train.store.statistics import LARGE_NORM_RATIO, ActivationStats
from steersman.train.store.store import ActivationStore
from steersman.train.store.view import HookView
from steersman.version import __version__

log = logging.getLogger(__name__)


class Run:
    """One SAE on its way from rows to the run folder `out`. All ranks of its job call its methods together."""

    def __init__(self, source: ActivationSource, config: TrainConfig, out: Path, ranks: Ranks | None = None) -> None:
        """Settle the schedule and open the folder.

        Raises a SteersmanError for too few rows, kernels that the device lacks, or a folder that holds another run.
        """
        config = _with_what_is_labelled(as_recorded(config, record_in(out)), source, ranks)
        self.config, self.ranks, self.device = config, ranks or Ranks(Mesh()), pick_device(config.device)
        self.source, hook, d_in = source, source.hook_name, source.d_in
        what: dict[str, Any] = {}
        if config.hook_out is not None:
            beside = self.source = with_target(source, config.hook_out)
            hook, target = beside.hooks
            config = self.config = replace(config, hook_out=target)
            d_in, d_out = beside.width(hook), beside.width(target)
            what = {
                "skip_connection": config.skip_connection,
                "transcoder": True,
                "d_out": d_out,
                "hook_name_out": target,
                "apply_b_dec_to_input": False,
            }
        if SAE.architectures[config.architecture].side_by_side:
            what = {"sides": sides_of(source)}
        rows = _rows(source, config)
        with using(config.kernels, self.device):
            self.recipe = resolve(config, d_in, rows)
        data = {"hook_name": hook, "model_name": source.model_name, "fingerprint": source.fingerprint}
        data |= source.contents() if isinstance(source, HasContents) else {}
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=config.d_sae,
            k=config.k,
            architecture=config.architecture,
            options=config.options,
            group_sizes=config.group_sizes,
            hook_name=hook,
            model_name=source.model_name,
            **what,
        )
        record = {"training": config.record(), "recipe": asdict(self.recipe), "data": data}
        self._initial = None if config.init is None else InitialSAE(config.init, cfg)
        if self._initial is not None:
            cfg, record["init"] = self._initial.cfg, self._initial.digest
        self.folder, tokens = RunFolder(out), tokens_of(config, rows)
        known, self.finished = self.ranks.on_rank_zero(lambda: self.folder.open(record, config, tokens))
        """`finished`: whether the folder held the trained SAE when it was opened."""
        self.recipe = Recipe(**known["recipe"])
        metadata = {"version": __version__, "training": config.record() | known["recipe"], "data": data["fingerprint"]}
        extended = {"extended": known["extended"]} if known.get("extended") else {}
        initial = {"init": record["init"]} if "init" in record else {}
        self.cfg = replace(cfg, metadata=metadata | extended | initial)
        self.checkpoints = Checkpoints(
            self.folder.checkpoints, config.keep_checkpoints, self.ranks.background, self.recipe.decay_start
        )
        self.trainer: Trainer
        self._logger: MetricsLogger

    def close(self) -> None:
        """Let other processes have the folder."""
        self.folder.close()

    def _stats(self) -> list[ActivationStats]:
        """Statistics of what is read and, of a transcoder, of what is predicted; of a crosscoder, of every side."""
        if self.cfg.sides:
            return stats_of_sides(self.source)
        if isinstance(self.source, HooksSideBySide) and self.cfg.transcoder:
            return [self.source.stats(hook) for hook in (self.cfg.hook_name, self.cfg.hook_name_out)]
        return [self.source.stats()]

    @property
    def reading(self) -> tuple[object, ...]:
        """Runs with the same reading take the same batches, and their steps on the same kernels and ranks."""
        config, mesh = self.config, self.ranks.mesh
        labelled = bool(SAE.architectures[config.architecture].supervised)
        rows = self.source.hook_name, self.recipe.batch_size, config.seed, config.heldout_fraction, labelled
        return *rows, config.kernels, self.device, mesh

    @contextmanager
    def started(self) -> Iterator[None]:
        """The block trains: from the newest checkpoint on if there is one, and with a log. What it draws from PyTorch's
        own generator follows from the run's seed, and the generator is left as it was."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            yield from self._started()

    def _started(self) -> Iterator[None]:
        parts = self._stats()
        if self.ranks.is_rank_zero:
            names = [str(side) for side in self.cfg.sides] or [self.cfg.hook_name, self.cfg.hook_name_out]
            for hook, stats in zip(names, parts):
                say_large_rows(hook, stats, self.config.max_norm_ratio)
        if self.checkpoints.steps():
            inputs = scaled_inputs(self.cfg, parts)  # the checkpoint's take its place
        else:
            parts = ordinary_stats(self.source, self.config, self.recipe, parts)
            inputs = make_inputs(self.cfg, self.config, parts, self._covariance(parts[0]))
        initial, self._initial = (None if self.checkpoints.steps() else self._initial), None  # its memory is free again
        self.trainer = Trainer(self.config, self.recipe, parts, self.cfg, self.ranks, inputs, initial)
        if self.trainer.resume(self.checkpoints):
            log.info("%s: resuming from step %d of %d", self.folder.path, self.n_steps_done, self.recipe.n_steps)
        elif initial is None:
            with closing(batches_of(self)) as batches:
                self.trainer.fit_encoder_scale(next(batches))
        if self.n_steps_done < self.recipe.n_steps:
            self._check_space()
        zero = self.ranks.is_rank_zero
        self._logger = MetricsLogger(self.folder, self.config, self.recipe, self.n_steps_done, rank_zero=zero)
        with closing(self._logger):
            try:
                yield
            finally:
                self.checkpoints.settle()
        self.checkpoints.wait()

    def _covariance(self, stats: ActivationStats) -> Tensor | None:
        if self.config.whiten is None:
            return None
        return sample_covariance(self.source, self.config, self.recipe, stats, self.ranks, self.device)

    def _check_space(self) -> None:
        """Before the first step: is there room for a checkpoint beside those that are there, and for the SAE?"""
        needed = torch.tensor([self.trainer.state_bytes(), self.trainer.weight_bytes()])
        total = int(self.ranks.control.all_reduce_sum_(needed).sum())
        self.ranks.on_rank_zero(lambda: self.folder.check_space(total, "a checkpoint and the finished SAE"))

    @property
    def n_steps_done(self) -> int:
        return self.trainer.n_steps_done

    def step(self, rows: Tensor) -> None:
        """One step on this replica's rows of a batch, logged."""
        self.trainer.step(rows)
        self._logger.step_done(self.n_steps_done, self.trainer.read_metrics)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the state after the last step is one to keep."""
        step, recipe = self.n_steps_done, self.recipe
        return step == recipe.decay_start or (step < recipe.n_steps and step % self.config.checkpoint_every == 0)

    def save(self) -> None:
        """Write a checkpoint, in the background."""
        self.trainer.save(self.checkpoints)

    def finish(self) -> None:
        """Fold the scale in, measure on held-out rows, take the feature statistics, save and plot.

        All ranks measure, each with its latents and its replica's rows; rank 0 collects the weights and writes.
        """
        ranks, rows, cfg = self.ranks, self.recipe.batch_size, self.cfg
        left_out = self.trainer.large_rows.total() if self.trainer.large_rows.active else 0
        local, split, parts = self.trainer.finish(), self.trainer.inputs.split, self._stats()
        ratio = self.config.max_norm_ratio or LARGE_NORM_RATIO
        limits = [(len(stats.mean), largest_ordinary(stats, ratio)) for stats in parts]
        whole = local if ranks.mesh.world_size == 1 else WholeSAE(local, cfg, ranks.latent)
        part = {"rank": ranks.mesh.data_index, "world_size": ranks.mesh.data} if ranks.mesh.world_size > 1 else {}
        reading = {"drop_last": False, **split_options(self.config), **part}

        heldout = ReconstructionSums(cfg.out_width, cfg.d_sae, self.device, by_column=bool(cfg.sides))
        if ranks.mesh.world_size > 1:  # sums around one point add up
            heldout.shift = self.trainer.inputs.target_mean(parts).to(self.device)
        for batch in self.source.batches(rows, split="heldout", shuffle=False, **reading):
            both = batch.x.to(self.device)
            x, target = split(both)
            heldout.add(target, *whole.reconstruct(x), which_large(both, limits))
        for sums in (heldout.counts, heldout.sum, heldout.scalars, heldout.columns):
            ranks.data.all_reduce_sum_(sums)
        heldout.n_tokens = self._total(heldout.n_tokens)

        n_batches = max(1, self.config.statistics_tokens // rows)
        fraction = self.config.heldout_fraction
        there = self.source.n_batches(rows, split="train", heldout_fraction=fraction, drop_last=False)
        n_batches = n_batches if there is None else min(n_batches, there)
        features = FeatureSums(cfg.d_sae, self.device)
        batches = islice(self.source.batches(rows, split="train", **reading), n_batches)
        for batch in progress(batches, desc="feature statistics", total=n_batches, shown=ranks.is_rank_zero):
            both = batch.x.to(self.device)
            features.add(whole.encode_sparse(split(both)[0]), which_large(both, limits))
        ranks.data.all_reduce_max_(features.largest)
        ranks.data.all_reduce_sum_(features.total)
        ranks.data.all_reduce_sum_(features.counts)
        features.n_tokens = self._total(features.n_tokens)

        sae = whole.collect(ranks.is_rank_zero) if isinstance(whole, WholeSAE) else whole

        def save() -> None:
            if sae is not None:
                result = heldout.result()
                median_norm = self.source.stats().median_norm if cfg.sides else parts[-1].median_norm
                sae.feature_stats = features.stats(median_norm)
                sae.cfg.metadata["heldout"] = result.record()
                if cfg.sides:
                    columns = pairwise(accumulate((side.width for side in cfg.sides), initial=0))
                    sae.cfg.metadata[SIDE_FVUS] = [defined(heldout.fvu_of(*part)) for part in columns]
                    sae.cfg.metadata[MEDIAN_NORMS] = [stats.median_norm for stats in parts]
                if left_out:
                    sae.cfg.metadata["rows_left_out"] = left_out
                if result.undefined:
                    log.warning("held out: %s; the folder has null for them", result.undefined)
                log.info("held out: FVU %.4f, L0 %.1f, dead %.2f %%", result.fvu, result.l0, 100 * result.dead_fraction)
                try:
                    plot_run(self.folder.metrics(), sae.feature_stats, self.folder.path)
                    self.folder.retract()
                    sae.save(self.folder.path)
                except (SteersmanError, OSError) as error:
                    raise SteersmanError(
                        f"{error}; the checkpoints are intact: mend this and run the same command again to resume"
                    ) from error

        ranks.on_rank_zero(save)
        del self.trainer  # its memory is that of the next run

    def _total(self, n: int) -> int:
        return int(self.ranks.data.all_reduce_sum_(torch.tensor([n], dtype=torch.int64, device=self.device)))

    def load(self) -> SAE:
        """The trained SAE: on the device, or on the CPU of ranks that are not rank 0."""
        return SAE.load(self.folder.path, self.device if self.ranks.is_rank_zero else "cpu")


def _with_what_is_labelled(config: TrainConfig, source: ActivationSource, ranks: Ranks | None) -> TrainConfig:
    """The settings of a run whose architecture trains on labels: those of the plain architecture where the store has
    labels and none that is known. Raises a SteersmanError for a source without labels, and for several processes."""
    plain = SAE.architectures[config.architecture].supervised
    if not plain:
        return config
    if not isinstance(source, ActivationStore | HookView | SideBySide) or not source.has_labels:
        what = source if isinstance(source, ActivationStore | HookView | SideBySide) else "a stream of activations"
        raise SteersmanError(
            f"architecture {config.architecture!r} trains on labels, and {what} has none: cache labelled text with "
            "label_column"
        )
    if ranks is not None and ranks.mesh.world_size > 1:
        raise SteersmanError(f"architecture {config.architecture!r} trains in one process: its latent 0 is on one rank")
    if source.n_labelled(heldout_fraction=config.heldout_fraction):
        return config
    log.warning("none of the rows to train on has a label: this trains a plain %s SAE", plain)
    return replace(config, architecture=plain, options={})


def check_predicted(read: str, hook_out: str) -> None:
    """Raise a SteersmanError where a transcoder of what is at `read` cannot predict what is at `hook_out`, as far as
    their names tell."""
    if canonical_hook(hook_out) == canonical_hook(read):
        raise SteersmanError(f"hook_out = {hook_out} is what is read: a transcoder predicts another hook point")
    if runs_before(hook_out, read):
        raise SteersmanError(
            f"hook_out = {hook_out} comes before {read} in the model: a transcoder predicts what follows"
        )


def with_target(source: ActivationSource, hook_out: str) -> HooksSideBySide:
    """The source with two hook points side by side: what a transcoder reads and, `hook_out`, what it predicts.

    Raises a SteersmanError where the source does not have both, or where what is predicted does not come later in the
    model than what is read."""
    if isinstance(source, ActivationStore):
        source = HookView(source, source.hook_name)
    if not isinstance(source, HooksSideBySide):
        raise SteersmanError(f"hook_out = {hook_out} needs a store or stream that has it beside what is read")
    hook_out, read = source.resolve_hook(hook_out), source.hooks[0]
    check_predicted(read, hook_out)
    if isinstance(source, HookView) and len(source.hooks) == 1:
        return HookView(source.store, [read, hook_out])
    if source.hooks[1:] != (hook_out,):
        raise SteersmanError(
            f"hook_out = {hook_out} needs it beside one other hook point, and the source has "
            f"{', '.join(source.hooks)}: give hook=({read!r}, {hook_out!r})"
        )
    return source


def _rows(source: ActivationSource, config: TrainConfig) -> int | None:
    """Rows to train on; None for a stream without end. Raises SteersmanError for a store that holds out too few."""
    fraction = config.heldout_fraction
    rows = source.n_batches(1, split="train", heldout_fraction=fraction)
    if rows and isinstance(source, ActivationStore | HookView | SideBySide):
        heldout = source.n_batches(1, split="heldout", heldout_fraction=fraction)
        if heldout < 2:
            raise SteersmanError(
                f"{heldout} held-out row is too few to measure a variance: give more text, or a heldout_fraction above "
                f"{fraction:g}"
            )
    return rows


def batches_of(run: Run, step: int = 0) -> Generator[Tensor]:
    """The batches that a run takes from `step` on, and all runs with the same `reading`."""
    return training_batches(run.source, run.config, run.recipe, run.ranks, step, run.device)


def train(runs: Sequence[Run], preemption: Preemption | None = None) -> None:
    """Train unfinished runs with the same `reading` to their last steps, each batch read once, and finish them.

    Asked to end (SIGTERM, Ctrl-C; by `preemption`, which is entered, if it is given) they are all saved in the same
    step, and a PreemptedError or KeyboardInterrupt is raised.
    """
    try:
        with using(runs[0].config.kernels, runs[0].device):
            _train(runs, preemption)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(runs[0])) from None


def _train(runs: Sequence[Run], preemption: Preemption | None) -> None:
    first = runs[0]
    with ExitStack() as stack:
        if preemption is None:
            elsewhere = lambda: getattr(first.source, "preempted", False)  # noqa: E731
            preemption = stack.enter_context(Preemption(first.ranks.control, elsewhere))
        for run in runs:
            stack.enter_context(run.started())
        try:
            _take_steps(runs, preemption)
        except KeyboardInterrupt:
            if first.ranks.mesh.world_size == 1 and not preemption.interrupted:
                for run in runs:
                    if run.trainer.between_steps:
                        run.save()
            raise
    for run in runs:
        run.finish()


def _interrupted(run: Run) -> str:
    """What is true of a run that Ctrl-C ended: what is on disk now."""
    saved = run.checkpoints.steps()
    if not saved:
        return f"interrupted before the first checkpoint of {run.folder.path}; the same command begins again"
    return f"interrupted; the same command resumes {run.folder.path} from step {saved[-1]}"


def _take_steps(runs: Sequence[Run], preemption: Preemption) -> None:
    start, stop = min(run.n_steps_done for run in runs), max(run.recipe.n_steps for run in runs)
    if start >= stop:
        return
    with closing(batches_of(runs[0], start)) as batches:
        for step, x in enumerate(batches, start + 1):
            for run in runs:
                if run.n_steps_done < step <= run.recipe.n_steps:
                    run.step(x)
            due = [run for run in runs if run.n_steps_done == step and run.is_checkpoint_due]
            if step == stop:
                for run in due:
                    run.save()
                return
            if preemption.now():
                for run in runs:
                    run.save()
                for run in runs:
                    run.checkpoints.wait()
                raise preemption.error(
                    f"asked to end at step {step}, which is saved; the same command resumes from here"
                )
            for run in due:
                run.save()


def train_sae(
    source: ActivationSource | Callable[[], ActivationSource] | str | os.PathLike[str],
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> SAE:
    """Train an SAE on `source` and save it in the run folder `out`; see `run_folder` for what it holds.

    Running it again with the same arguments resumes from the last checkpoint and ends with the same weights, bit for
    bit, as a run that was never interrupted; a finished run is loaded. Started by `torchrun`, all ranks train one SAE.

    Args:
        source: an `ActivationStore` or its folder, a stream, or a function that makes one. With `model_ranks` only
            those ranks call the function, so that only they load the model.
        config: the settings; `TrainConfig(d_sae=..., k=...)` is enough.
        out: the run folder.
        overrides: fields of `TrainConfig`, over those of `config`: `train_sae(store, d_sae=512, k=16, out="run")`.

    Returns:
        The SAE in eval form on the training device, with its feature statistics; on the CPU of ranks that are not
        rank 0.

    Raises:
        SteersmanError: a folder that holds another run, too few rows, activations that do not vary, a loss that is not
            finite, a full disk.
    """
    if out is None:
        raise SteersmanError("train_sae needs out=...: the folder for the run")
    config = merged(TrainConfig, config, overrides)
    rank, n_ranks = rank_and_world_size()
    check_place(out, "folder", keep=n_ranks > 1)  # another rank may be trying it too
    if isinstance(source, str | os.PathLike):
        source = ActivationStore.open(source)
    if n_ranks > 1:
        use_local_accelerator()
    with ExitStack() as stack:
        if config.model_ranks:
            make: Callable[[], ActivationSource] = source if callable(source) else lambda: source
            streamed = stream_from_model_ranks(
                make, config.model_ranks, config.timeout_seconds, pick_device(config.device)
            )
            source_here = stack.enter_context(streamed)
            n_ranks -= config.model_ranks
        else:
            source_here = source() if callable(source) else source
        if source_here is not None:  # else this rank has run the model for the others
            source_here, ranks = _opened(source_here, config, rank, n_ranks, stack)
            run = Run(source_here, config, Path(out), ranks)
            stack.callback(run.close)
            if run.finished:
                log.info("%s is finished; loading it", out)
            else:
                train([run])
            ranks.control.barrier()
    return SAE.load(Path(out), pick_device(config.device) if rank == 0 else "cpu")


def _opened(
    source: ActivationSource, config: TrainConfig, rank: int, n_ranks: int, stack: ExitStack
) -> tuple[ActivationSource, Ranks]:
    """The source as this rank of those that train reads it, and the ranks."""
    if n_ranks > 1 and isinstance(source, ActivationStream):
        source.run_part(rank, n_ranks)
    ranks = stack.enter_context(Ranks(mesh_of(source, config, rank, n_ranks), config.timeout_seconds))
    return SharedStream(source, ranks) if n_ranks > 1 and isinstance(source, ActivationStream) else source, ranks


def mesh_of(source: ActivationSource, config: TrainConfig, rank: int, n_ranks: int) -> Mesh:
    """The layout in which `n_ranks` train an SAE on `source`; one process needs none, whatever the configuration says.

    Raises a SteersmanError, naming sizes that fit, when latents or rows do not divide evenly.
    """
    if n_ranks == 1:
        return Mesh()
    batch_size = resolve(config, source.d_in, _rows(source, config)).batch_size
    return Mesh.over(n_ranks, rank=rank, latent=config.latent_shards, d_sae=config.d_sae, batch_size=batch_size)
