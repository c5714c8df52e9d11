"""Caching on several ranks: each writes whole shards, and together they leave the bytes that one process would.

Rows have numbers before the model has run: how many a forward batch gives follows from its tokens. So every rank reads
and tokenizes the text, knows which batches hold the rows of its shards (see `shard_rank`), and runs the model over
those alone; a batch that lies across shards of two ranks is run twice. A shard is written in a folder of its own under
`parts/`, moved to its place, and recorded there; when all are recorded, rank 0 writes the manifest and removes `parts/`
(see `shared_store.py`). Nobody waits for anybody until then: a rank that dies is started again alone, and any number of
ranks, one included, resumes where others stopped. The ranks share the folder and nothing else.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial

from steersman.errors import LostRankError, SteersmanError
from steersman.progress import progress
from steersman.train.capture.capture import Capture, CapturedRows
from steersman.train.capture.lockstep import WRITES_AHEAD
from steersman.train.capture.shared_store import SharedStore
from steersman.train.store.writer import StoreWriter

log = logging.getLogger(__name__)

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
    try:
        _cache(store, capture, on_start, n_ranks, timeout_seconds)
    except (OSError, SteersmanError):
        if not store.finished():  # else the others were done before this rank, which a slow one may find out late
            raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {store.n_rows:,} rows are stored in {store.folder}, and the same command resumes after them"
        ) from None
    finally:
        store.leave()
    store.remove_parts()  # rank 0 has; a slow one may have written there since


def _cache(
    store: SharedStore,
    capture: Capture,
    on_start: Callable[[SharedStore], None],
    n_ranks: int,
    timeout_seconds: float,
) -> None:
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
        if store.finished():
            return
        missing = sorted(set(range(n_shards)) - set(store.records()))
        if not missing and store.rank == 0:
            store.complete(n_rows)
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
        self._failed = False

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
                            before = number * size - row  # rows of the batch that belong to earlier shards
                            task = partial(self._append, number, before, rows, whole)
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
        """Write a batch's rows of shard `number`; `rows_before` is negative where the shard began in an earlier batch.
        After one failure nothing more is written: what is queued behind it would leave a gap."""
        if self._failed:
            raise SteersmanError(f"{self.store.folder}: an earlier write failed; run the same command again to resume")
        self._failed = True
        if self._open is None and rows_before >= 0:
            self._open = number, self.store.begin_shard(number, rows_before)
        if self._open is None or self._open[0] != number:
            raise SteersmanError(f"{self.store.folder}: rows of shard {number} came without its first ones")
        _, writer = self._open
        writer.append(
            rows.activations,
            rows.token_ids,
            rows.doc_ids,
            rows.positions,
            cursor=rows.cursor,
            marks=rows.marks,
            labels=rows.labels,
            show_token=self.capture.show_token,
        )
        if whole and writer.n_rows != self.store.room(number):
            raise SteersmanError(f"{self.store.folder}: shard {number} has {writer.n_rows} rows at its end")
        if whole:
            self.store.end_shard(*self._open)
            self._open = None
        self._failed = False

    def _end(self) -> None:
        """At the end of the text: end the last shard with the rows that it has."""
        if self._open is not None and not self._failed:
            self.store.end_shard(*self._open)
            self._open = None
