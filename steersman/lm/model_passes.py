"""The part of `LanguageModel` that makes forward passes: what they are given, read and edited."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm.chat_spans import ChatSpans
from steersman.lm.clock import PassClock, PassDone, PromptLength, not_reached
from steersman.lm.generate import Generation
from steersman.lm.hooks import LOGITS, HookName, HookPoint, several_hooks
from steersman.lm.model_points import ModelPoints
from steersman.lm.passes import ForwardPass
from steersman.lm.tokens import TokenBatch
from steersman.lm.unwinding import Unwinding
from steersman.lm.wrappers import eager, is_compiled


class ModelPasses(ModelPoints):
    """A model's forward passes, under the clock that tells edits where each stands."""

    _clock: PassClock
    _first_position: int
    _reads_padding: bool | None

    @property
    def clock(self) -> PassClock:
        """What tells edits where a pass stands; for decoders that make passes of their own (see `lm.session`)."""
        return self._clock

    @property
    def cache_name(self) -> str:
        """What the model's forward calls its KV cache."""
        return self._clock.cache_name

    def accepts(self, argument: str) -> bool:
        """Whether the model's forward takes an argument of this name."""
        return argument in self._clock.parameters

    def _inputs(self, input_ids: Tensor | TokenBatch, attention_mask: Tensor | None) -> dict[str, Any]:
        if isinstance(input_ids, TokenBatch):
            input_ids, attention_mask = input_ids.input_ids, input_ids.attention_mask
        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.ndim == 1:
            ids = ids[None]
        if ids.ndim != 2 or ids.numel() == 0:
            raise SteersmanError(f"input_ids must be [batch, sequence] and not empty, got {tuple(ids.shape)}")
        inputs: dict[str, Any] = {"input_ids": ids}
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask, device=self.device).long().reshape(ids.shape)
            inputs["attention_mask"] = mask
            if bool((mask[:, 0] == 0).any()):
                self.check_left_padding()
                inputs |= self.padded_inputs(mask, ids.shape[1])
        if self.accepts("use_cache"):
            inputs["use_cache"] = False
        return inputs

    def padded_inputs(self, mask: Tensor, n: int) -> dict[str, Tensor]:
        """What a pass over the last n columns of text padded on the left is given beside its tokens: `mask` [B, S], of
        all columns so far, and positions that start where they do without padding, as in generate."""
        inputs = {"attention_mask": mask}
        if self.accepts("position_ids"):
            inputs["position_ids"] = ((mask.cumsum(1) - 1).clamp(min=0) + self._first_position)[:, -n:]
        return inputs

    def check_left_padding(self) -> None:
        """Refuse left padding for a recurrent model that reads it, which is measured once."""
        if not getattr(self.model, "_is_stateful", False):
            return
        if self._reads_padding is None:
            self._reads_padding = False  # for the passes that follow
            ids = torch.arange(1, 4, device=self.device)[None] % int(self.config.vocab_size)
            padded, mask = torch.cat([ids[:, :2], ids], 1), torch.tensor([[0, 0, 1, 1, 1]])
            with self.unedited():
                hook = f"blocks.{self.n_layers - 1}.hook_resid_post"
                alone, behind = (self.capture(*given, hooks=hook)[hook][:, -3:] for given in ((ids,), (padded, mask)))
            self._reads_padding = bool((behind - alone).norm() > 0.01 * alone.norm())
        if self._reads_padding:
            raise SteersmanError(
                f"{self.name} is recurrent and reads padding on the left as text: give prompts of one length, or one "
                "at a time"
            )

    @torch.no_grad()
    def capture(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None = None,
        *,
        hooks: HookName | Sequence[HookName],
        prompt_length: PromptLength | None = None,
    ) -> dict[Any, Tensor]:
        """What the named hook points hold, from one pass that stops after the last one needed: hidden states [B, S, D]
        (D as `hook_width` says), attention masks [B, H, S, S], logits [B, S, V].

        `input_ids` [B, S] and `attention_mask` [B, S] as from `encode`, or the batch itself, which also knows whose
        the tokens of conversations are. The keys are the names as given. Inside an edit the edited states are read;
        `prompt_length` is then as for `prompt_length()`. Padding is included as it comes.
        """
        points = {name: self._reachable(name) for name in several_hooks(hooks)}
        if not points:
            raise SteersmanError("capture needs at least one hook point")
        inputs = self._inputs(input_ids, attention_mask)
        shape = inputs["input_ids"].shape
        waiting = {point.name for point in points.values()}
        states: dict[str, Tensor] = {}

        here = threading.get_ident()

        def reader(point: HookPoint) -> Callable[[Tensor], None]:
            # Falcon adds the attention's output into the MLP's in place: keep what a sublayer takes and returns apart.
            name, own = point.name, point.kind.startswith("hook_resid") or point.kind == LOGITS

            def read(h: Tensor) -> None:
                if threading.get_ident() != here:
                    return
                h = point.states(h, *shape)
                states[name] = h if own else h.clone()
                waiting.discard(name)
                if not waiting:
                    raise PassDone

            return read

        def detach(point: HookPoint, read: Callable[[Tensor], None]) -> None:
            handle = handles.get(read)
            point.release(read) if handle is None else handle.remove()

        handles: dict[Any, Any] = {}
        with Unwinding() as stack:
            stack.enter_context(self._clock.declare(prompt_length, spans=_spans_of(input_ids)))
            self._prepare(stack)
            if is_compiled(self.model):
                eager.hold(stack)
            for point in {p.name: p for p in points.values()}.values():
                read = reader(point)
                stack.undo(detach, point, read)
                with self._clock.locked():
                    handles[read] = point.attach(read)
            with suppress(PassDone):
                self.model(**inputs)
        for point in points.values():
            if point.name in waiting:
                raise not_reached(point.name)
        return {name: states[point.name] for name, point in points.items()}

    def _prepare(self, stack: Unwinding) -> None:
        """Keep the model in evaluation mode until the stack unwinds: dropout has no place in what is read."""
        if self.model.training:
            training = [module for module in self.model.modules() if module.training]
            stack.undo(_set_training, training, True)
            _set_training(training, False)

    def edit(
        self, hook: HookName, fn: Callable[[Tensor, ForwardPass], Tensor], *, for_all_threads: bool = False
    ) -> AbstractContextManager[Any]:
        """While the context is open, `fn(h, fwd)` replaces what is at `hook` in every pass: a hidden state [B, S, D],
        an attention mask [B, H, S, K], or logits [B, n, V] (n < S where the pass computes the last tokens' only).

        `fwd` (a `ForwardPass`) says which tokens and absolute positions the pass holds; at the logits, those that have
        logits. `fn` returns a new tensor of h's shape, or h itself to change nothing; it must not write into h. Edits
        nest, apply in the order they were entered, and are gone when the context closes, by an exception too.

        An edit is of the thread or asyncio task that opened it, and of the tasks that are started inside. Others may
        open edits of their own at the same time; a pass of one that has none is an error meanwhile, as it cannot be
        told whether it should be edited. `for_all_threads` edits their passes as well, as a server needs.

        A pass that does not come to `hook` (a block that is skipped or replaced) is an error, and so is one under
        gradient checkpointing with gradients, which would run blocks again without the edit.

        Raises SteersmanError for an unknown hook point, and for one that the model as it is loaded does not have:
        attention masks where the implementation takes none, heads and neurons that tensor parallelism splits.
        """
        point = self._reachable(hook)

        def apply(h: Tensor) -> Tensor | None:
            fwd = self._clock.now()
            x = point.states(h, fwd.batch, fwd.length)
            new = fn(x, fwd.last(x.shape[1]) if point.kind == LOGITS else fwd)
            if new is x:
                return None
            if not isinstance(new, Tensor) or new.shape != x.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise SteersmanError(f"the edit at {point.name} returned {got}, expected a tensor {tuple(x.shape)}")
            return new.to(h.dtype).reshape(h.shape)

        return self._clock.editing(point, apply, for_all_threads)

    def unedited(self) -> AbstractContextManager[Any]:
        """A context in which passes are made without the edits that are open around it, here and in other threads. An
        edit may open it in the middle of a pass, to make another that the first knows nothing of."""
        return self._clock.declare(None, unedited=True)

    def prompt_length(self, lengths: PromptLength) -> AbstractContextManager[Any]:
        """Declare how many real tokens (BOS included) of each row are its prompt, for passes outside `generate`.

        Without it every token of a plain forward pass is prompt; with it, teacher forcing a generated text steers the
        same positions as generating it did.
        """
        return self._clock.declare(lengths)

    def chat_spans(self, spans: ChatSpans | TokenBatch | Generation) -> AbstractContextManager[Any]:
        """Declare whose the tokens of the passes inside are, row by row and by absolute position, for scopes such as
        `assistant`: of `encode_chat`'s batch, a generation, or their `spans`. `chat` and `generate` do it themselves,
        and so do `logits` and `capture` for a batch; calls of `lm.model` need it."""
        found = spans if isinstance(spans, ChatSpans) else spans.spans
        if found is None:
            raise SteersmanError("these are no conversations: encode them with lm.encode_chat")
        return self._clock.declare(spans=found)

    def logits(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None = None,
        *,
        prompt_length: PromptLength | None = None,
        grad: bool = False,
    ) -> Tensor:
        """Logits [B, S, V] of one pass without a cache, of ids or a batch as for `capture`; `prompt_length` as for
        `prompt_length()`. `grad` keeps the graph, for whoever optimises what an edit adds, unless gradients are off
        outside too."""
        inputs = self._inputs(input_ids, attention_mask)
        with Unwinding() as stack:
            stack.enter_context(self._clock.declare(prompt_length, spans=_spans_of(input_ids)))
            if not grad:
                self._prepare(stack)
            before = self._clock.state.passes
            with nullcontext() if grad else torch.no_grad():
                output = self.model(**inputs)
            self._clock.check_seen(before)
        if not hasattr(output, "logits"):
            raise SteersmanError(f"{self.name} has no output layer over its vocabulary: it has hidden states only")
        return output.logits


def _spans_of(given: object) -> ChatSpans | None:
    return given.spans if isinstance(given, TokenBatch) else None


def _set_training(modules: Sequence[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode
