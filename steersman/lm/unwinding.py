"""Contexts that Ctrl-C cannot leave half open."""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from steersman.errors import SteersmanError


class Unwinding(ExitStack):
    """An `ExitStack` that unwinds wherever a KeyboardInterrupt strikes.

    What undoes a step is registered before the step, is safe to call twice, and is called twice: an interrupt within
    the first call leaves its rest to the second. One that strikes between the end of a `with` block and its exit drops
    the stack, which unwinds then too. A copy, or what is read from a pickle, holds nothing open.
    """

    _exit_callbacks: deque[Any]

    def undo(self, step: Callable[..., Any], *args: Any) -> None:
        """Call `step(*args)`, which may run twice, when the stack unwinds."""
        self.callback(step, *args)
        self.callback(step, *args)

    @property
    def is_open(self) -> bool:
        """Whether anything is left to unwind."""
        return bool(self._exit_callbacks)

    def __del__(self) -> None:
        if "_exit_callbacks" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_exit_callbacks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _exit_callbacks=deque())


class Opened(Unwinding):
    """A context that `start(stack)` opens, having registered on the stack how each of its steps is undone. What it
    puts on a model must not refer to it: dropped, it closes."""

    def __init__(self, start: Callable[[Unwinding], None] | None = None) -> None:
        super().__init__()
        self._start = start

    def _open(self, stack: Unwinding) -> None:
        assert self._start is not None
        self._start(stack)

    def __enter__(self) -> Self:
        if self.is_open:
            raise SteersmanError("this context is already open: make a second one to nest it")
        try:
            self._open(self)
            return self
        except BaseException:
            self.close()
            raise
