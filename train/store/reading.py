"""Reading ahead: which slots the batches of an order hold, and threads that gather them before they are asked for."""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np

from steersman.threads import usable_cores
from steersman.train.store.batch import ActivationBatch
from steersman.train.store.mapping import MappedShards, ReadShards
from steersman.train.store.order import RowOrder

_KEPT_ARRAYS = 6
"""Arrays that a pool looks after: those being read into, ready, and in the hands of the caller."""


class ReadingPlan:
    """Places of an order -> slots, for several threads; the next window is announced to the system ahead of its use."""

    def __init__(self, order: RowOrder, maps: Sequence[MappedShards | ReadShards], window_bytes: int) -> None:
        """`maps` are those of the hook points that are read."""
        self._order, self._maps = order, maps
        self._bounded = max(mapped.n_bytes for mapped in maps) > window_bytes
        self._entered = -1
        self._lock = threading.Lock()

    def slots(self, start: int, stop: int) -> list[np.ndarray]:
        """The slots of places start..stop, in one array for each window that they touch."""
        parts = []
        window = self._order.window_of(start)
        while start < stop:
            self._enter(window)
            base = self._order.window_start(window)
            parts.append(self._order.slots(window, start - base, stop - base))
            start += len(parts[-1])
            window += 1
        return parts

    def _enter(self, window: int) -> None:
        with self._lock:
            if window <= self._entered:
                return
            if self._bounded:
                # What earlier windows mapped would otherwise count as this process's memory until it ends.
                for mapped in self._maps:
                    mapped.release()
            announced = (window, window + 1) if self._entered < 0 else (window + 1,)
            self._entered = window
        # In a thread of its own, as handing requests to a busy disk takes as long as the disk does.
        threading.Thread(target=self._announce, args=announced, name="steersman-announce", daemon=True).start()

    def _announce(self, *windows: int) -> None:
        """Have the windows' blocks read from disk."""
        for window in windows:
            starts, lengths = self._order.blocks(window)
            by_place = np.argsort(starts)
            for mapped in self._maps:
                for start, length in zip(starts[by_place].tolist(), lengths[by_place].tolist()):
                    mapped.will_need(start, length)


class BufferPool:
    """Arrays that are used again once nothing points at what was read into them.

    Fresh memory costs a quarter of the time of a read, as the system must clear every page of it. An array here is
    reused only when the pool holds the one reference to it: tensors and arrays made from it, and views of those, each
    hold another, so a batch stays as it is for as long as anybody keeps it.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """An array of this shape and type with arbitrary content."""
        with self._lock:
            for number in range(len(self._arrays)):
                array = self._arrays[number]
                # The list, the name `array` and the argument of getrefcount are three.
                if array.shape == shape and array.dtype == dtype and sys.getrefcount(array) <= 3:
                    return array[:]
            # numpy asks the system for huge pages here, where torch does not.
            array = np.empty(shape, dtype=dtype)
            self._arrays = [*self._arrays[-_KEPT_ARRAYS + 1 :], array]
            return array[:]


def read_ahead(
    read: Callable[[int, int], list[ActivationBatch]], start: int, stop: int, per_read: int, prefetch: int
) -> Iterator[ActivationBatch]:
    """Yield batches start..stop, given by `read(first, end)` for `per_read` of them at a time.

    `prefetch` reads are kept going in at most two threads, as numpy's gathering lets other threads run; with 0 the
    calling thread reads.
    """
    runs = ((first, min(first + per_read, stop)) for first in range(start, stop, per_read))
    if prefetch == 0:
        for first, end in runs:
            yield from read(first, end)
        return
    pool = ThreadPoolExecutor(max_workers=min(2, prefetch, usable_cores()), thread_name_prefix="steersman-read")
    pending: deque[Future[list[ActivationBatch]]] = deque()

    def submit(n: int) -> None:
        pending.extend(pool.submit(read, first, end) for first, end in islice(runs, n))

    try:
        submit(prefetch)
        while pending:
            batches = pending.popleft().result()
            submit(1)
            while batches:  # each batch is let go of when the next one is asked for
                yield batches.pop(0)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
