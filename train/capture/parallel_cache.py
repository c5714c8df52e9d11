"""Caching on several ranks: each writes whole shards, and together they leave the bytes that one process would.

Rows have numbers before the model has run: how many a forward batch gives follows from its tokens. So every rank reads
and tokenizes the text, knows which batches hold the rows of its shards (see `shard_rank`), and runs the model over
those alone; a batch that lies across shards of two ranks is run twice. A shard is written in a folder of its own under
`parts/`, moved to its place, and recorded there; when all are recorded, rank 0 writes the manifest and deletes
`parts/`. Nobody waits for anybody until then: a rank that dies is started again alone, and any number of ranks, one
included, resumes where others stopped. The ranks share the folder and nothing else.
"""

import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from steersman.errors import LostRankError, SteersmanError
from steersman.files import fsync_folder, replace_whole
from steersman.progress import progress
from steersman.train.capture.capture import Capture, CapturedRows
from steersman.train.capture.lockstep import WRITES_AHEAD
from steersman.train.store.manifest import MANIFEST, Manifest, ShardRecord
from steersman.train.store.shards import FileRecord, disk_errors
from steersman.train.store.writer import StoreWriter, check_same_store

log = logging.getLogger(__name__)

PARTS = "parts"
_LOOK_SECONDS = 0.1
_STRETCH = 8


def shard_rank(number: int, n_ranks: int, n_shards: int | None) -> int:
    """Which rank writes shard `number` of `n_shards` (None: unknown).

    Ranks take turns with stretches of up to 8 consecutive shards, as long as that leaves them equal parts: the fewer
    stretches, the fewer batches are run twice, and the shorter, the less text a rank must tokenize before it can start.

    >>> [shard_rank(number, 2, 20) for number in range(20)]
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    """
    if n_shards is None:
        return number % n_ranks
    rounds = -(-n_shards // (_STRETCH * n_ranks))
    stretch = -(-n_shards // (n_ranks * rounds))
    return number // stretch % n_ranks


class SharedStore:
    """The store at `folder` that several ranks write; `manifest` describes it, without shards.

    Raises a SteersmanError when the folder holds something else or a store of another configuration.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, shard_rows: int, max_rows: int | None, rank: int) -> None:
        self.folder, self.manifest, self.rank = folder, manifest, rank
        self.shard_rows, self.max_rows = shard_rows, max_rows
        self.parts = folder / PARTS
        with disk_errors(folder, "choose another place for the store"):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / MANIFEST).exists():
                self.manifest = check_same_store(folder, manifest)
            elif any(child.name != PARTS for child in folder.iterdir()) and not self.parts.exists():
                raise SteersmanError(f"{folder}: exists and is not an activation store; choose an empty or new folder")
            if not self.manifest.complete:
                for name in (PARTS, *manifest.folders().values(), "rows"):
                    (folder / name).mkdir(exist_ok=True)

    def records(self) -> dict[int, ShardRecord]:
        """The finished shards by number."""
        found = dict(enumerate(self.manifest.shards))
        for file in self.parts.glob("*.json"):
            data = json.loads(file.read_text())
            if data.pop("store") != self._identity():
                raise SteersmanError(f"{file}: a shard of a store of another configuration; delete {self.folder}")
            files = {name: FileRecord(**record) for name, record in data["files"].items()}
            found[int(file.stem)] = ShardRecord(**{**data, "files": files})
        return found

    @property
    def n_shards(self) -> int | None:
        """How many shards there will be unless the text ends before; None when that is not known."""
        return None if self.max_rows is None else -(-self.max_rows // self.shard_rows)

    def _identity(self) -> str:
        return replace(self.manifest, shards=()).fingerprint

    @property
    def n_rows(self) -> int:
        """Rows in finished shards."""
        return sum(record.rows for record in self.records().values())

    def disk_advice(self) -> str:
        """What to do when the disk is full."""
        return f"{len(self.records())} finished shards are intact: free space and run the same command again to resume"

    def begin_shard(self, number: int, rows_before: int) -> StoreWriter:
        """A writer of shard `number` alone; its first batch has `rows_before` rows that belong to earlier shards."""
        room = self.shard_rows
        if self.max_rows is not None:
            room = min(room, self.max_rows - number * self.shard_rows)
        with disk_errors(self.folder, self.disk_advice()):
            writer = StoreWriter.begin(
                self.parts / f"{number:05d}",
                replace(self.manifest, shards=()),
                shard_rows=self.shard_rows,
                max_rows=room,
                rows_before=rows_before,
            )
        return writer

    def end_shard(self, number: int, writer: StoreWriter) -> None:
        """Move a finished shard to its place and record it. Done again after a kill, it resumes where it stopped."""
        with disk_errors(self.folder, self.disk_advice()):
            writer.end_shard()
            record = writer.manifest.shards[0]
            for name in record.files:
                here = writer.folder / name / f"{record.name}.safetensors"
                if here.exists():
                    os.replace(here, self.folder / name / f"{number:05d}.safetensors")
                fsync_folder(self.folder / name)
            content = asdict(replace(record, name=f"{number:05d}")) | {"store": self._identity()}
            replace_whole(
                self.parts / f"{number:05d}.json", lambda temporary: temporary.write_bytes(json.dumps(content).encode())
            )
            writer.abandon()
            shutil.rmtree(writer.folder, ignore_errors=True)

    def alive(self) -> None:
        """Leave a sign that this rank is at work."""
        (self.parts / f"rank-{self.rank:05d}").write_text(str(time.time_ns()))

    def pulse(self) -> str:
        """Changes when some rank has been at work."""
        return "".join(file.read_text() for file in sorted(self.parts.glob("rank-*")) if file.exists())

    def complete(self, n_shards: int) -> None:
        """Write the manifest of all shards, with their statistics."""
        records = self.records()
        shards = tuple(records[number] for number in range(n_shards))
        with disk_errors(self.folder, self.disk_advice()):
            for folder in (*self.manifest.folders().values(), "rows"):  # left by an interrupted run of one process
                known = {f"{shard.name}.safetensors" for shard in shards}
                for file in (self.folder / folder).iterdir():
                    if file.name not in known:
                        file.unlink()
            writer = StoreWriter(
                self.folder,
                replace(self.manifest, shards=shards),
                shard_rows=self.shard_rows,
                max_rows=self.max_rows,
                skip_bad=False,
            )
            writer.finish()
            shutil.rmtree(self.parts, ignore_errors=True)


def cache_on_ranks(
    store: SharedStore,
    capture: Capture,
    on_start: Callable[[SharedStore], None],
    *,
    n_ranks: int,
    timeout_seconds: float,
) -> None:
    """Write this rank's part of the store and wait until the others have written theirs. `on_start` is called on
    rank 0 before the model runs.

    Raises what `cache_activations` does, and a LostRankError when nobody has been at work for `timeout_seconds` and
    shards are missing.
    """
    if store.manifest.complete:
        return
    if store.rank == 0:
        on_start(store)
    n_rows = _RankPart(store, capture, n_ranks).write()
    if not n_rows:
        raise SteersmanError(f"{store.folder}: nothing to store: every token was left out, or there was no text")
    n_shards = -(-n_rows // store.shard_rows)
    if store.max_rows is not None and n_rows < store.max_rows and store.rank == 0:
        name = capture.text.name
        log.warning("%s: the text ended after %d of the %d tokens asked for", name, n_rows, store.max_rows)
    pulse, since = "", time.monotonic()
    while True:
        if (store.folder / MANIFEST).exists() and Manifest.load(store.folder).complete:
            return
        missing = sorted(set(range(n_shards)) - set(store.records())) if store.parts.exists() else []
        if not missing and store.rank == 0:
            store.complete(n_shards)
            return
        if (now := store.pulse()) != pulse:
            pulse, since = now, time.monotonic()
        if time.monotonic() - since > timeout_seconds:
            lost = sorted({shard_rank(number, n_ranks, store.n_shards) for number in missing}) or [0]
            raise LostRankError(
                f"{store.folder}: {len(missing)} of {n_shards} shards are missing and nobody has been at work for "
                f"{timeout_seconds:g} seconds; start rank {', '.join(map(str, lost))} again, or the whole command"
            )
        time.sleep(_LOOK_SECONDS)


class _RankPart:
    """The shards of one rank, written by a thread while the model runs."""

    def __init__(self, store: SharedStore, capture: Capture, n_ranks: int) -> None:
        self.store, self.capture, self.n_ranks = store, capture, n_ranks
        self._done = set(store.records())
        self._open: tuple[int, StoreWriter] | None = None

    def _mine(self, number: int) -> bool:
        mine = shard_rank(number, self.n_ranks, self.store.n_shards) == self.store.rank
        return mine and number not in self._done

    def _start(self) -> tuple[Mapping[str, int] | None, int]:
        """Where to start reading, and the number of the first row there: as late as the finished shards allow."""
        last = max(self._done, default=-1) + 1
        first = next((number for number in range(last) if self._mine(number)), last)
        records = self.store.records()
        before = max((number for number in self._done if number < first), default=None)
        cursor = None if before is None else records[before].cursor
        if before is None or cursor is None:
            return None, 0
        place = {key: value for key, value in cursor.items() if key != "rows"}
        return place, before * self.store.shard_rows + records[before].rows - cursor["rows"]

    def write(self) -> int:
        """Write the shards that are missing; returns the number of rows of the whole store."""
        size, limit = self.store.shard_rows, self.store.max_rows
        cursor, row = self._start()
        pending: deque[Future[None]] = deque()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="steersman-write")
        total = None if limit is None else -(-limit // self.n_ranks)
        bar = progress(desc=f"caching, rank {self.store.rank}", total=total, unit="tok", unit_scale=True)
        seen = 0.0
        try:
            with bar, closing(self.capture.batches(cursor)) as batches:
                for batch in batches:
                    n = int(self.capture.kept(batch).sum())
                    stop = row + n if limit is None else min(row + n, limit)
                    wanted = [number for number in range(row // size, -(-stop // size)) if self._mine(number)]
                    if wanted:
                        rows = self.capture.run(batch)
                        for number in wanted:
                            bar.update(min(stop, (number + 1) * size) - max(row, number * size))
                            whole = stop >= (number + 1) * size or stop == limit
                            task = partial(self._append, number, max(number * size - row, 0), rows, whole)
                            pending.append(pool.submit(task))
                    while len(pending) > WRITES_AHEAD:
                        pending.popleft().result()
                    if time.monotonic() - seen > 0.5:
                        self.store.alive()
                        seen = time.monotonic()
                    row = stop
                    if row == limit:
                        break
            pending.append(pool.submit(self._end))
            while pending:
                pending.popleft().result()
            self.store.alive()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if self._open is not None:
                self._open[1].abandon()
        return row

    def _append(self, number: int, rows_before: int, rows: CapturedRows, whole: bool) -> None:
        if self._open is None:
            self._open = number, self.store.begin_shard(number, rows_before)
        _, writer = self._open
        writer.append(
            rows.activations,
            rows.token_ids,
            rows.doc_ids,
            rows.positions,
            cursor=rows.cursor,
            show_token=self.capture.show_token,
        )
        if whole:
            self._end()

    def _end(self) -> None:
        if self._open is not None:
            self.store.end_shard(*self._open)
            self._open = None
