"""The order in which rows are read: a block shuffle that is fixed by its seed and reached anywhere at once.

Rows lie on disk in blocks of consecutive rows. The blocks are permuted; consecutive blocks of that permutation make a
window, and the rows of a window are permuted among themselves. A reader therefore touches one window's blocks at a
time, whatever the size of the store, and a batch holds rows from (nearly) as many places of the text as a window has
blocks. A store that fits in one window is shuffled fully.
"""

import threading
from collections.abc import Sequence

import numpy as np

BLOCK_BYTES = 256 * 1024
"""Least bytes of a block, which has up to twice as many: large enough for a disk to read scattered blocks nearly as
fast as neighbouring ones, small enough for hundreds of them in a window."""

WINDOW_BYTES = 128 * 1024 * 1024
"""Bytes of a window. Read from the system's cache of the files, not held by the process a second time."""


class RowOrder:
    """A permutation of the slots in `ranges`, cut in windows that are computed when they are asked for.

    Args:
        ranges: (first slot, end slot) of each stretch of consecutive rows, in order.
        row_bytes: size of a row, from which the rows of a block and the blocks of a window follow. Of a store with
            several hook points it is their mean, so that all of them come in one order, whose blocks are of the size
            above in a hook point of mean width.
        shuffle: False gives the rows in the order of `ranges`, in the same windows.
        seed, epoch: together they fix the permutation.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]],
        row_bytes: int,
        *,
        shuffle: bool,
        seed: int,
        epoch: int,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        # A power of two, so that dividing the places of a window among its blocks is a shift.
        bits = (-(-BLOCK_BYTES // row_bytes) - 1).bit_length()
        block_rows = 1 << bits
        self.window_blocks = max(1, window_bytes // (block_rows * row_bytes))
        pieces = [(np.arange(first, end, block_rows), end) for first, end in ranges if first < end]
        starts = [piece for piece, _ in pieces]
        lengths = [np.minimum(piece + block_rows, end) - piece for piece, end in pieces]
        self._starts = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        self._mix: tuple[np.ndarray, np.ndarray] | None = None
        self._filled: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        if shuffle:
            blocks, rows = (np.random.default_rng([seed, epoch, stream]) for stream in range(2))
            order = blocks.permutation(len(self._starts))
            self._starts, self._lengths = self._starts[order], self._lengths[order]
            # One permutation of places serves every window of the epoch: what stands at those places differs. It is
            # kept as (block in the window, row in the block): a batch then costs a look-up and a sum for each row.
            places = np.arange(min(self.window_blocks, len(self._starts)) * block_rows, dtype=np.int32)
            rows.shuffle(places)
            self._mix = (places >> bits).astype(np.intp), places & np.int32(block_rows - 1)
        ends = np.cumsum(self._lengths)
        last = np.minimum(np.arange(1, self.n_windows + 1) * self.window_blocks, len(ends)) - 1
        self._window_ends = ends[last]
        self.n_rows = int(ends[-1]) if len(ends) else 0

    @property
    def n_windows(self) -> int:
        """Number of windows."""
        return -(-len(self._starts) // self.window_blocks)

    def window_of(self, row: int) -> int:
        """The window that holds place `row` of the order."""
        return int(np.searchsorted(self._window_ends, row, side="right"))

    def window_start(self, window: int) -> int:
        """The place in the order of a window's first row."""
        return int(self._window_ends[window - 1]) if window else 0

    def blocks(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """First slots and lengths of a window's blocks."""
        part = slice(window * self.window_blocks, (window + 1) * self.window_blocks)
        return self._starts[part], self._lengths[part]

    def slots(self, window: int, start: int, stop: int) -> np.ndarray:
        """The slots of places start..stop of a window (counted from the window's first), [stop - start] int64."""
        starts, lengths = self.blocks(window)
        if self._mix is None:
            ends = np.cumsum(lengths)
            places = np.arange(start, min(stop, int(ends[-1])))
            block = np.searchsorted(ends, places, side="right")
            return starts[block] + places - (ends - lengths)[block]
        block, row = self._mix
        if len(row) != lengths.sum():
            block, row = self._filled_places(window, self._mix)
        slots = starts.take(block[start:stop], mode="clip")
        slots += row[start:stop]
        return slots

    def _filled_places(self, window: int, mix: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The permuted places without those that short or absent blocks of this window do not fill."""
        with self._lock:
            if window not in self._filled:
                block, row = mix
                _, lengths = self.blocks(window)
                full = np.zeros(self.window_blocks, dtype=np.int64)
                full[: len(lengths)] = lengths
                kept = row < full[block]
                self._filled = {w: places for w, places in self._filled.items() if w == window - 1}
                self._filled[window] = block[kept], row[kept]
            return self._filled[window]
