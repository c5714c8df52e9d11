"""Tokens as they are generated, row by row, from the same call of transformers that `generate` makes.

That call runs in a thread of its own, in step with whoever reads: it works while the next tokens are waited for and
stands still in between. The thread carries the reader's context (`contextvars`), so that edits open there apply, and
with a seed the random numbers of the two are kept apart.
"""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm.generate import Generation, check_options, end_tokens, run_generation
from steersman.lm.tokens import TokenBatch


@dataclass(frozen=True, kw_only=True)
class StreamedToken:
    """One generated token."""

    row: int
    """Its row: the prompt's number, or of `num_return_sequences` as in a `Generation`."""
    token: int
    """Token id."""
    text: str
    """The text that it completes: whole characters, so it may be empty; the pieces of a row join to its completion."""
    finished: bool
    """Whether it is the row's last token."""


class Stream:
    """An iterator of `StreamedToken`s. `close()`, the end of a `with` block or the last reference to it stops the
    generation and leaves nothing on the model; `generation` is the whole of it, once it is at its end."""

    def __init__(
        self, run: Callable[["Streamer"], Generation], text: "TextPieces", device: torch.device, seed: int | None
    ) -> None:
        self._run, self._text, self._device = run, text, device
        self._seed = seed
        self._worker: _Worker | None = None
        self._waiting: deque[StreamedToken] = deque()
        self._ended = False
        self.generation: Generation | None = None
        """What was generated, after the last token; None before."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamedToken:
        while not self._waiting:
            if self._ended:
                raise StopIteration
            self._advance()
        return self._waiting.popleft()

    def _advance(self) -> None:
        if self._worker is None:
            self._worker = _Worker(self._run, self._device, self._seed)
        try:
            tokens = self._worker.next()
        except BaseException:
            self.close()
            raise
        if tokens is None:
            self.generation = self._worker.result
            self._ended = True
            self._worker.join()
        self._waiting.extend(self._text.add(tokens))

    def close(self) -> None:
        """Stop where it stands."""
        self._ended = True
        self._waiting.clear()
        if self._worker is not None:
            self._worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if "_worker" in self.__dict__:
            self.close()


def streamed(
    lm: Any,
    batch: TokenBatch,
    shown: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
    seed: int | None,
    use_cache: bool,
    options: Mapping[str, Any],
) -> Stream:
    """`run_generation` as a stream of its tokens. Raises SteersmanError for options that it refuses."""
    if "streamer" in options:
        raise SteersmanError("stream gives the tokens itself: generate takes a streamer")
    check_options(options, len(batch.input_ids))
    times = int(options.get("num_return_sequences") or 1)
    rows = [ids[real].tolist() for ids, real in zip(batch.input_ids, batch.attention_mask.bool())]
    text = TextPieces(
        lm.tokenizer,
        [row for row in rows for _ in range(times)],
        end_tokens(lm, options),
        max_new_tokens,
        others_end=any(options.get(name) for name in ("stop_strings", "stopping_criteria", "max_time")),
    )

    def run(streamer: Streamer) -> Generation:
        return run_generation(
            lm,
            batch,
            shown,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=None,
            use_cache=use_cache,
            options=options,
            streamer=streamer,
        )

    return Stream(run, text, lm.device, seed)


class _Stopped(BaseException):
    """Ends the generation of a stream that nobody reads any more."""


class Streamer:
    """What transformers' `generate` gives its tokens to, those of the prompt first."""

    def __init__(self, give: Callable[[list[int]], None]) -> None:
        self._give, self._prompt = give, True

    def put(self, value: Tensor) -> None:
        """Take the next token of each row."""
        if self._prompt:
            self._prompt = False
        else:
            self._give(value.flatten().tolist())

    def end(self) -> None:
        """Called after the last."""


class _Worker:
    """The thread that generates; it and its reader never run at once."""

    def __init__(self, run: Callable[[Streamer], Generation], device: torch.device, seed: int | None) -> None:
        self.result: Generation | None = None
        self._error: BaseException | None = None
        self._tokens: list[int] | None = None
        self._stopped = False
        self._go, self._given = threading.Semaphore(0), threading.Semaphore(0)
        self._randomness = None if seed is None else _Randomness(seed, device)
        self._autocast = _autocast_like_here(device)
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work, run), name="steersman-stream", daemon=True
        )
        self._thread.start()

    def next(self) -> list[int] | None:
        """The next token of each row; None after the last."""
        self._go.release()
        self._given.acquire()
        if self._error is not None:
            raise self._error
        return self._tokens

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self._stopped = True
        self._go.release()
        self.join()

    def join(self) -> None:
        """Wait for the thread's end, unless it is the one that asks."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self, run: Callable[[Streamer], Generation]) -> None:
        try:
            self._wait()
            with self._autocast:
                self.result = run(Streamer(self._give))
            self._tokens = None
        except _Stopped:
            return
        except BaseException as error:
            self._error = error
        finally:
            if self._randomness is not None:
                self._randomness.leave()
            self._given.release()

    def _give(self, tokens: list[int]) -> None:
        self._tokens = tokens
        if self._randomness is not None:
            self._randomness.leave()
        self._given.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._stopped:
            raise _Stopped
        if self._randomness is not None:
            self._randomness.enter()


class _Randomness:
    """The seeded generators of a stream, put in the place of the reader's while the stream works."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._inside = False
        outer = self._states()
        torch.manual_seed(seed)
        self._mine = self._states()
        self._set(outer)

    def _states(self) -> tuple[Tensor, Tensor | None]:
        return torch.get_rng_state(), None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)

    def _set(self, states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None and self._cuda is not None:
            torch.cuda.set_rng_state(states[1], self._cuda)

    def enter(self) -> None:
        self._outer, self._inside = self._states(), True
        self._set(self._mine)

    def leave(self) -> None:
        if self._inside:
            self._mine, self._inside = self._states(), False
            self._set(self._outer)


def _autocast_like_here(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast as it is set in this thread, for another."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type))


class TextPieces:
    """Turns the tokens of each row into pieces of text. A piece ends with a whole character, so bytes of one that is
    unfinished wait for the rest.

    `others_end`: more than end tokens and the number of tokens may end a row, which is known a step later.
    """

    def __init__(
        self, tokenizer: Any, prompts: list[list[int]], stop: list[int], max_new_tokens: int, *, others_end: bool
    ) -> None:
        self._rows = [_Row(tokenizer, prompt) for prompt in prompts]
        self._stop, self._max, self._others_end = set(stop), max_new_tokens, others_end
        self._held: dict[int, int] = {}

    def add(self, tokens: list[int] | None) -> list[StreamedToken]:
        """What the next token of each row gives; None after the last."""
        if tokens is None:
            held, self._held = self._held, {}
            return [self._event(row, token, True) for row, token in held.items()]
        events = []
        for row, token in enumerate(tokens):
            known = self._rows[row]
            if known.finished:
                continue
            known.n += 1
            known.finished = token in self._stop or known.n >= self._max
            if row in self._held:
                events.append(self._event(row, self._held.pop(row), False))
            if self._others_end and not known.finished:
                self._held[row] = token
            else:
                events.append(self._event(row, token, known.finished))
        return events

    def _event(self, row: int, token: int, finished: bool) -> StreamedToken:
        return StreamedToken(row=row, token=token, text=self._rows[row].piece(token, finished), finished=finished)


class _Row:
    """The text of one row, decoded a few tokens at a time."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.n, self.finished = 0, False
        self._decode = tokenizer.decode
        self._ids, self._shown = list(prompt), len(prompt)  # with what is before it a word has the space before it

    def piece(self, token: int, last: bool) -> str:
        """The text that the token completes, and at the `last` one what is left."""
        self._ids.append(token)
        before, now = (self._decode(ids, skip_special_tokens=True) for ids in (self._ids[: self._shown], self._ids))
        if now.endswith("\ufffd") and not last:
            return ""
        text, shown = now[len(before) :], self._shown
        self._shown = len(self._ids)
        if text:  # else the tokens are special and no context for those to come
            self._ids, self._shown = self._ids[shown:], len(self._ids) - shown
        return text
