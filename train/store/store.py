"""Activations on disk, read in a shuffled order: the `ActivationStore`.

The main path is `batches`: a `RowOrder` says which rows a batch holds, and threads gather them from the mapped shards.
Files and their rules are described in `manifest.py`.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch

from steersman.errors import SteersmanError, near_names
from steersman.files import format_bytes
from steersman.html import card
from steersman.lm.origin import Origin, canonical_hook, check_same_origin
from steersman.sae import SAE
from steersman.train.store.batch import ActivationBatch, RowInfo, batches_in
from steersman.train.store.manifest import ROWS, STATISTICS, Manifest
from steersman.train.store.mapping import MappedShards, ReadShards, first_slots, open_shards
from steersman.train.store.order import WINDOW_BYTES, RowOrder
from steersman.train.store.reading import BufferPool, ReadingPlan, read_ahead
from steersman.train.store.rows import RowTable
from steersman.train.store.shard_checks import ShardChecks
from steersman.train.store.shards import (
    DTYPES,
    FileRecord,
    check_content,
    check_shard_header,
    check_size,
    load_arrays,
)
from steersman.train.store.statistics import ActivationStats, StatsSums
from steersman.train.store.writer import merged_sums

log = logging.getLogger(__name__)

Split = Literal["train", "heldout", "all"]

_VERIFIED_AT_OPEN = 256 * 1024 * 1024
"""Stores up to this many bytes have their checksums compared when opened, which takes under a tenth of a second; the
shards of larger ones when they are first read."""

_VERIFIED_BEHIND = 4 * 1024**3
"""The first shuffled batch touches nearly all shards. Of stores above this many bytes they are therefore compared in
the background while batches are given out, and damage ends the reading when it is found."""

_LABELS_AT_ONCE = 1 << 24

_READ_BYTES = 4 * 1024 * 1024
"""A background read covers whole batches of at least about this size, so that handing it over costs nothing."""


class ActivationStore:
    """Activations of one model at one or several hook points, with the token behind every row.

    Open one with `ActivationStore.open`; make one with `cache_activations` or `ActivationStore.from_tensors`.

    >>> import tempfile
    >>> from steersman.train import ActivationStore
    >>> rows = torch.arange(12.0).reshape(6, 2)
    >>> out = tempfile.mkdtemp() + "/acts"
    >>> store = ActivationStore.from_tensors([rows[:4], rows[4:]], out, "blocks.0.hook_resid_post", dtype="float32")
    >>> store.n_rows, store.d_in, store.hook_name
    (6, 2, 'blocks.0.hook_resid_post')
    >>> [tuple(batch.x.shape) for batch in store.batches(3, split="all")]
    [(3, 2), (3, 2)]
    >>> store.stats().mean
    tensor([5., 6.])
    """

    from_tensors: ClassVar[Callable[..., "ActivationStore"]]
    """Writes a store from activations made elsewhere: `from_tensors.write_tensors`, as `steersman.train` says."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """For `open`, which checks the files first."""
        self.path, self.manifest = path, manifest
        self._folders = manifest.folders()
        shards = enumerate(manifest.shards)
        files = [(self._file(ROWS, i), shard.rows, shard.files[ROWS]) for i, shard in shards]
        self._rows = RowTable(files, labels=manifest.has_labels)
        self._maps: dict[str, MappedShards | ReadShards] = {}
        self._lock = threading.Lock()
        self._checks = {hook: ShardChecks(self._activation_files(hook)) for hook in manifest.hooks}
        self._pool = BufferPool()

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.manifest)  # copies and other processes map the files for themselves

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_partial: bool = False, verify: bool | None = None) -> Self:
        """Open the store at `path` for reading.

        Args:
            path: the store's folder.
            allow_partial: also open a store whose writing was interrupted, with the rows that are there.
            verify: compare every file with its checksum now (about 4 GB/s from the system's cache). The default does
                so for stores of up to 256 MiB. What is not compared now is when it is first read, or by `verify()`.
                Sizes and headers are always checked.

        Raises:
            SteersmanError: no store there, an unfinished one, or a shard that is missing, cut short or altered.
        """
        folder = Path(path)
        manifest = Manifest.load(folder)
        if not manifest.complete and not allow_partial:
            raise SteersmanError(
                f"{folder}: this store's writing was interrupted after {manifest.n_rows} rows; run the command that "
                "was writing it again to finish it, or open it with allow_partial=True"
            )
        store = cls(folder, manifest)
        for index, shard in enumerate(manifest.shards):
            for name, record in shard.files.items():
                check_size(store._file(name, index), record)
            for hook, width in manifest.hooks.items():
                file = store._file(store._folders[hook], index)
                check_shard_header(file, hook, shard.rows, width, manifest.dtype)
        if verify or (verify is None and store.n_bytes <= _VERIFIED_AT_OPEN):
            store.verify()
        return store

    # What the store holds

    def _file(self, folder: str, shard: int) -> Path:
        return self.path / folder / f"{self.manifest.shards[shard].name}.safetensors"

    @property
    def hook_names(self) -> list[str]:
        """The hook points, in the order in which they were asked for."""
        return list(self.manifest.hooks)

    @property
    def hook_name(self) -> str:
        """The only or the first hook point."""
        return self.hook_names[0]

    @property
    def model_name(self) -> str:
        """The model that the activations are of; may be empty for a store made from tensors."""
        return self.manifest.model_name

    @property
    def n_rows(self) -> int:
        """Number of rows (tokens)."""
        return self.manifest.n_rows

    @property
    def has_labels(self) -> bool:
        """Whether there is a label beside every row: of a store cached with a `label_column`."""
        return self.manifest.has_labels

    def n_labelled(self, split: Split = "train", heldout_fraction: float = 0.05) -> int:
        """Rows of a split whose label is known; 0 for a store without labels."""
        start, stop = self.split_rows(split, heldout_fraction)
        if not self.has_labels:
            return 0
        parts = ((low, min(low + _LABELS_AT_ONCE, stop)) for low in range(start, stop, _LABELS_AT_ONCE))
        return sum(int((self._rows.column("labels", *part) >= 0).sum()) for part in parts)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored activations."""
        return DTYPES[self.manifest.dtype][0]

    @property
    def complete(self) -> bool:
        """Whether writing was finished."""
        return self.manifest.complete

    @property
    def d_in(self) -> int:
        """Width D of the first hook point."""
        return self.manifest.hooks[self.hook_name]

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(record.bytes for shard in self.manifest.shards for record in shard.files.values())

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{self.width(hook)}]" for hook in self.hook_names)
        model = self.model_name or "an unknown model"
        return f"ActivationStore({str(self.path)!r}, {self.n_rows:,} rows, {hooks} of {model})"

    def _repr_html_(self) -> str:
        found = {hook: self.stats(hook) for hook in self.hook_names}
        rows = [[h, self.width(h), s.mean_norm, s.median_norm, s.large_rows() or "none"] for h, s in found.items()]
        facts = [("folder", self.path), ("model", self.model_name or "unknown"), ("rows", self.n_rows),
                 ("dtype", self.manifest.dtype), ("size", format_bytes(self.n_bytes))]  # fmt: skip
        header = ["hook point", "width", "mean norm", "median norm", "rows of huge norm"]
        return card("ActivationStore", facts, tables=[(header, rows)])

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the content.

        Hook points of different widths were once read each in an order of its own. For a store of such, words after the
        digits say that this is over, so that a run which began in the old order is refused rather than resumed.
        """
        one_width = len(set(self.manifest.hooks.values())) == 1
        return self.manifest.fingerprint + ("" if one_width else " in one order for all hook points")

    def _hook(self, hook: str | None) -> str:
        if hook is None:
            return self.hook_name
        if hook not in self.manifest.hooks:
            near = near_names(hook, self.hook_names)
            raise SteersmanError(f"{self.path}: holds no hook point {hook!r}; it has {near}")
        return hook

    def hooks_of(self, hooks: str | Sequence[str] | None) -> tuple[str, ...]:
        """The hook points of these names (None: the first). Raises SteersmanError for others and for repeated ones."""
        if hooks is None or isinstance(hooks, str):
            return (self._hook(hooks),)
        names = tuple(map(self._hook, hooks))
        if not names or len(set(names)) < len(names):
            raise SteersmanError(f"{self.path}: name one or several different hook points of it, not {list(hooks)}")
        return names

    def width(self, hook: str | None = None) -> int:
        """Width D of a hook point (the first one by default)."""
        return self.manifest.hooks[self._hook(hook)]

    def hook_of(self, sae: SAE) -> str:
        """The hook point that an SAE reads; the first where it records none. Raises a SteersmanError naming both sides
        when it is of another model, hook point or width."""
        if sae.cfg.sides:
            have = ", ".join(map(str, sae.cfg.sides))
            raise SteersmanError(
                f"this is a crosscoder, which reads {have} side by side, not one store: see `steersman crosscoder` "
                "(crosscoder_report) with all of its stores"
            )
        what, origin = "the SAE", Origin.of_sae(sae)
        hook = canonical_hook(origin.hook_name or self.hook_name)
        if hook not in self.manifest.hooks:
            raise SteersmanError(f"{what} reads {hook}, the store {self.path} holds {', '.join(self.hook_names)}")
        here = Origin(self.model_name, hook, self.width(hook))
        check_same_origin(what, origin._replace(hook_name=hook), f"the store {self.path}", here)
        return hook

    def stats(self, hook: str | None = None) -> ActivationStats:
        """Mean and norms over all rows of a hook point; of a partial store, over the rows that are there."""
        hook = self._hook(hook)
        if not self.complete:
            return merged_sums(self.path, self.manifest)[hook].stats()
        sums = StatsSums(self.width(hook))
        sums.add_arrays(load_arrays(self.path / STATISTICS, f"{hook}/", self.manifest.statistics_file))
        return sums.stats()

    def tokens(self, start: int, stop: int) -> RowInfo:
        """Token ids, document ids and positions of rows start..stop, in the order of the text."""
        if not 0 <= start <= stop <= self.n_rows:
            raise SteersmanError(f"{self.path}: rows {start} to {stop} asked for, it has rows 0 to {self.n_rows}")
        return self._rows.range(start, stop)

    def row_info(self, rows: torch.Tensor | np.ndarray) -> RowInfo:
        """Token ids, document ids and positions of any rows [n], in the order given."""
        return self._rows.take(self._numbers(rows))

    def _numbers(self, rows: torch.Tensor | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.n_rows):
            raise SteersmanError(f"{self.path}: row {rows.min()} or {rows.max()} is not among its {self.n_rows} rows")
        return rows

    def activations(self, rows: torch.Tensor | np.ndarray, hook: str | None = None) -> torch.Tensor:
        """The activations [n, D] of any rows [n], in the order given, in the store's type."""
        mapped, rows = self._mapped(self._hook(hook)), self._numbers(rows)
        shards = np.searchsorted(self._rows.ends, rows, side="right") - 1
        self._checks[self._hook(hook)].check(shards)
        return self._gather([mapped], rows - self._rows.ends[shards] + self._first_slots[shards])

    def verify(self) -> None:
        """Compare every file with its checksum; `SteersmanError` naming the first shard that was altered."""
        for index, shard in enumerate(self.manifest.shards):
            file, record = self._file(ROWS, index), shard.files[ROWS]
            check_content(file, record)
            self._rows.verified.add(index)
        for checks in self._checks.values():
            checks.check_all()
        if self.complete and self.manifest.statistics_file is not None:
            load_arrays(self.path / STATISTICS, "/", self.manifest.statistics_file)

    def _activation_files(self, hook: str) -> list[tuple[Path, FileRecord]]:
        folder = self._folders[hook]
        return [(self._file(folder, i), shard.files[folder]) for i, shard in enumerate(self.manifest.shards)]

    # Reading

    def split_rows(self, split: Split = "train", heldout_fraction: float = 0.05) -> tuple[int, int]:
        """First and end row of a split.

        The held-out rows are those of the last documents: at least `heldout_fraction` of all, cut where a document
        starts, so that no document is in both. When the cut would leave no row to train on (one long document), it is
        made inside the document, with a warning.
        """
        if split not in get_args(Split):
            raise SteersmanError(f"split {split!r} is none of {', '.join(get_args(Split))}")
        if not 0 <= heldout_fraction < 1:
            raise SteersmanError(f"heldout_fraction {heldout_fraction} is not at least 0 and below 1")
        if split == "all":
            return 0, self.n_rows
        cut = self.n_rows - math.ceil(heldout_fraction * self.n_rows)
        if 0 < cut < self.n_rows:
            start = self._rows.document_start(cut)
            if start == 0:
                log.warning("%s: the first document fills the training split; held-out rows are cut from it", self.path)
            cut = start or cut
        return (0, cut) if split == "train" else (cut, self.n_rows)

    def n_batches(
        self, batch_size: int, *, split: Split = "train", heldout_fraction: float = 0.05, drop_last: bool = True
    ) -> int:
        """Number of global batches in one epoch."""
        start, stop = self.split_rows(split, heldout_fraction)
        return batches_in(stop - start, batch_size, drop_last)

    def batches(
        self,
        batch_size: int,
        *,
        hook: str | Sequence[str] | None = None,
        split: Split = "train",
        heldout_fraction: float = 0.05,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        prefetch: int = 2,
        window_bytes: int = WINDOW_BYTES,
        beside: "Sequence[tuple[ActivationStore, Sequence[str]]]" = (),
    ) -> Iterator[ActivationBatch]:
        """One epoch of batches, each row once.

        The order of all rows is fixed by (seed, epoch, split, widths of the store's hook points), the same for each of
        them. Global batch b holds places [b * batch_size, (b + 1) * batch_size) of it, and rank r of W gets the r-th of
        W contiguous parts, so that the batches of all ranks together are those of one process.

        Args:
            batch_size: rows of a global batch, over all ranks.
            hook: hook point, the first by default; or several, whose rows then stand side by side (see `HookView`).
            split, heldout_fraction: see `split_rows`.
            shuffle: False reads in the order of the text.
            seed, epoch: fix the order.
            start: first global batch; reaching it costs nothing.
            rank, world_size: which part of each global batch to give.
            drop_last: leave out a last batch that is not full.
            prefetch: reads kept going in the background (a read is whole batches of about 4 MiB); 0 reads in the
                calling thread.
            window_bytes: how much of each hook point is mixed at a time (of one of mean width, where they differ).
                Stores up to this size are shuffled fully.
            beside: further stores with the same rows, and hook points of each, whose columns come after these (see
                `SideBySide`, which compares the rows first).

        Yields:
            `ActivationBatch` with `x` [batch_size / world_size, D] in the store's type.
        """
        hooks = self.hooks_of(hook)
        maps = [self._mapped(name) for name in hooks]
        if batch_size < 1 or start < 0 or prefetch < 0 or window_bytes < 1:
            raise SteersmanError("batch_size and window_bytes must be at least 1, start and prefetch at least 0")
        if not 0 <= rank < world_size or batch_size % world_size:
            raise SteersmanError(
                f"rank {rank} of world_size {world_size} with batch_size {batch_size}: ranks count from 0, and the "
                "batch must divide evenly among them"
            )
        low, high = self.split_rows(split, heldout_fraction)
        n_rows = high - low
        n_batches = batches_in(n_rows, batch_size, drop_last)
        if not n_batches:
            raise SteersmanError(
                f"{self.path}: the {split} split has {n_rows} rows, fewer than batch_size {batch_size}; "
                "use a smaller batch or cache more tokens"
            )
        widths = list(self.manifest.hooks.values())
        order = RowOrder(
            self._slot_ranges(low, high),
            -(-sum(widths) // len(widths)) * self.dtype.itemsize,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            window_bytes=window_bytes,
        )
        plan = ReadingPlan(order, maps, window_bytes)
        checks, behind = [self._checks[name] for name in hooks], shuffle and self.n_bytes > _VERIFIED_BEHIND

        def read(first: int, end: int) -> list[ActivationBatch]:
            """Batches first..end, gathered as one array and handed out as parts of it."""
            parts, sizes = [], []
            for low in range(first * batch_size, end * batch_size, batch_size):
                n = min(batch_size, n_rows - low)
                start, stop = low + rank * n // world_size, low + (rank + 1) * n // world_size
                parts += plan.slots(start, stop)
                sizes.append(stop - start)
            slots = np.concatenate(parts)
            for check in checks:
                if behind:
                    check.check_behind()
                else:
                    check.check(self._shards_of_slots(slots))
            whole = self._gather(maps, slots)
            if beside:
                rows = self._rows_of_slots(slots)
                whole = torch.cat([whole, *(store._columns(rows, there) for store, there in beside)], dim=1)
            x = whole.split(sizes)
            places = np.split(slots, np.cumsum(sizes)[:-1])
            return [
                ActivationBatch(x=x, find_rows=partial(self._rows_of_slots, here), find_info=self._rows.take)
                for x, here in zip(x, places)
            ]

        row_bytes = sum(mapped.width for mapped in maps) * self.dtype.itemsize
        per_read = max(1, _READ_BYTES * world_size // (batch_size * row_bytes))
        return read_ahead(read, start, n_batches, per_read, prefetch)

    def _columns(self, rows: np.ndarray, hooks: Sequence[str]) -> torch.Tensor:
        """The activations [n, D] of rows [n] at hook points side by side."""
        shards = np.searchsorted(self._rows.ends, rows, side="right") - 1
        for hook in hooks:
            if self.n_bytes > _VERIFIED_BEHIND:
                self._checks[hook].check_behind()
            else:
                self._checks[hook].check(shards)
        slots = rows - self._rows.ends[shards] + self._first_slots[shards]
        return self._gather([self._mapped(hook) for hook in hooks], slots)

    @cached_property
    def _first_slots(self) -> np.ndarray:
        row_bytes = [width * self.dtype.itemsize for width in self.manifest.hooks.values()]
        return first_slots([shard.rows for shard in self.manifest.shards], row_bytes)

    def _mapped(self, hook: str) -> MappedShards | ReadShards:
        with self._lock:
            if hook not in self._maps:
                folder = self._folders[hook]
                files = [(self._file(folder, i), shard.rows) for i, shard in enumerate(self.manifest.shards)]
                self._maps[hook] = open_shards(files, self._first_slots, self.width(hook), self.dtype.itemsize)
            return self._maps[hook]

    def _gather(self, maps: Sequence[MappedShards | ReadShards], slots: np.ndarray) -> torch.Tensor:
        ends = np.cumsum([mapped.width for mapped in maps]).tolist()
        x = self._pool.empty((len(slots), ends[-1]), maps[0].dtype)
        for mapped, end in zip(maps, ends):
            # `take` writes whole arrays only, so hook points side by side are copied a second time.
            part = x if len(maps) == 1 else self._pool.empty((len(slots), mapped.width), x.dtype)
            mapped.take(slots, part)
            if part is not x:
                x[:, end - mapped.width : end] = part
        return torch.from_numpy(x).view(self.dtype)

    def _slot_ranges(self, first: int, end: int) -> list[tuple[int, int]]:
        ranges = []
        for index, slot in enumerate(self._first_slots[:-1].tolist()):
            low, high = (int(row) for row in self._rows.ends[index : index + 2])
            ranges.append((slot + max(first - low, 0), slot + min(end, high) - low))
        return ranges

    def _shards_of_slots(self, slots: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_slots, slots, side="right") - 1

    def _rows_of_slots(self, slots: np.ndarray) -> np.ndarray:
        shards = self._shards_of_slots(slots)
        return slots - self._first_slots[shards] + self._rows.ends[shards]
