"""`Steering`: a context in which a language model runs steered.

The main path: a context resolves its hook points and builds its edit once; in every pass the clock says where the
pass stands, the scope picks the tokens, the edit changes them, the trace notes them.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.lm.unwinding import Opened, Unwinding
from steersman.steer.edit_report import EditReport, Meter
from steersman.steer.edits import Edit, HookReader
from steersman.steer.scope import Scope
from steersman.steer.trace import Trace


class Steering(Opened):
    """One steered stretch of work: a context manager with a `trace`, and with a `report()` when it measures.

    A context can be entered again after it has closed; the trace and the report then start anew.
    """

    def __init__(
        self,
        lm: LanguageModel,
        edits: Mapping[str, Edit],
        scope: Scope,
        meter: Meter | None = None,
        for_all_threads: bool = False,
    ) -> None:
        super().__init__()
        self.lm = lm
        points = {lm.hook_point(hook): edit for hook, edit in edits.items()}
        for point, edit in points.items():
            edit.check(lm, point)
        self.edits = {point.name: edit for point, edit in points.items()}
        scope.check(lm)
        self.scope = scope
        self.for_all_threads = for_all_threads
        self.trace = Trace()
        self._meter = meter

    def __repr__(self) -> str:
        edits = ", ".join(f"{type(edit).__name__} at {hook}" for hook, edit in self.edits.items())
        return f"Steering({edits})"

    def _open(self, stack: Unwinding) -> None:
        self.trace = Trace()
        if self._meter is not None:
            self._meter.reset()
        unmet = _Unmet(self.scope)
        for hook, edit in self.edits.items():
            edit.reset()
            for read_at, reader in edit.readers(self.lm, self.lm.hook_point(hook)).items():
                stack.enter_context(self.lm.edit(read_at, _looking(reader), for_all_threads=self.for_all_threads))
        for hook, edit in self.edits.items():
            run = self._runner(edit, unmet)
            stack.enter_context(self.lm.edit(hook, run, for_all_threads=self.for_all_threads))
        stack.push(unmet.at_close)

    def _runner(self, edit: Edit, unmet: "_Unmet") -> Callable[[Tensor, ForwardPass], Tensor]:
        scope, idle, mixed = self.scope, not bool(edit.active.any()), not bool(edit.active.all())
        trace, meter = self.trace, self._meter

        def run(h: Tensor, fwd: ForwardPass) -> Tensor:
            if edit.rows > 1:
                fwd.row_index(edit.rows)  # a wrong number of rows is an error even where nothing would be steered
            where = False if idle else scope.select(fwd)
            if not idle:
                unmet.note(fwd)
            where = edit.narrow(where, fwd, h)
            if isinstance(where, bool) and not where:
                return h
            if mixed:
                rows = edit.expand(edit.active.to(fwd.device), fwd)[:, None]
                where = rows.expand(fwd.batch, fwd.length) if isinstance(where, bool) else where & rows
            new = edit.apply(h, fwd, where)
            trace.record(fwd, where)
            if meter is not None:
                meter.record(h, new, fwd, where)
            return new

        return run

    def report(self) -> EditReport:
        """What the edit achieved so far: see `EditReport`. Only for features opened with `measure=True`."""
        if self._meter is None:
            raise SteersmanError("nothing was measured: open the context with measure=True")
        return self._meter.report()


def _looking(reader: HookReader) -> Callable[[Tensor, ForwardPass], Tensor]:
    def run(h: Tensor, fwd: ForwardPass) -> Tensor:
        reader(h, fwd)
        return h

    return run


class _Unmet:
    """Says that scope `generation` finds nothing to steer in plain passes, where every token counts as prompt."""

    def __init__(self, scope: Scope) -> None:
        self.watching = scope.kind == "generation"
        self.plain: int | None = None  # the text of a plain pass that no generated token has followed

    def note(self, fwd: ForwardPass) -> None:
        if not self.watching:
            return
        if fwd.phase != "prompt" or fwd.run is not None:
            self.watching = False  # there is something to steer
        elif self.plain is not None and self.plain != fwd.sequence:
            self.warn()
        else:
            self.plain = fwd.sequence

    def at_close(self, kind: type[BaseException] | None, *_error: Any) -> None:
        if kind is None and self.watching and self.plain is not None:
            self.warn()

    def warn(self) -> None:
        self.watching = False
        warnings.warn(
            "scope 'generation' steered nothing: a pass outside generate is all prompt unless lm.prompt_length(n) (or "
            "prompt_length= of lm.logits) says where the prompt ends; use that, or scope 'all'",
            stacklevel=2,
        )
