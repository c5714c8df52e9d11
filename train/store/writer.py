"""Writing an activation store: rows in, finished shards out, and a manifest that never names an unfinished one."""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from steersman.config import differences
from steersman.errors import SteersmanError
from steersman.files import fsync_folder, temporary_path
from steersman.train.store.manifest import MANIFEST, ROWS, STATISTICS, Manifest, ShardRecord
from steersman.train.store.shards import DTYPES, ShardWriter, disk_errors, load_arrays, write_arrays
from steersman.train.store.statistics import ActivationStats, StatsSums, nonfinite_error, row_norms

log = logging.getLogger(__name__)

_UNFINISHED = [name for file in (MANIFEST, STATISTICS) for name in (temporary_path(Path(file)).name, f"{file}.tmp")]
"""What a killed process may leave in the store's folder; version 0.1 left it under the second names."""

ROW_BYTES = 16
"""Bytes of a row's token id, document id and position."""


def check_same_store(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest in `folder`, or `manifest` where nothing is stored yet; `SteersmanError` naming the fields when the
    store there is of another configuration."""
    there = Manifest.load(folder)
    if not there.complete and not there.shards:
        return manifest  # nothing was written yet: there is nothing to be at odds with
    wanted, found = ({**m.config, "dtype": m.dtype, "hooks": m.hooks} for m in (manifest, there))
    wanted["model_name"], found["model_name"] = manifest.model_name, there.model_name
    if difference := differences(found, wanted):
        raise SteersmanError(
            f"{folder}: holds a store of another configuration: {difference}; choose another folder, or delete this one"
        )
    return there


def merged_sums(folder: Path, manifest: Manifest) -> dict[str, StatsSums]:
    """The statistics' sums of each hook point over all finished shards, added in the order of the shards."""
    sums = {hook: StatsSums(width) for hook, width in manifest.hooks.items()}
    for shard in manifest.shards:
        for hook, total in sums.items():
            total.add_arrays(load_arrays(folder / ROWS / f"{shard.name}.safetensors", f"{hook}/"))
    return sums


class StoreWriter:
    """Appends rows to a store, shard by shard; use `begin`, then `append` until done, then `finish` (or `abandon`).

    Every shard but the last has exactly `shard_rows` rows. A shard's cursor names the forward batch in which it ended
    and how many rows of that batch are stored; a run that resumes there computes the same batch again, so its numbers,
    and the files, are those of an uninterrupted run.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, shard_rows: int, max_rows: int | None, skip_bad: bool
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._shard_rows, self._max_rows, self._skip_bad = shard_rows, max_rows, skip_bad
        self._folders = manifest.folders()
        self._open: dict[str, ShardWriter] = {}
        self._sums: dict[str, StatsSums] = {}
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._skipped = 0
        self._cursor: Mapping[str, int] | None = None
        last = manifest.shards[-1].cursor if manifest.shards else None
        self._done_of_batch = last["rows"] if last else 0
        self._finished_rows, self._open_rows = manifest.n_rows, 0
        self._failed = False
        self._lock: int | None = None

    @classmethod
    def begin(
        cls,
        folder: Path,
        manifest: Manifest,
        *,
        shard_rows: int,
        max_rows: int | None = None,
        on_nonfinite: str = "error",
        rows_before: int = 0,
    ) -> Self:
        """Open the store that `manifest` (without shards) describes at `folder`, new or left off by an interrupted run.

        `rows_before` rows of the first batch are stored elsewhere and left out here.
        Raises `SteersmanError` when the folder holds other things, a store of another configuration, or a store that
        another process is writing.
        """
        with disk_errors(folder, "choose another place for the store"):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / MANIFEST).exists():
                manifest = check_same_store(folder, manifest)
            elif not _only_begun(folder, manifest):
                raise SteersmanError(f"{folder}: exists and is not an activation store; choose an empty or new folder")
            writer = cls(folder, manifest, shard_rows=shard_rows, max_rows=max_rows, skip_bad=on_nonfinite == "skip")
            if not manifest.shards:
                writer._done_of_batch = rows_before
            if not manifest.complete:
                writer._take_lock()
                try:
                    writer._prepare()
                except BaseException:
                    writer.abandon()
                    raise
        return writer

    def _take_lock(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise SteersmanError(f"{self.folder}: another process is writing this store; wait for it to end") from None
        except OSError as error:  # some network file systems know no locks
            log.debug("cannot lock %s: %s", self.folder, error)
        self._lock = descriptor

    def _prepare(self) -> None:
        """Make the folders, and remove what an interrupted run left beyond the last shard of the manifest."""
        known = {f"{shard.name}.safetensors" for shard in self.manifest.shards}
        for name in [ROWS, *self._folders.values()]:
            (self.folder / name).mkdir(exist_ok=True)
            for file in (self.folder / name).iterdir():
                if file.name not in known:
                    file.unlink()
        for name in (*_UNFINISHED, STATISTICS):
            (self.folder / name).unlink(missing_ok=True)
        if not self.manifest.shards:
            self.manifest.save(self.folder)

    @property
    def n_rows(self) -> int:
        """Rows written so far, those of the unfinished shard included."""
        return self._finished_rows + self._open_rows

    @property
    def full(self) -> bool:
        """Whether the store holds as many rows as it is to hold."""
        return self._max_rows is not None and self.n_rows >= self._max_rows

    def append(
        self,
        activations: Mapping[str, torch.Tensor],
        token_ids: np.ndarray,
        doc_ids: np.ndarray,
        positions: np.ndarray,
        *,
        cursor: Mapping[str, int] | None = None,
        show_token: Callable[[int], str] = str,
    ) -> None:
        """Add rows: an [n, width] tensor for each hook point, on any device, and the three row arrays [n].

        `cursor` says where in the text this batch starts. Rows beyond the store's size are dropped, and so are those of
        the first batch that an earlier run stored. Raises
        `SteersmanError` for a row that is not finite, naming its document and token with `show_token`, unless such
        rows are to be skipped.
        """
        if self._failed:
            raise SteersmanError(f"{self.folder}: an earlier write failed; begin again to resume")
        if self.full:
            return
        self._failed = True  # until all of it is written: half a batch must never become part of a shard
        dtype = DTYPES[self.manifest.dtype][0]
        stored = {hook: activations[hook].to(dtype) for hook in self.manifest.hooks}
        norms = {hook: row_norms(x) for hook, x in stored.items()}
        n = len(token_ids)
        finite = np.ones(n, dtype=bool)
        for hook, values in norms.items():
            here = torch.isfinite(values).cpu().numpy()
            if not self._skip_bad and not here.all():
                row = int(np.argmin(here))
                token = int(token_ids[row])
                place = (token, show_token(token), int(positions[row]), int(doc_ids[row]))
                raise nonfinite_error(hook, activations[hook][row], self.manifest.dtype, *place)
            finite &= here
        good = np.flatnonzero(finite)
        first, self._done_of_batch = self._done_of_batch, 0
        # Rows of the batch before `low` were dealt with when the shard that the cursor belongs to was written.
        low = 0 if not first else n if first == len(good) else int(good[first - 1]) + 1
        with self._disk_errors():
            while low < n and not self.full:
                room = self._shard_rows - self._open_rows
                if self._max_rows is not None:
                    room = min(room, self._max_rows - self.n_rows)
                last = first + room
                high = int(good[last - 1]) + 1 if last < len(good) else n
                kept = good[first:last]
                part: Any = slice(low, high) if len(kept) == high - low else kept
                if not self._open:
                    self._start_shard()
                for hook, x in stored.items():
                    index = part if isinstance(part, slice) else torch.from_numpy(part).to(x.device)
                    self._sums[hook].add(x[index], norms[hook][index])
                    self._open[hook].append(x[index].cpu())
                self._rows.append((token_ids[part], doc_ids[part], positions[part]))
                self._open_rows += len(kept)
                self._skipped += high - low - len(kept)
                first, low = first + len(kept), high
                self._cursor = None if cursor is None else {**cursor, "rows": first}
                if self._open_rows >= self._shard_rows or self.full:
                    self._end_shard()
        self._failed = False

    def _disk_errors(self) -> Any:
        done = len(self.manifest.shards)
        advice = f"{done} finished shards are intact: free space and run the same command again to resume"
        return disk_errors(self.folder, advice)

    def _start_shard(self) -> None:
        name = f"{len(self.manifest.shards):05d}.safetensors"
        for hook, width in self.manifest.hooks.items():
            path = self.folder / self._folders[hook] / name
            self._open[hook] = ShardWriter(path, hook, width, self.manifest.dtype)
            self._sums[hook] = StatsSums(width)

    def _end_shard(self) -> None:
        token_ids, doc_ids, positions = (np.concatenate(part) for part in zip(*self._rows))
        name = f"{len(self.manifest.shards):05d}"
        files = {self._folders[hook]: writer.close() for hook, writer in self._open.items()}
        for folder in self._folders.values():
            fsync_folder(self.folder / folder)
        arrays = {
            "token_ids": token_ids.astype(np.int32),
            "doc_ids": doc_ids.astype(np.int64),
            "positions": positions.astype(np.int32),
        }
        for hook, sums in self._sums.items():
            arrays |= {f"{hook}/{key}": array for key, array in sums.arrays().items()}
        files[ROWS] = write_arrays(self.folder / ROWS / f"{name}.safetensors", arrays)
        shard = ShardRecord(name=name, rows=self._open_rows, files=files, cursor=self._cursor, skipped=self._skipped)
        manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
        manifest.save(self.folder)
        self.manifest = manifest
        self._open, self._sums, self._rows, self._skipped = {}, {}, [], 0
        self._finished_rows, self._open_rows = manifest.n_rows, 0

    def end_shard(self) -> None:
        """End the unfinished shard, if there is one, with the rows that it has."""
        with self._disk_errors():
            if self._open:
                self._end_shard()

    def finish(self) -> None:
        """End the last shard, write the statistics and mark the store complete."""
        if self.manifest.complete:
            return
        with self._disk_errors():
            if self._open:
                self._end_shard()
            if not self.manifest.n_rows:
                raise SteersmanError(f"{self.folder}: nothing to store: every token was left out, or there was no text")
            sums = merged_sums(self.folder, self.manifest)
            arrays = {f"{hook}/{key}": a for hook, total in sums.items() for key, a in total.arrays().items()}
            write_arrays(self.folder / STATISTICS, arrays)
            figures = {hook: _figures(total.stats()) for hook, total in sums.items()}
            manifest = replace(self.manifest, complete=True, statistics=figures)
            manifest.save(self.folder)
            self.manifest = manifest
        self.abandon()

    def abandon(self) -> None:
        """Drop the unfinished shard, if there is one, and let go of the store; finished shards stay."""
        for writer in self._open.values():
            writer.abandon()
        self._open, self._rows, self._open_rows = {}, [], 0
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove_if_empty(self) -> None:
        """Delete the store's folder when it holds no finished shard: a failed first try leaves nothing."""
        if not self.manifest.shards:
            shutil.rmtree(self.folder, ignore_errors=True)


def _only_begun(folder: Path, manifest: Manifest) -> bool:
    """Whether a folder without a manifest holds at most what `begin` makes before it: a run may end in between."""
    folders = (ROWS, *manifest.folders().values())
    for child in folder.iterdir():
        empty = child.name in folders and child.is_dir() and not any(child.iterdir())
        if not empty and child.name not in _UNFINISHED:
            return False
    return True


def _figures(stats: ActivationStats) -> dict[str, float]:
    large = {"n_large": stats.n_large, "large_share": stats.large_share} if stats.n_large else {}
    return {
        "mean_norm": stats.mean_norm,
        "median_norm": stats.median_norm,
        "mean_squared_norm": stats.mean_squared_norm,
        **large,
    }
