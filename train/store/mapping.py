"""Many shard files seen as one array: consecutive memory mappings in one reserved range of addresses.

A shuffled batch takes its rows from many shards at once. With the shards side by side in memory it is gathered by one
indexing operation straight from the page cache, copied once, whatever the number of shards; mapped one by one they
would need a loop over shards and a second copy to put the rows in order.
"""

import ctypes
import math
import mmap
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steersman.errors import SteersmanError
from steersman.train.store.shards import DATA_OFFSET, missing

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class _Span:
    """One shard's place: its first slot, its number of rows, its first address and its bytes."""

    first_slot: int
    n_rows: int
    address: int
    n_bytes: int


def _open(path: Path, n_bytes: int) -> int:
    """A descriptor of a shard that holds so many bytes of rows."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise SteersmanError(f"{path} cannot be read: {error.strerror or error}") from error
    if os.fstat(descriptor).st_size < DATA_OFFSET + n_bytes:
        os.close(descriptor)
        raise _cut_short(path)
    return descriptor


def _cut_short(path: Path) -> SteersmanError:
    return SteersmanError(f"{path}: this shard was cut short while the store is read; restore it")


class LengthGuard:
    """Looks whether files are still as long as they were. Reading a mapping beyond the end of its file ends the
    process without a word, and no check can rule that out; this one comes before every read, but takes no more than a
    fiftieth of the time."""

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        """`files` are (path, bytes of rows)."""
        self._files = [(path, DATA_OFFSET + n_bytes) for path, n_bytes in files if n_bytes]
        self._next = 0.0

    def check(self) -> None:
        """Raise a SteersmanError naming a file that is gone or was cut short."""
        began = time.monotonic()
        if began < self._next:
            return
        for path, n_bytes in self._files:
            try:
                size = os.stat(path).st_size
            except OSError:
                raise missing(path) from None
            if size < n_bytes:
                raise _cut_short(path)
        now = time.monotonic()
        self._next = now + 50 * (now - began)


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    result = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if result == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def first_slots(n_rows: Sequence[int], row_bytes: Sequence[int]) -> np.ndarray:
    """The slot at which each shard of `n_rows` rows starts, and the end of the last, [shards + 1] int64.

    Every start is a whole number of memory pages for rows of each of the sizes `row_bytes`, so that all hook points of
    a store have a row in the same slot.

    >>> first_slots([3, 5], [2048, 1024]).tolist()
    [0, 4, 12]
    """
    page = mmap.PAGESIZE
    if DATA_OFFSET % page:
        raise SteersmanError(f"this system's memory pages of {page} bytes are larger than a store's {DATA_OFFSET}")
    # Slots after which a row starts on a page again: a power of two as the page is, so the largest serves all.
    unit = max(page // math.gcd(page, size) for size in row_bytes)
    return np.cumsum([0, *(-(-n // unit) * unit for n in n_rows)], dtype=np.int64)


class MappedShards:
    """The rows of many shards as one read-only array `rows` [slots, width] of same-sized integers.

    The slots between the end of one shard and the start of the next belong to no row and must not be read. The mapping
    lasts as long as this object or any array taken from `rows`.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], slots: np.ndarray, width: int, itemsize: int) -> None:
        """`files` are (path, number of rows) and `slots` their `first_slots`; rows hold `width` items of `itemsize`.
        Raises a SteersmanError when a file is not there or too short."""
        row_bytes, slot = width * itemsize, int(slots[-1])
        self.width, self.dtype = width, np.dtype(f"<i{itemsize}")
        self._guard = LengthGuard([(path, n * row_bytes) for path, n in files])
        self.n_bytes = slot * row_bytes
        length = max(self.n_bytes, mmap.PAGESIZE)
        base = _map(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        # numpy keeps the buffer alive through every array made from it, and the mapping goes with the buffer.
        buffer = (ctypes.c_ubyte * length).from_address(base)
        weakref.finalize(buffer, _libc.munmap, base, length)
        self._spans: list[_Span] = []
        for (path, n_rows), first in zip(files, slots.tolist()):
            span = _Span(first, n_rows, base + first * row_bytes, n_rows * row_bytes)
            self._spans.append(span)
            if n_rows == 0:
                continue
            descriptor = _open(path, span.n_bytes)
            try:
                flags = mmap.MAP_SHARED | _MAP_FIXED
                _map(span.address, span.n_bytes, mmap.PROT_READ, flags, descriptor, DATA_OFFSET)
            finally:
                os.close(descriptor)
        self._base, self._length, self._row_bytes = base, length, row_bytes
        rows = np.frombuffer(memoryview(buffer), dtype=self.dtype, count=slot * width).reshape(slot, width)
        rows.flags.writeable = False
        self.rows = rows

    def take(self, slots: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows in these slots [n] to `out` [n, width]."""
        self._guard.check()
        # numpy's `take` is one single-threaded copy that lets other Python threads run.
        np.take(self.rows, slots, axis=0, out=out, mode="clip")

    def will_need(self, first_slot: int, n_slots: int) -> None:
        """Ask the system to start reading these slots from disk, without waiting for them."""
        start = self._base + first_slot * self._row_bytes
        aligned = start // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(aligned, start - aligned + n_slots * self._row_bytes, mmap.MADV_WILLNEED)

    def release(self) -> None:
        """Give mapped pages back: they stay in the system's cache, and count no longer as this process's memory."""
        _libc.madvise(self._base, self._length, mmap.MADV_DONTNEED)


class ReadShards:
    """The rows of more shards than the system maps for one process, read from their files instead. Slower, and for the
    rest like `MappedShards`."""

    def __init__(self, files: Sequence[tuple[Path, int]], slots: np.ndarray, width: int, itemsize: int) -> None:
        """As for `MappedShards`."""
        self._files, self._slots, self._row_bytes = files, slots, width * itemsize
        self.width, self.dtype = width, np.dtype(f"<i{itemsize}")
        self.n_bytes = int(slots[-1]) * self._row_bytes

    def take(self, slots: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows in these slots [n] to `out` [n, width]."""
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        shards = np.searchsorted(self._slots, ordered, side="right") - 1
        ends = np.flatnonzero((np.diff(ordered) != 1) | (np.diff(shards) != 0)) + 1
        opened, descriptor = -1, -1
        try:
            for first, end in zip([0, *ends.tolist()], [*ends.tolist(), len(order)]):
                if first == end:
                    continue
                shard = int(shards[first])
                path, n_rows = self._files[shard]
                if shard != opened:
                    if descriptor >= 0:
                        os.close(descriptor)
                    opened, descriptor = -1, -1
                    descriptor, opened = _open(path, n_rows * self._row_bytes), shard
                start = int(ordered[first] - self._slots[shard]) * self._row_bytes
                data = os.pread(descriptor, (end - first) * self._row_bytes, DATA_OFFSET + start)
                if len(data) != (end - first) * self._row_bytes:
                    raise _cut_short(path)
                out[order[first:end]] = np.frombuffer(data, self.dtype).reshape(-1, self.width)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def will_need(self, first_slot: int, n_slots: int) -> None:
        """Nothing: what is read is read at once."""

    def release(self) -> None:
        """Nothing: no page is kept."""


def open_shards(
    files: Sequence[tuple[Path, int]], slots: np.ndarray, width: int, itemsize: int
) -> MappedShards | ReadShards:
    """The shards of one hook point, mapped where they are not too many for it."""
    if len(files) <= max_mapped():
        return MappedShards(files, slots, width, itemsize)
    return ReadShards(files, slots, width, itemsize)


def max_mapped() -> int:
    """Shards of a hook point that are mapped: a quarter of the mappings that the system allows a process, as every
    shard takes up to two and other hook points and libraries need theirs."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text()) // 4
    except (OSError, ValueError):
        return 16_000
