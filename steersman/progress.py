"""Progress bars for work that a person waits for."""

import io
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

TICK = 1.0
"""Seconds after which a bar on a terminal moves on, however long a step takes."""
LINE = 60.0
"""Seconds between lines where nobody watches a terminal."""


class _Ticking(tqdm):
    """A bar whose clock runs while a step is under way."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._over = threading.Event()
        if not self.disable:
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._over.wait(TICK):
            self.refresh()

    def close(self) -> None:
        self._over.set()
        super().close()


class _Lines(tqdm):
    """A line now and then in place of a bar, for a file or a job's log."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        if not self.disable and self.n > self.last_print_n and time.time() - self.start_t > self.delay:
            self.display()
        self.leave, self.fp = False, io.StringIO()  # closing wipes a bar out, and there is none
        super().close()

    def clear(self, nolock: bool = False) -> None:
        """There is no bar to wipe out."""


def progress(
    iterable: Iterable[Any] | None = None, *, desc: str, total: int | None = None, shown: bool = True, **options: Any
) -> tqdm:
    """A tqdm bar on standard error, with the rate and the time left: it moves every second on a terminal, is a line a
    minute elsewhere, and silent when `STEERSMAN_PROGRESS=0` or not to be `shown` (on ranks other than 0)."""
    silent = not shown or os.environ.get("STEERSMAN_PROGRESS") == "0"
    if sys.stderr.isatty():
        kind: type[tqdm] = _Ticking
        manner: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True}
    else:
        kind = _Lines
        manner = {"mininterval": LINE, "maxinterval": LINE, "delay": LINE}
        if total is not None:
            manner["bar_format"] = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    return kind(iterable, desc=desc, total=total, disable=silent, **manner | options)
