"""Writing an activation store: rows in, finished shards out, and a manifest that never names an unfinished one."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from steersman.errors import SteersmanError
from steersman.files import fsync_folder
from steersman.folders import FolderLock, remove_files
from steersman.train.store.folder import (
    UNFINISHED,
    CheckText,
    check_same_store,
    next_short,
    only_begun,
    remove_shards,
    remove_store,
    shard_name,
)
from steersman.train.store.manifest import MANIFEST, ROWS, STATISTICS, Manifest, ShardRecord
from steersman.train.store.rows import row_columns
from steersman.train.store.shards import (
    DATA_OFFSET,
    DTYPES,
    ShardWriter,
    check_content,
    check_size,
    disk_errors,
    load_arrays,
    write_arrays,
)
from steersman.train.store.statistics import ActivationStats, StatsSums, nonfinite_error, row_norms

log = logging.getLogger(__name__)

ROW_BYTES = 16
"""Bytes of a row's token id, document id and position."""

_VERIFIED_AT_RESUME = 4 << 30
"""Of stores up to this many bytes the finished shards are compared with their checksums before more are added, which
takes a few seconds; of larger ones their sizes and row data are, and the rest when it is read."""


def merged_sums(folder: Path, manifest: Manifest) -> dict[str, StatsSums]:
    """The statistics' sums of each hook point over all finished shards, added in the order of the shards."""
    sums = {hook: StatsSums(width) for hook, width in manifest.hooks.items()}
    for shard in manifest.shards:
        for hook, total in sums.items():
            file = folder / ROWS / f"{shard.name}.safetensors"
            total.add_arrays(load_arrays(file, f"{hook}/", shard.files[ROWS]))
    return sums


def _finished(folder: Path) -> bool:
    """Whether there is a store that nothing will be written to: many may look at once whether it is theirs."""
    return (folder / MANIFEST).exists() and Manifest.load(folder).complete


class StoreWriter:
    """Appends rows to a store, shard by shard; use `begin`, then `append` until done, then `finish` (or `abandon`).

    Every shard but the last has exactly `shard_rows` rows. A shard's cursor names the forward batch in which it ended
    and how many rows of that batch are stored; a run that resumes there computes the same batch again, so its numbers,
    and the files, are those of an uninterrupted run. `keep` stores the rows of an unfinished shard as well, under a
    name of its own; whoever resumes begins that shard with them.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, shard_rows: int, max_rows: int | None, skip_bad: bool
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._shard_rows, self._max_rows, self._skip_bad = shard_rows, max_rows, skip_bad
        self._folders = manifest.folders()
        self._open: dict[str, ShardWriter] = {}
        self._sums: dict[str, StatsSums] = {}
        self._rows: list[tuple[np.ndarray, ...]] = []
        self._skipped = 0
        self._cursor: Mapping[str, int] | None = None
        last = manifest.shards[-1].cursor if manifest.shards else None
        self._done_of_batch = last["rows"] if last else 0
        self._finished_rows, self._open_rows = manifest.n_rows, 0
        self._short = self._find_short()
        self._text: Mapping[str, Any] | None = None
        self._failed = False
        self._lock: FolderLock | None = None
        self._made = False

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
        check_text: CheckText | None = None,
        lock: FolderLock | None = None,
        check_files: bool = True,
    ) -> Self:
        """Open the store that `manifest` (without shards) describes at `folder`, new or left off by an interrupted run.

        `rows_before` rows of the first batch are stored elsewhere and left out here. `check_text` says whether a store
        that is there is of the same text. A `lock` of the folder that the caller holds becomes the writer's. Finished
        shards are looked at unless `check_files` is False, as where some may have been moved away.
        Raises `SteersmanError` when the folder holds other things, a store of another configuration, a store that
        another process is writing, or one that is damaged.
        """
        with disk_errors(folder, "choose another place for the store"):
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            shared = lock is None and _finished(folder)
            lock = lock or FolderLock(folder, "this store", shared=shared)
            try:
                asked, begun = manifest, (folder / MANIFEST).exists()
                if begun:
                    manifest = check_same_store(folder, manifest, check_text)
                elif not only_begun(folder, manifest):
                    raise SteersmanError(
                        f"{folder}: exists and is not an activation store; choose an empty or new folder"
                    )
                if shared and not manifest.complete:
                    raise SteersmanError(f"{folder}: the finished store that was there is being replaced; try again")
                writer = cls(
                    folder, manifest, shard_rows=shard_rows, max_rows=max_rows, skip_bad=on_nonfinite == "skip"
                )
                writer._made = made or begun
                if not manifest.shards:
                    writer._done_of_batch = rows_before
                if not manifest.complete:
                    if begun and manifest is asked:
                        there = Manifest.load(folder)
                        remove_store(folder, there, [0], itself=False)
                    writer._prepare()
                    if check_files:
                        writer._check_shards()
            except BaseException:
                lock.release()
                raise
        if manifest.complete:
            lock.release()
        else:
            writer._lock = lock
        return writer

    def _prepare(self) -> None:
        """Make the folders, and remove what an interrupted run left beyond the last shard of the manifest."""
        first = len(self.manifest.shards)
        end = first + 2 if self._max_rows is None else max(-(-self._max_rows // self._shard_rows), first) + 1
        for name in [ROWS, *self._folders.values()]:
            (self.folder / name).mkdir(exist_ok=True)
        known = [f"{shard.name}.safetensors" for shard in self.manifest.shards[-2:]]
        remove_shards(self.folder, self.manifest, range(max(first - 1, 0), end), known)
        remove_files(self.folder, (*UNFINISHED, STATISTICS))
        if not self.manifest.shards:
            self.manifest.save(self.folder)

    def _check_shards(self) -> None:
        """`SteersmanError` when a finished shard is not as its record says."""
        whole = sum(record.bytes for shard in self.manifest.shards for record in shard.files.values())
        for shard in self.manifest.shards:
            for name, record in shard.files.items():
                file = self.folder / name / f"{shard.name}.safetensors"
                if name == ROWS or whole <= _VERIFIED_AT_RESUME:
                    check_content(file, record, 0 if name == ROWS else DATA_OFFSET)
                else:
                    check_size(file, record)

    def _find_short(self) -> ShardRecord | None:
        """The last shard, where `keep` left it without all of its rows."""
        shards = self.manifest.shards
        if self.manifest.complete or not shards or shards[-1].name == shard_name(len(shards) - 1):
            return None
        return shards[-1]

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
        marks: Mapping[int, str] | None = None,
        labels: np.ndarray | None = None,
        show_token: Callable[[int], str] = str,
    ) -> None:
        """Add rows: an [n, width] tensor for each hook point, on any device, the three row arrays [n], and the labels
        [n] where the store has them.

        `cursor` says where in the text this batch starts, and `marks` has the text's digest after each of its
        documents. Rows beyond the store's size are dropped, and so are those of the first batch that an earlier run
        stored. Raises `SteersmanError` for a row that is not finite, naming its document and token with `show_token`,
        unless such rows are to be skipped; and when the rows that were stored before were of other tokens.
        """
        if self._failed:
            raise SteersmanError(f"{self.folder}: an earlier write failed; begin again to resume")
        if self.full:
            return
        if (labels is not None) != self.manifest.has_labels:
            raise SteersmanError(f"{self.folder}: rows come {'with' if labels is not None else 'without'} labels here")
        columns = (token_ids, doc_ids, positions) if labels is None else (token_ids, doc_ids, positions, labels)
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
        if first and self.manifest.shards:
            self._check_tokens(np.asarray(token_ids)[good[:first]])
        # Rows of the batch before `low` were dealt with when the shard that the cursor belongs to was written.
        low = 0 if not first else n if first == len(good) else int(good[first - 1]) + 1
        with self._disk_errors():
            while low < n and not self.full:
                if not self._open:
                    self._start_shard()
                room = self._shard_rows - self._open_rows
                if self._max_rows is not None:
                    room = min(room, self._max_rows - self.n_rows)
                last = first + room
                high = int(good[last - 1]) + 1 if last < len(good) else n
                kept = good[first:last]
                part: Any = slice(low, high) if len(kept) == high - low else kept
                for hook, x in stored.items():
                    index = part if isinstance(part, slice) else torch.from_numpy(part).to(x.device)
                    self._sums[hook].add(x[index], norms[hook][index])
                    self._open[hook].append(x[index].cpu())
                self._rows.append(tuple(column[part] for column in columns))
                self._open_rows += len(kept)
                self._skipped += high - low - len(kept)
                first, low = first + len(kept), high
                self._cursor = None if cursor is None else {**cursor, "rows": first}
                if marks is not None and len(kept):
                    document = int(doc_ids[kept[-1]])
                    digest = marks.get(document)
                    self._text = None if digest is None else {"document": document, "digest": digest}
                if self._open_rows >= self._shard_rows or self.full:
                    self._end_shard()
        self._failed = False

    def _disk_errors(self) -> Any:
        done = len(self.manifest.shards)
        advice = f"{done} finished shards are intact: free space and run the same command again to resume"
        return disk_errors(self.folder, advice)

    def _check_tokens(self, token_ids: np.ndarray) -> None:
        """Whether the rows stored last are of these tokens, the last ones of which they should be."""
        shard = self.manifest.shards[-1]
        stored = load_arrays(self.folder / ROWS / f"{shard.name}.safetensors", "token_ids")[""]
        n = min(len(stored), len(token_ids))
        if n and not np.array_equal(stored[-n:], token_ids[-n:]):
            raise SteersmanError(
                f"{self.folder}: the text or the tokenizer changed: the rows stored last are of other tokens than now "
                "come at their place; choose another folder, or delete this one"
            )

    @property
    def _number(self) -> int:
        return len(self.manifest.shards) - (self._short is not None)

    def _start_shard(self) -> None:
        """Open the next shard; where an interrupted run left its first rows, with those."""
        short, name = self._short, f"{shard_name(self._number)}.safetensors"
        for hook, width in self.manifest.hooks.items():
            folder = self._folders[hook]
            self._open[hook] = ShardWriter(self.folder / folder / name, hook, width, self.manifest.dtype)
            self._sums[hook] = StatsSums(width)
            if short is not None:
                file = self.folder / folder / f"{short.name}.safetensors"
                self._open[hook].append_file(file, short.rows, short.files[folder])
        if short is not None:
            arrays = load_arrays(self.folder / ROWS / f"{short.name}.safetensors", expected=short.files[ROWS])
            for hook, sums in self._sums.items():
                prefix = f"{hook}/"
                sums.add_arrays({n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)})
            self._rows = [tuple(arrays[name] for name in row_columns(self.manifest.has_labels))]
            self._finished_rows, self._open_rows = self._finished_rows - short.rows, short.rows
            self._skipped, self._cursor, self._text = short.skipped, short.cursor, short.text

    def _end_shard(self, short: int | None = None) -> None:
        """Write the open shard's files and the manifest that names them. `short` is of `shard_name`."""
        columns = [np.concatenate(part) for part in zip(*self._rows)]
        name = shard_name(self._number, short)
        for writer in self._open.values():
            writer.path = writer.path.with_name(f"{name}.safetensors")
        files = {self._folders[hook]: writer.close() for hook, writer in self._open.items()}
        for folder in self._folders.values():
            fsync_folder(self.folder / folder)
        kinds = row_columns(self.manifest.has_labels)
        arrays = {name: column.astype(kind) for (name, kind), column in zip(kinds.items(), columns)}
        for hook, sums in self._sums.items():
            arrays |= {f"{hook}/{key}": array for key, array in sums.arrays().items()}
        files[ROWS] = write_arrays(self.folder / ROWS / f"{name}.safetensors", arrays)
        shard = ShardRecord(
            name=name, rows=self._open_rows, files=files, cursor=self._cursor, skipped=self._skipped, text=self._text
        )
        manifest = replace(self.manifest, shards=(*self.manifest.shards[: self._number], shard))
        manifest.save(self.folder)
        replaced, self._short = self._short, None
        self.manifest = manifest
        self._open, self._sums, self._rows, self._skipped = {}, {}, [], 0
        self._finished_rows, self._open_rows = manifest.n_rows, 0
        if replaced is not None:
            for folder in files:
                remove_files(self.folder / folder, [f"{replaced.name}.safetensors"])

    def end_shard(self) -> None:
        """End the unfinished shard, if there is one, with the rows that it has."""
        with self._disk_errors():
            if self._open:
                self._end_shard()

    def keep(self) -> int:
        """After an interruption: store what there is of the unfinished shard, and return the number of rows stored.

        Nothing of it is stored after a failed write, as half a batch would be no place to go on from.
        """
        if self._open and self._open_rows and not self._failed and not self.manifest.complete:
            known = self._short.rows if self._short is not None else 0
            if self._open_rows > known:
                with self._disk_errors():
                    self._end_shard(0 if self._short is None else next_short(self._short.name))
        return self.manifest.n_rows

    def finish(self, *, release: bool = True) -> None:
        """End the last shard, write the statistics, mark the store complete and, if `release`, let go of it."""
        if self.manifest.complete:
            return
        with self._disk_errors():
            if self._short is not None and not self._open:
                self._start_shard()  # the text ended where an interrupted run had
            if self._open:
                self._end_shard()
            if not self.manifest.n_rows:
                raise SteersmanError(f"{self.folder}: nothing to store: every token was left out, or there was no text")
            sums = merged_sums(self.folder, self.manifest)
            arrays = {f"{hook}/{key}": a for hook, total in sums.items() for key, a in total.arrays().items()}
            file = write_arrays(self.folder / STATISTICS, arrays)
            figures = {hook: _figures(total.stats()) for hook, total in sums.items()}
            manifest = replace(self.manifest, complete=True, statistics=figures, statistics_file=file)
            manifest.save(self.folder)
            self.manifest = manifest
        if release:
            self.abandon()

    def abandon(self) -> None:
        """Drop the unfinished shard, if there is one, and let go of the store; finished shards stay."""
        for writer in self._open.values():
            writer.abandon()
        self._open, self._rows, self._open_rows = {}, [], 0
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def remove_if_empty(self) -> None:
        """Remove what `begin` made when the store holds no shard: a failed first try leaves nothing of its own."""
        if not self.manifest.shards:
            remove_store(self.folder, self.manifest, [0], itself=self._made)


def _figures(stats: ActivationStats) -> dict[str, float]:
    large = {"n_large": stats.n_large, "large_share": stats.large_share} if stats.n_large else {}
    return {
        "mean_norm": stats.mean_norm,
        "median_norm": stats.median_norm,
        "mean_squared_norm": stats.mean_squared_norm,
        **large,
    }
