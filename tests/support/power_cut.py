"""End a program between two changes to the disk, as a power cut does: nothing after it happens, no clean-up either."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_CHANGES = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync")


class PowerCut(BaseException):
    """Not an Exception, so that nothing takes it for an error that it could deal with."""


@contextmanager
def power_cut_after(n: int) -> Iterator[list[str]]:
    """The n-th change to the disk (counted from 0), and every one after it, raises a `PowerCut` in this process.

    Gives the list of the changes made, which is shorter than n when the block ended before.
    """
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in _CHANGES:

            def change(*args: object, _name: str = name, _original: object = getattr(os, name), **kwargs: object):
                if len(made) >= n:
                    raise PowerCut(f"before {_name} number {n}")
                made.append(_name)
                return _original(*args, **kwargs)  # pyright: ignore[reportCallIssue]

            patch.setattr(os, name, change)
        patch.setattr(fcntl, "flock", lambda *_: None)  # a lock would end with the process, which here lives on
        yield made
