"""The C library's allocator, set for programs that make the same large temporaries over and over."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have freed memory reused by this process instead of being given back at once (glibc only; elsewhere nothing).

    glibc maps every block above 32 MiB anew, and the system clears each of its pages on first use: a quarter to a half
    of the time of a small model's pass on the CPU. What was the peak of memory stays with the process until it ends,
    and is higher (by a tenth, by a quarter where large matrices of several sizes take turns), which is why the command
    line does this and the library does not.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
