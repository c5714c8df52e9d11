"""What the model writes under many vectors at once, and what the unsteered model thinks of it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steersman import LanguageModel, SteersmanError
from steersman.lm import Session, TokenBatch
from steersman.steer import repetition_rate


class Written(NamedTuple):
    """What C ways wrote after P prompts."""

    texts: list[list[str]]
    """[C][P]."""
    nll: list[list[float]]
    """[C][P]: under the unsteered model, per token."""
    kl: list[list[float]]
    """[C][P]: KL(steered || unsteered), per token."""
    repeated: list[list[float]]
    """[C][P]: share of 4-grams that were there before."""


class Writer:
    """Continues the same prompts under many vectors at once, and asks the unsteered model about each token."""

    def __init__(self, lm: LanguageModel, hook: str, new_tokens: int) -> None:
        self.lm, self.hook, self.new_tokens = lm, hook, new_tokens
        self._read: dict[tuple[str, ...], tuple[Session, Tensor]] = {}

    def read(self, requests: Sequence[str], chat: bool) -> tuple[Session, Tensor]:
        """The prompts but for their last tokens, read without steering, and those tokens [P]."""
        key = (str(chat), *requests)
        if key not in self._read:
            options: dict[str, Any] = {"padding_side": "left"}
            batch = (
                self.lm.encode_chat(list(requests), **options) if chat else self.lm.encode(list(requests), **options)
            )
            before = TokenBatch(input_ids=batch.input_ids[:, :-1], attention_mask=batch.attention_mask[:, :-1])
            self._read[key] = Session(self.lm, before), batch.input_ids[:, -1]
        return self._read[key]

    @torch.no_grad()
    def write(
        self, requests: Sequence[str], deltas: Tensor, *, chat: bool, instead: Sequence[str] | None = None
    ) -> Written:
        """Continuations of `requests` with each of `deltas` [C, D] added to the states, or of the prompts `instead` of
        them, which the unsteered model does not see."""
        C, P, T = len(deltas), len(requests), self.new_tokens
        rows = deltas.repeat(P, 1)[:, None].to(self.lm.device)  # the ways of a prompt side by side

        def steering() -> AbstractContextManager[Any]:
            return self.lm.edit(self.hook, lambda h, _fwd: h + rows.to(h.dtype))

        plain, last = self.read(requests, chat)
        base = plain.fork(copies=C)
        if instead is not None:
            plain, other = self.read(instead, chat)
            if not torch.equal(other, last):
                raise SteersmanError("an instruction must leave the last token of a prompt as it is")
        stream = plain.fork(steering if bool(rows.any()) else nullcontext, copies=C)
        fed = last.repeat_interleave(C)
        tokens, nll, kl = [], [], []
        for _ in range(T):
            p, q = (session.feed(fed).log_softmax(-1) for session in (stream, base))
            fed = p.argmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
            nll.append(-q.gather(-1, fed[:, None])[:, 0])
            tokens.append(fed)
        wrote = torch.stack(tokens, 1)
        ended = torch.isin(wrote, torch.tensor(stream.stop_ids, dtype=wrote.dtype, device=wrote.device)).int()
        real = ended.cumsum(1) - ended == 0  # the first end token is of the text
        counts = real.sum(1)

        def mean(values: list[Tensor]) -> list[list[float]]:
            total = (torch.stack(values, 1) * real).double().sum(1) / counts
            return total.view(P, C).T.tolist()

        ids = [row[kept & ~end].tolist() for row, kept, end in zip(wrote, real, ended.bool())]
        texts = [str(self.lm.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
        return Written(
            texts=[texts[c::C] for c in range(C)], nll=mean(nll), kl=mean(kl),
            repeated=[[repetition_rate(row) for row in ids[c::C]] for c in range(C)],
        )  # fmt: skip
