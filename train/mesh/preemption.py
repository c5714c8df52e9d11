"""SIGTERM, which a scheduler sends before it takes a machine away, and Ctrl-C: noticed between two steps, by all ranks
in the same one."""

import signal
import threading
from collections.abc import Callable
from typing import Any, Self

import torch

from steersman.errors import PreemptedError
from steersman.parallel import RankGroup, comm_errors

_NOTHING, _PREEMPTED, _INTERRUPTED = range(3)


class Preemption:
    """While it is entered, SIGTERM and a first Ctrl-C end nothing but are remembered; `now` says whether to save and
    end, and `error` what to raise.

    With several ranks `now` is called by all of them after each step. It answers what was known on any rank one step
    before, so that nobody waits for the exchange, and everybody gets the same answer. A handler that the program set
    itself is left alone, and outside the main thread, where Python allows no handlers, nothing is noticed.
    """

    def __init__(self, control: RankGroup, asked_elsewhere: Callable[[], bool] = lambda: False) -> None:
        """`asked_elsewhere` says whether a process that is not of `control` was asked to end."""
        self._control, self._asked_here, self._asked_elsewhere = control, _NOTHING, asked_elsewhere
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: dict[int, Any] = {}
        self.interrupted = False
        """Whether it was Ctrl-C that `now` answered for."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
            for number, handler in usual.items():
                if signal.getsignal(number) is handler:
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._asked_here == _INTERRUPTED:  # a second time: at once
            raise KeyboardInterrupt
        self._asked_here = _INTERRUPTED if number == signal.SIGINT else max(self._asked_here, _PREEMPTED)

    @property
    def _asked(self) -> int:
        return self._asked_here or (_PREEMPTED if self._asked_elsewhere() else _NOTHING)

    def now(self) -> bool:
        """Whether some rank was asked to end."""
        answer = self._asked if self._control.size == 1 else self._exchanged()
        self.interrupted = answer == _INTERRUPTED
        return answer != _NOTHING

    def error(self, message: str) -> BaseException:
        """What to raise when `now` has said so and all is saved."""
        return KeyboardInterrupt() if self.interrupted else PreemptedError(message)

    def _exchanged(self) -> int:
        answer = _NOTHING
        if self._pending is not None:
            work, flag = self._pending
            with comm_errors():
                work.wait()
            answer = int(flag.item())
        flag = torch.tensor([self._asked], dtype=torch.uint8)
        self._pending = (self._control.max_later(flag), flag)
        return answer

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
