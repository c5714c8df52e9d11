"""SIGTERM, which a scheduler sends before it takes a machine away: noticed between two steps, by all ranks in the same
one."""

import signal
import threading
from collections.abc import Callable
from typing import Any, Self

import torch

from steersman.parallel import RankGroup, comm_errors


class Preemption:
    """While it is entered, SIGTERM ends nothing but is remembered, and `now` says whether to save and end.

    With several ranks `now` is called by all of them after each step. It answers what was known on any rank one step
    before, so that nobody waits for the exchange, and everybody gets the same answer. A handler that the program set
    itself is left alone, and outside the main thread, where Python allows no handlers, nothing is noticed.
    """

    def __init__(self, control: RankGroup, asked_elsewhere: Callable[[], bool] = lambda: False) -> None:
        """`asked_elsewhere` says whether a process that is not of `control` was asked to end."""
        self._control, self._asked_here, self._asked_elsewhere = control, False, asked_elsewhere
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: Any = None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self._asked_here = True

    @property
    def _asked(self) -> bool:
        return self._asked_here or self._asked_elsewhere()

    def now(self) -> bool:
        """Whether some rank was asked to end."""
        if self._control.size == 1:
            return self._asked
        answer = False
        if self._pending is not None:
            work, flag = self._pending
            with comm_errors():
                work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([self._asked], dtype=torch.uint8)
        self._pending = (self._control.max_later(flag), flag)
        return answer

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
