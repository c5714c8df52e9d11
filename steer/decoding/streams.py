"""Streams of tokens that go on together: each has a model, prompts and a steering of its own, and all are fed the same.

Shape letters: P prompts, B rows (P times the copies), V vocabulary, T new tokens, D width.
"""

import contextvars
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, Generation, LanguageModel
from steersman.lm.generate import sampling_settings, stop_ids
from steersman.lm.hooks import HookName
from steersman.lm.lens import lens_logits
from steersman.lm.sampling import Sampling
from steersman.lm.session import Session
from steersman.lm.tokens import Prompt, TokenBatch, as_prompts


class Stream(AbstractContextManager["Stream"]):
    """A `Session` whose steering stays open from its first pass to its last, unseen by other streams of the model.

    `steering` is what steers it beside what is open around it; `each_pass` opens more for every single pass. `layers`
    are hook points whose logit lens is read in the same passes.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: TokenBatch,
        *,
        copies: int = 1,
        steering: AbstractContextManager[Any] | None = None,
        each_pass: Callable[[], AbstractContextManager[Any]] | None = None,
        layers: Sequence[HookName] = (),
        stop: Sequence[int] | None = None,
    ) -> None:
        self.lm = lm
        self._last: dict[HookName, Tensor] = {}
        # Edits belong to the context of execution that opened them: a copy of it holds this stream's alone.
        self._here = contextvars.copy_context()
        self._open = ExitStack()
        try:
            self._here.run(self._enter, steering, layers)
            self.session: Session = self._here.run(
                lambda: Session(lm, prompts, copies=copies, context=each_pass, stop=stop)
            )
        except BaseException:
            self.close()
            raise

    def _enter(self, steering: AbstractContextManager[Any] | None, layers: Sequence[HookName]) -> None:
        if steering is not None:
            self._open.enter_context(steering)
        if not self.lm.clock.mine():
            self._open.enter_context(self.lm.unedited())
        for layer in layers:
            self._open.enter_context(self.lm.edit(layer, self._reader(layer)))

    def _reader(self, layer: HookName) -> Callable[[Tensor, ForwardPass], Tensor]:
        def read(h: Tensor, _fwd: ForwardPass) -> Tensor:
            self._last[layer] = h[:, -1]
            return h

        return read

    def logits(self, layer: HookName | None = None) -> Tensor:
        """[B, V] fp32: for the next token of each row; those that the logit lens reads at `layer`, where it is one."""
        if layer is None:
            return self.session.logits
        h = self._last[layer]
        if len(h) != self.session.rows:  # the prompts were read once for all their copies
            h = h.repeat_interleave(self.session.rows // len(h), dim=0)
        return lens_logits(self.lm, h)

    def feed(self, chosen: Tensor) -> Tensor:
        """Continue each row by a token [B]; the logits for the next."""
        return self._here.run(self.session.feed, chosen)

    def close(self) -> None:
        """Close its steering."""
        self._here.run(self._open.close)

    def __exit__(self, *error: Any) -> None:
        self._here.run(self._open.__exit__, *error)


class Chooser:
    """Takes the next token of each row: the likeliest one, or one drawn by the row's own number for the step.

    Settings as for `LanguageModel.generate`.
    """

    def __init__(
        self,
        *,
        do_sample: bool | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        settings = sampling_settings(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        self.sampling: Sampling | None = None
        if settings["do_sample"]:
            self.sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        self.seed = seed
        self._uniform: Tensor | None = None

    def start(self, rows: int, steps: int) -> None:
        """Draw the numbers of a run."""
        if self.sampling is not None:
            generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
            self._uniform = torch.rand(rows, steps, generator=generator)

    def take(self, logits: Tensor, step: int) -> Tensor:
        """[B] int64 from logits [B, V]."""
        if self.sampling is None:
            return logits.argmax(-1)
        assert self._uniform is not None
        return self.sampling.draw(logits, self._uniform[:, step].to(logits.device))


def continue_rows(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    batch: TokenBatch,
    rows: int,
    next_logits: Callable[[], Tensor],
    feed: Callable[[Tensor], None],
    chooser: Chooser,
    max_new_tokens: int,
) -> Generation:
    """Choose tokens until every row has ended: `next_logits()` gives [B, V], `feed(tokens)` goes on by [B].

    A row that has ended is fed padding, as `generate` does.
    """
    stop = stop_ids(lm.model.generation_config.eos_token_id)
    pad = lm.pad_token_id if lm.pad_token_id is not None else 0
    ended = torch.zeros(rows, dtype=torch.bool, device=lm.device)
    chooser.start(rows, max_new_tokens)
    tokens: list[Tensor] = []
    for step in range(max_new_tokens):
        chosen = chooser.take(next_logits(), step).masked_fill(ended, pad)
        tokens.append(chosen)
        for token in stop:
            ended = ended | (chosen == token)
        if step == max_new_tokens - 1 or (stop and bool(ended.all())):
            break
        feed(chosen)
    new = torch.stack(tokens, 1)
    whole = torch.cat([batch.input_ids.repeat_interleave(rows // len(batch.input_ids), dim=0), new], 1)
    return Generation.from_tokens(lm.tokenizer, [lm.shown(p) for p in prompts], batch, whole, stop)


def encoded(lm: LanguageModel, prompts: str | Sequence[Prompt] | Tensor, bos: bool) -> tuple[list[Prompt], TokenBatch]:
    """Prompts as a list, and left-padded on the model's device."""
    given = as_prompts(prompts)
    return given, lm.encode(given, bos=bos, padding_side="left")


def check_same_tokenizer(lm: LanguageModel, other: LanguageModel) -> None:
    """Raise a SteersmanError unless both models mean the same by every token."""
    if lm is other or lm.tokenizer is other.tokenizer:
        return
    mine, theirs = lm.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if mine != theirs:
        differ = sum(theirs.get(token) != i for token, i in mine.items()) + len(theirs.keys() - mine.keys())
        raise SteersmanError(
            f"{other.name} has another tokenizer than {lm.name} ({differ} tokens differ): their next tokens cannot be "
            "mixed"
        )
