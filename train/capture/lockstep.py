"""Caching by one model: one process, or the ranks that share a tensor-parallel model, of which rank 0 writes."""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing, nullcontext
from functools import partial

from steersman.errors import PreemptedError, SteersmanError
from steersman.parallel import Ranks, comm_errors
from steersman.progress import progress
from steersman.train.capture.capture import Capture, side_executor
from steersman.train.mesh.preemption import Preemption
from steersman.train.store.writer import StoreWriter

log = logging.getLogger(__name__)

WRITES_AHEAD = 3
"""Forward batches that may wait to be written: what bounds the memory of caching, beside the model's own."""


def cache_in_lockstep(
    capture: Capture,
    max_rows: int | None,
    ranks: Ranks,
    open_writer: Callable[[], StoreWriter],
    on_start: Callable[[StoreWriter], None],
) -> None:
    """Write the store, or what is missing of it. All ranks run the model over the same batches.

    Args:
        capture: what is written.
        max_rows: rows of the store; None for those of the whole text.
        ranks: those that share the model.
        open_writer: called on rank 0 alone.
        on_start: called on rank 0 with the writer before the model runs, if it has to.
    """
    writer: StoreWriter | None = None

    def plan() -> tuple[Mapping[str, int] | None, int] | None:
        """Where to start: a cursor and the number of the first row there. None when there is nothing to do."""
        nonlocal writer
        writer = open_writer()
        if writer.manifest.complete:
            return None
        on_start(writer)
        cursor = writer.manifest.shards[-1].cursor if writer.manifest.shards else None
        return cursor, writer.n_rows - (cursor["rows"] if cursor else 0)

    try:
        start = ranks.on_rank_zero(plan)
        if start is None:
            return
        with comm_errors() if ranks.mesh.world_size > 1 else nullcontext(), Preemption(ranks.control) as preemption:
            _run(capture, writer, *start, max_rows, preemption)
        ranks.on_rank_zero(lambda: writer.finish() if writer is not None else None)
    except BaseException as error:
        if writer is None or writer.manifest.complete:
            raise
        n_rows = _kept(writer)
        writer.remove_if_empty()
        if n_rows and isinstance(error, KeyboardInterrupt | PreemptedError):
            message = f"{n_rows:,} rows are stored in {writer.folder}, and the same command resumes after them"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; {message}") from None
            raise PreemptedError(f"asked to end; {message}") from None
        raise


def _kept(writer: StoreWriter) -> int:
    """Store what there is of the unfinished shard, as far as the disk allows, and let go of the store."""
    try:
        return writer.keep()
    except SteersmanError as error:
        log.warning("%s", error)
        return writer.manifest.n_rows
    finally:
        writer.abandon()


def _run(
    capture: Capture,
    writer: StoreWriter | None,
    cursor: Mapping[str, int] | None,
    row: int,
    max_rows: int | None,
    preemption: Preemption,
) -> None:
    """Run the model from `cursor`, where row number `row` is, until there are `max_rows`, the text ends, or the process
    is asked to end. The rank that has the writer writes what the model gives, in a thread where one helps."""
    pending: deque[Future[None]] = deque()
    pool = side_executor(capture.lm, "steersman-write")
    bar = progress(desc="caching", total=max_rows, initial=row, unit="tok", unit_scale=True, shown=writer is not None)

    def drain(n_left: int) -> None:
        while len(pending) > n_left:
            pending.popleft().result()

    try:
        with bar, closing(capture.rows(cursor)) as batches:
            for rows in batches:
                row += len(rows.token_ids)
                bar.update(len(rows.token_ids))
                if writer is not None:
                    append = partial(
                        writer.append,
                        rows.activations,
                        rows.token_ids,
                        rows.doc_ids,
                        rows.positions,
                        cursor=rows.cursor,
                        marks=rows.marks,
                        labels=rows.labels,
                        show_token=capture.show_token,
                    )
                    pending.append(pool.submit(append))
                if max_rows is not None and row >= max_rows:
                    drain(0)  # rows that are not finite may have been skipped: count what is there
                    row = row if writer is None else writer.n_rows
                    if row >= max_rows:
                        break
                drain(WRITES_AHEAD)
                if preemption.now():
                    drain(0)
                    raise preemption.error("asked to end")
            drain(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if writer is not None and max_rows is not None and not writer.full:
        name = capture.text.name
        log.warning("%s: the text ended after %d of the %d tokens asked for", name, writer.n_rows, max_rows)
