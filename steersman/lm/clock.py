"""The pass clock: which absolute positions a forward pass sees, and whose edits apply to it.

Under a KV cache a decoding step sees one token, and the blocks do not know which. So the clock sits at the top: a
pre-hook on the whole model reads `input_ids`, `attention_mask` and what came before, and the hooks on the blocks read
the `ForwardPass` it leaves. At the end of a pass every edit that applies to it must have run.

An edit is its opener's: it applies to passes made in the same context of execution (`contextvars`: the thread, the
asyncio task and the tasks it starts). A thread that has opened none is refused while another steers, because nobody
can tell whether it should be steered; edits `for_all_threads` apply everywhere.
"""

import inspect
import itertools
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm.attached import Hook, remove_stand_ins
from steersman.lm.generate import stop_ids
from steersman.lm.hooks import LOGITS, HookPoint
from steersman.lm.passes import ForwardPass, GenerationRun
from steersman.lm.stand_ins import STAND_INS
from steersman.lm.unwinding import Opened, Unwinding
from steersman.lm.wrappers import eager, is_compiled, recomputes

CACHE_NAMES = ("cache", "past_key_values")
"""What a model's forward calls its KV cache: since transformers 5.24, and before it. Later versions take both."""
STATE_NAMES = (*CACHE_NAMES, "cache_params", "state")
"""The same with the names that recurrent models have for theirs."""

PromptLength = int | Sequence[int] | Tensor
"""How many real tokens of each row are its prompt: one number for all rows, or one for each."""


class PassDone(Exception):
    """Ends a pass after the last hook point that was asked for; who raises it in a hook catches it around the pass."""


class _Held:
    """What a context of execution holds open on a clock: an edit at `point`, a declared prompt length, whose the tokens
    of a chat are (False: that nobody says), or that passes are to be `unedited`."""

    def __init__(
        self, clock: "PassClock", point: HookPoint | None = None, declared: PromptLength | None = None
    ) -> None:
        self.clock, self.point, self.declared = clock, point, declared
        self.fn: Callable[[Tensor], Tensor | None] = lambda h: None
        self.for_all_threads = False
        self.unedited = False
        self.spans: Any = None
        self.apart = False  # from the pass in the middle of which it was opened
        self.handle: Any = None

    def run(self, h: Tensor) -> Tensor | None:
        """What the hook at `point` does."""
        now = self.clock.state.now
        if now is None:
            if self not in _HELD.get():
                return None  # a pass of another thread, begun before the edit was opened
            self.clock.now()
        elif self in now.reached:
            now.reached[self] = True
            return self.fn(h)
        return None


_HELD: ContextVar[tuple[_Held, ...]] = ContextVar("steersman_held", default=())


class _State(threading.local):
    """Where the passes of a thread stand."""

    now: ForwardPass | None = None
    runs: tuple[GenerationRun, ...] = ()
    last: tuple[int, int, int] | None = None  # end column, rows and prompt columns of the pass before
    sequence = 0
    passes = 0

    def set_aside(self, stack: Unwinding) -> None:
        """Until the stack unwinds, passes made here are no part of the one that is running."""
        stack.undo(self._resume, self.now, self.runs, self.last, self.sequence)
        self.now, self.runs, self.last = None, (), None

    def _resume(self, now: ForwardPass, *rest: Any) -> None:
        self.now = now
        self.runs, self.last, self.sequence = rest


class PassClock:
    """Installs the top-level hooks while something needs them, and removes every trace of them afterwards."""

    def __init__(self, model: nn.Module, bos_id: int | None) -> None:
        self.model = model
        self.bos_id = bos_id
        self.state = _State()
        self.parameters = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self.cache_name = next((name for name in CACHE_NAMES if name in self.parameters), "past_key_values")
        self._edits: dict[_Held, None] = {}
        self._handles: list[Any] = []
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)

    def now(self) -> ForwardPass:
        """The pass that is running. Raises SteersmanError when a part of the model was called by itself."""
        if self.state.now is None:
            raise SteersmanError(
                "an edited block ran outside a pass of the whole model: call the LanguageModel or its .model, no part"
            )
        return self.state.now

    # Opening and closing

    def editing(self, point: HookPoint, fn: Callable[[Tensor], Tensor | None], for_all_threads: bool = False) -> Opened:
        """A context in which `fn(h)` is called at `point` in every pass that the edit applies to."""

        def start(stack: Unwinding) -> None:
            self._check_free()
            held = _Held(self, point)
            held.fn, held.for_all_threads = fn, for_all_threads
            stack.undo(self._close, held)
            if is_compiled(self.model):
                eager.hold(stack)
            with self.locked():
                self._edits[held] = None
                self._install()
                held.handle = point.attach(held.run, past=lambda: self.now().past)
                if point.kind == LOGITS:  # the pass ends after every hook on the whole model
                    cast(Any, self.model._forward_hooks).move_to_end(self._handles[1].id)
            _HELD.set((*_HELD.get(), held))

        return Opened(start)

    def declare(
        self, prompt_length: PromptLength | None = None, *, spans: Any = None, unedited: bool = False
    ) -> Opened:
        """Say how many real tokens of each row are its prompt, for passes outside `generate` (None says nothing), whose
        they are (a `ChatSpans`; False: that nobody says), or that passes are not to be edited. Inside a pass, unedited
        ones are apart from it and from its run."""

        def start(stack: Unwinding) -> None:
            apart = unedited and self.state.now is not None
            if apart:
                self.state.set_aside(stack)
            if prompt_length is not None or spans is not None or unedited:
                held = _Held(self, declared=prompt_length)
                held.unedited, held.spans, held.apart = unedited, spans, apart
                stack.undo(_release, held)
                _HELD.set((*_HELD.get(), held))

        return Opened(start)

    def locked(self) -> Unwinding:
        """For as long as the stack is open, no other thread attaches or removes hooks."""
        stack = Unwinding()
        stack.enter_context(self._lock)
        return stack

    def _close(self, held: _Held) -> None:
        _release(held)
        with self.locked():
            self._edits.pop(held, None)
            assert held.point is not None
            held.point.release(held.run) if held.handle is None else held.handle.remove()
            if not self._edits:
                self._remove()

    def _check_free(self) -> None:
        """Refuse a model whose passes are already made by a continuous-batching thread, which cannot be steered."""
        for thread in threading.enumerate():
            manager = getattr(getattr(thread, "_target", None), "__self__", None)
            if type(manager).__name__ == "ContinuousBatchingManager" and getattr(manager, "model", None) is self.model:
                raise SteersmanError("continuous batching is running on this model: stop its manager before steering")

    def _install(self) -> None:
        if self._handles:
            return
        self.state.last, self.state.runs, self.state.now = None, (), None
        for name, stand_in in STAND_INS.items():
            if hasattr(self.model, name):
                self.model.__dict__[name] = stand_in(self, self.model, name)
        self._handles.append(self.model.register_forward_pre_hook(Hook(self._before), with_kwargs=True))
        # always_call: a pass that raises, or is stopped after the last hook needed, must not leave itself behind
        self._handles.append(self.model.register_forward_hook(Hook(self._after), always_call=True))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.state.now = self.state.last = None
        self.state.runs = ()
        for name in STAND_INS:
            remove_stand_ins(self.model, name, lambda found: found.owner is self or not found.owner._handles)

    # Passes

    def mine(self) -> list[_Held]:
        """The edits that apply to a pass made here, in no particular order."""
        own, everywhere = self._own()
        return [held for held in tuple(self._edits) if held in own or (everywhere and held.for_all_threads)]

    def _own(self) -> tuple[tuple[_Held, ...], bool]:
        """What was opened here, and whether edits for all threads apply: both only since passes are to be unedited."""
        held = _HELD.get()
        since = max((i + 1 for i, one in enumerate(held) if one.unedited and one.clock is self), default=0)
        return held[since:], since == 0

    def _applying(self) -> list[_Held]:
        edits = self.mine()
        if not edits and self._edits and self._own()[1]:
            raise SteersmanError(
                "another thread or task is steering this model, and this one has opened no edit: open the edit here, "
                "share it with Steerer(lm, for_all_threads=True), or make the pass inside lm.unedited()"
            )
        return edits

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            torch._dynamo.skip_frame("a model cannot be compiled with edits in it")  # it runs as it is
        edits = self._applying()
        if any(held.point is not None and held.point.kind != LOGITS for held in edits) and recomputes(module):
            raise SteersmanError(
                "gradient checkpointing runs blocks again in backward, when the edits may be gone: call "
                "lm.model.gradient_checkpointing_disable() before steering with gradients"
            )
        given = {**dict(zip(self.parameters, args)), **kwargs}
        ids = given.get("input_ids")
        x = ids if ids is not None else given.get("inputs_embeds")
        if x is None:
            raise SteersmanError("a pass needs input_ids or inputs_embeds for edits to know its positions")
        state = self.state
        run = state.runs[-1] if state.runs else None
        mask = given.get("attention_mask")
        wide = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0
        batch, length = x.shape[0], x.shape[1]
        past = self._past(given, run, batch, length, wide)
        if run is not None:
            columns = run.prompt_columns
            run.passes, run.seen = run.passes + 1, past + length
        else:
            columns = self._manual_columns(batch, past, length, wide)
            if past == 0:
                state.sequence = next(self._numbers)
            state.last = (past + length, batch, columns)
        state.passes += 1
        state.now = ForwardPass(
            input_ids=ids,
            shape=(batch, length),
            device=x.device,
            past=past,
            mask=mask,
            prompt_columns=columns,
            declared=None if run is not None else self._declared(batch, x.device),
            bos_id=self.bos_id,
            sequence=state.sequence if run is None else run.sequence,
            run=run,
            edits=edits,
            spans=self.spans() if run is None else run.spans,
        )

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        now, self.state.now = self.state.now, None
        if now is None or output is None:  # the pass raised, or was stopped after the last hook that was needed
            return
        for held, ran in now.reached.items():
            if not ran and held.point is not None and held in self._edits:
                raise not_reached(held.point.name)

    def check_seen(self, passes: int) -> None:
        """Raise SteersmanError when edits apply here and no pass was seen since `state.passes` was `passes`."""
        if self.state.passes == passes and (edits := self.mine()):
            raise not_reached(cast(HookPoint, edits[0].point).name)

    def _past(self, given: dict[str, Any], run: GenerationRun | None, batch: int, length: int, wide: int) -> int:
        """How many columns came before this pass: those that the clock has seen, unless the cache knows better."""
        cache = next((given[name] for name in STATE_NAMES if given.get(name) is not None), None)
        if run is not None:
            seen = run.seen
            if (
                cache is None
            ):  # without a cache every pass begins anew and covers more; some models keep their own state
                return 0 if given.get("use_cache") is False or length > seen else seen
        elif cache is None:
            return 0
        else:
            last = self.state.last
            seen = last[0] if last is not None and last[1] == batch else 0
        known = _cached(cache)
        if known is None:
            return seen if run is not None or _started(cache) else 0
        if run is None or known == seen:
            return known
        return wide - length if wide >= length else known if known else seen

    def _manual_columns(self, batch: int, past: int, length: int, masked: int) -> int:
        """Where the prompt ends in a user's own loop: several tokens at once continue it, single ones follow it."""
        if past == 0:
            return max(length, masked)
        last = self.state.last
        columns = last[2] if last is not None and last[:2] == (past, batch) else past
        return max(columns, past + length) if length > 1 else columns

    def _declared(self, batch: int, device: torch.device) -> Tensor | None:
        declared = [held.declared for held in self._said() if held.declared is not None]
        if not declared:
            return None
        lengths = torch.as_tensor(declared[-1], device=device).long().flatten()
        if lengths.numel() not in (1, batch):
            raise SteersmanError(f"prompt_length has {lengths.numel()} entries and the batch has {batch} rows")
        return lengths.expand(batch)

    def _said(self) -> tuple[_Held, ...]:
        """What was opened here and holds for passes made now: what is said about a pass is not about one in its
        midst."""
        held = tuple(one for one in _HELD.get() if one.clock is self)
        return held[max((i for i, one in enumerate(held) if one.apart), default=0) :]

    def spans(self) -> Any:
        """Whose the tokens of passes made here are, as it was declared last; None where nobody says."""
        found = [held.spans for held in self._said() if held.spans is not None]
        return found[-1] or None if found else None

    # Generation

    def begin_run(self, args: tuple[Any, ...], kwargs: dict[str, Any], stack: Unwinding) -> GenerationRun:
        """Note a call of `generate` until the stack unwinds."""
        self._applying()
        run = self.numbered(self._read_run(args, kwargs))
        self.resume(run, stack)
        return run

    def numbered(self, run: GenerationRun) -> GenerationRun:
        """`run` as a text of its own."""
        run.sequence = self.state.sequence = next(self._numbers)
        return run

    def resume(self, run: GenerationRun, stack: Unwinding) -> None:
        """Until the stack unwinds, passes made here are those of `run`, which others may have interrupted. Edits are
        opened before."""
        stack.undo(self._end_run, run)
        self.state.runs = (*self.state.runs, run)

    def _end_run(self, run: GenerationRun) -> None:
        self.state.runs = tuple(other for other in self.state.runs if other is not run)
        self.state.last = self.state.now = None

    def _read_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerationRun:
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        x = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask")
        columns = max(1 if x is None else x.shape[1], 0 if mask is None else mask.shape[1])
        configs = [kwargs.get("generation_config"), getattr(self.model, "generation_config", None)]

        def setting(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]  # None too: `eos_token_id=None` means that nothing ends a row
            return next((getattr(c, name) for c in configs if getattr(c, name, None) is not None), None)

        if setting("guidance_scale") not in (None, 1):
            raise SteersmanError(
                "guidance_scale makes passes of a second text between those of the first, which cannot be told apart: "
                "decode with steersman.steer.Mix.guidance(negative_prompt, g=guidance_scale), which steers either"
            )
        stop = stop_ids(setting("eos_token_id"))
        rows, beams = 1 if x is None else x.shape[0], int(setting("num_beams") or 1)
        run = GenerationRun(rows, columns, mask, stop, beams, self.spans())
        run.input_ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == columns else None
        return run


def _release(held: _Held) -> None:
    held.declared = None
    _HELD.set(tuple(other for other in _HELD.get() if other is not held))


def _cached(cache: Any) -> int | None:
    """How many columns a cache says it holds, or None where it cannot say."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError):
        return None


def _started(state: Any) -> bool:
    """Whether a recurrent state has seen any token; True where it cannot say."""
    started = getattr(state, "has_previous_state", True)
    try:
        return bool(started() if callable(started) else started)
    except (TypeError, ValueError, IndexError):
        return True


def not_reached(name: str) -> SteersmanError:
    """The error for a hook that was attached and did not run."""
    return SteersmanError(
        f"the pass never reached {name}, so what is attached there did nothing: the block was skipped or replaced, or "
        "runs as compiled code"
    )
