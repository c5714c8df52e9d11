"""Reading ahead: which slots the batches of an order hold, and threads that gather them before they are asked for."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from steersman.train.batch import ActivationBatch
from steersman.train.mapping import MappedShards
from steersman.train.order import RowOrder


class ReadingPlan:
    """Places of an order -> slots, for several threads, with the present window kept and the next one announced."""

    def __init__(self, order: RowOrder, mapped: MappedShards, window_bytes: int) -> None:
        self._order, self._mapped = order, mapped
        self._bounded = mapped.n_bytes > window_bytes
        self._windows: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def slots(self, start: int, stop: int) -> np.ndarray:
        parts = []
        window = self._order.window_of(start)
        while start < stop:
            base = self._order.window_start(window)
            part = self._window(window)[start - base : stop - base]
            parts.append(part)
            start += len(part)
            window += 1
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.zeros(0, dtype=np.int64)])

    def _window(self, window: int) -> np.ndarray:
        with self._lock:
            if window not in self._windows:
                if self._bounded:
                    # What earlier windows mapped would otherwise count as this process's memory until it ends.
                    self._mapped.release()
                for near in (window, window + 1) if not self._windows else (window + 1,):
                    self._announce(near)
                # Batches that straddle two windows, and threads that lag by one, need the window before.
                self._windows = {w: s for w, s in self._windows.items() if w == window - 1}
                self._windows[window] = self._order.slots(window)
            return self._windows[window]

    def _announce(self, window: int) -> None:
        """Have a window's blocks read from disk, neighbours in one request."""
        starts, lengths = self._order.blocks(window)
        if not len(starts):
            return
        by_place = np.argsort(starts)
        starts, ends = starts[by_place], (starts + lengths)[by_place]
        gaps = np.flatnonzero(starts[1:] > ends[:-1]) + 1
        for low, high in zip(starts[np.r_[0, gaps]].tolist(), ends[np.r_[gaps - 1, len(ends) - 1]].tolist()):
            self._mapped.will_need(low, high - low)


def read_ahead(
    read: Callable[[int], tuple[Any, ...]],
    wrap: Callable[..., ActivationBatch],
    start: int,
    stop: int,
    per_read: int,
    prefetch: int,
) -> Iterator[ActivationBatch]:
    """Yield wrap(*read(b)) for b in start..stop, while threads read `prefetch` runs of `per_read` batches ahead."""
    if prefetch == 0:
        for batch in range(start, stop):
            yield wrap(*read(batch))
        return
    runs = iter(range(start, stop, per_read))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(max_workers=min(2, prefetch, cores), thread_name_prefix="steersman-read")
    pending: deque[Future[list[Any]]] = deque()

    def submit() -> None:
        first = next(runs, None)
        if first is not None:
            pending.append(pool.submit(lambda: [read(b) for b in range(first, min(first + per_read, stop))]))

    try:
        for _ in range(prefetch):
            submit()
        while pending:
            done = pending.popleft().result()
            submit()
            while done:
                yield wrap(*done.pop(0))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
