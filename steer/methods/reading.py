"""Reading a model's states on examples, a batch at a time: which tokens of each text count.

| positions | samples of a text |
|---|---|
| `all` | every token but the BOS, each a sample of its own |
| `mean` | one: their mean |
| `last` | one: the last token |
| `answer` | one: the mean over the tokens of the answer |
| `index:N` | one: the token at absolute position N (the BOS is at 0; negative N count from the end) |

For a table per generated step (`steps=T`) every text gives one sample a step: step 0 is the last token of its prompt,
whose output chooses the first token of the answer, step i the i-th token of the answer.
In a conversation the chat template's tokens count in `all` and `mean`. Its answer is the text of the assistant's last
message, thinking left out; `last` is the answer's last token, or, where the assistant is yet to answer, the last token
of its header, from which the answer follows.

Shape letters: N samples, B texts of a batch, S tokens, D width.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel, TokenBatch
from steersman.lm.chat_spans import ChatRow
from steersman.steer.measures import common_prefix
from steersman.steer.methods.examples import Example, Examples

POSITIONS = ("all", "mean", "last", "answer", "index:N")

Order = Literal["sides", "pairs", "shuffled"]
"""`sides`: all positives, then all negatives. `pairs`: each positive followed by its negative. `shuffled`: both sides
in one random order, two neighbours making a pair."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples at one hook point, in the order that was asked for."""

    x: Tensor
    """[N, D] fp32 on the CPU."""
    positive: Tensor
    """[N] bool: from a positive example."""
    unit: Tensor
    """[N] int64: number of the pair (`pairs`, `shuffled`) or of the example on its side (`sides`)."""
    weight: Tensor
    """[N] fp64: the weight of its example."""
    group: Tensor
    """[N] int64: which group its example belongs to, numbered as they come."""
    step: Tensor
    """[N] int64: the generated step; 0 where no table is read."""

    def of(self, chosen: Tensor) -> "Part":
        """The samples in `chosen` [N] bool."""
        return Part(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of one batch, in the order that was asked for."""

    states: dict[str, Tensor]
    """Hook point -> [N, D] fp32 on the CPU."""
    marks: dict[str, Tensor]
    """What a `Part` says of every sample beside its state."""

    @property
    def positive(self) -> Tensor:
        """[N] bool, as a `Part` has it."""
        return self.marks["positive"]

    @property
    def unit(self) -> Tensor:
        """[N] int64, as a `Part` has it."""
        return self.marks["unit"]

    def at(self, hook: str | Sequence[str]) -> Part:
        """The samples at a hook point; of several, their states side by side."""
        states = self.states[hook] if isinstance(hook, str) else torch.cat([self.states[h] for h in hook], dim=1)
        return Part(x=states, **self.marks)


@dataclass(frozen=True)
class _Item:
    example: Example
    positive: bool
    unit: int
    where: str


def check_positions(positions: str) -> int | None:
    """The N of `index:N`, None for the other choices. Raises SteersmanError for an unknown one."""
    if positions in POSITIONS[:-1]:
        return None
    if found := re.fullmatch(r"index:(-?[0-9]{1,9})", positions):
        return int(found[1])
    raise SteersmanError(f"unknown positions {positions!r}: use one of {', '.join(POSITIONS)}, such as index:-2")


class Reader:
    """Reads examples at hook points. It can go over them again, always in the same order."""

    def __init__(
        self,
        lm: LanguageModel,
        hooks: Sequence[str],
        *,
        positions: str,
        steps: int | None = None,
        every_token: bool = False,
        batch_size: int = 16,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise SteersmanError(f"batch_size must be at least 1, got {batch_size}")
        self.lm, self.hooks, self.positions = lm, list(hooks), positions
        self.index = check_positions(positions)
        self.steps = steps
        self.each = every_token or steps is not None or positions == "all"  # samples of their own, rather than one mean
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self._groups: dict[str, int] = {}

    def samples(self, examples: Examples, order: Order) -> Iterator[Samples]:
        """The samples of both sides, batch by batch. Raises SteersmanError where a state is not finite."""
        items = self._items(examples, order)
        step = 2 * self.batch_size if order != "sides" else self.batch_size  # never cuts a pair
        for start in range(0, len(items), step):
            yield self._read(items[start : start + step])

    def _items(self, examples: Examples, order: Order) -> list[_Item]:
        sides = [
            [_Item(e, positive, i, f"{side} example {i}") for i, e in enumerate(found)]
            for side, found, positive in (
                ("positive", examples.positive, True),
                ("negative", examples.negative, False),
            )
        ]
        if order == "pairs":
            return list(chain.from_iterable(zip(*sides)))
        items = sides[0] + sides[1]
        if order == "shuffled":
            random.Random(self.seed).shuffle(items)
            items = [_Item(item.example, item.positive, i // 2, item.where) for i, item in enumerate(items)]
        return items

    @torch.no_grad()
    def _read(self, items: Sequence[_Item]) -> Samples:
        lm = self.lm
        batch = lm.encode([item.example.text for item in items], max_length=self.max_length)
        longest = int(batch.lengths.argmax())
        if lm.context_length is not None and int(batch.lengths[longest]) > lm.context_length:
            raise SteersmanError(
                f"{items[longest].where} has {int(batch.lengths[longest])} tokens and the context of {lm.name} is "
                f"{lm.context_length}: shorten it or set max_length"
            )
        weights, sample, counts = self._weights(items, batch)
        states = lm.capture(batch, hooks=self.hooks)
        found = {}
        for hook, h in states.items():
            flat = h.flatten(0, 1)[sample.to(h.device)].float()  # [chosen tokens, D]
            if not bool(flat.isfinite().all()):
                bad = int((~flat.isfinite().all(1)).nonzero()[0, 0])
                row = int(sample[bad]) // batch.input_ids.shape[1]
                raise SteersmanError(f"{lm.name} gives NaN or infinite states at {hook} on {items[row].where}")
            flat = flat.cpu()
            if not self.each:
                rows = torch.repeat_interleave(torch.arange(len(items)), counts)
                flat = torch.zeros(len(items), flat.shape[1]).index_add_(0, rows, flat * weights[:, None])
            found[hook] = flat
        times = counts if self.each else torch.ones_like(counts)
        groups = [self._groups.setdefault(item.example.group, len(self._groups)) for item in items]
        marks = {
            "positive": torch.tensor([item.positive for item in items]),
            "unit": torch.tensor([item.unit for item in items]),
            "weight": torch.tensor([item.example.weight for item in items], dtype=torch.float64),
            "group": torch.tensor(groups),
        }
        marks = {name: mark.repeat_interleave(times) for name, mark in marks.items()}
        step = torch.zeros_like(marks["unit"])
        if self.steps is not None:
            step = torch.cat([torch.arange(n) for n in counts.tolist()])
        return Samples(states=found, marks={**marks, "step": step})

    def _weights(self, items: Sequence[_Item], batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens to read: weight in their text's sample [n], place in the flattened batch [n], how many per text
        [B]."""
        places, weights, counts = [], [], []
        width = batch.input_ids.shape[1]
        chats = [None] * len(items) if batch.spans is None else batch.spans.rows
        for row, (item, length, chat) in enumerate(zip(items, batch.lengths.tolist(), chats)):
            first, last = self._span(item, length, chat)
            places += [row * width + p for p in range(first, last)]
            weights += [1.0 / (last - first)] * (last - first)
            counts.append(last - first)
        return torch.tensor(weights), torch.tensor(places), torch.tensor(counts)

    def _span(self, item: _Item, length: int, chat: ChatRow | None) -> tuple[int, int]:
        """Half-open range of the absolute positions that count in a text of `length` tokens, or a conversation."""
        begins = self.lm.bos_token_id is not None and (chat is None or chat.ids[:1] == [self.lm.bos_token_id])
        bos = int(begins)
        if self.steps is not None:
            first, last = _answer(chat, item.where) if chat is not None and item.example.prompt else (None, length)
            first = min(prompt_tokens(self.lm, item.example, item.where) if first is None else first, length) - 1
            return max(first, 0), min(max(first, 0) + self.steps, last)
        if self.index is not None:
            at = self.index if self.index >= 0 else length + self.index
            if not 0 <= at < length:
                raise SteersmanError(f"{item.where} has {length} tokens (BOS included), so no token {self.index}")
            return at, at + 1
        if length <= bos:
            raise SteersmanError(f"{item.where} has no token besides the BOS")
        if chat is not None and item.example.prompt and self.positions in ("last", "answer"):
            first, last = _answer(chat, item.where)
            if last > length:
                raise SteersmanError(f"{item.where}: its answer goes on beyond max_length, {length} tokens")
            return (last - 1, last) if self.positions == "last" else (first, last)
        if self.positions == "last":
            return length - 1, length
        if self.positions == "answer":
            return min(prompt_tokens(self.lm, item.example, item.where), length - 1), length
        return bos, length


def prompt_tokens(lm: LanguageModel, example: Example, where: str) -> int:
    """How many tokens of an example, the BOS included, are its prompt's alone.

    A token that holds the end of the prompt and the start of the answer counts as the answer's.
    """
    if not example.prompt:
        raise SteersmanError(
            f"{where} has no answer to read: give (prompt, answer) examples, or choose positions='last' or 'mean'"
        )
    if not isinstance(example.text, str):
        return answer_span(lm, example, where)[0]
    return common_prefix(lm.token_ids(example.text, bos=True), lm.token_ids(example.prompt, bos=True))


def answer_span(lm: LanguageModel, example: Example, where: str) -> tuple[int, int]:
    """Half-open range of the tokens of a conversation's answer. Raises SteersmanError where it has none."""
    spans = lm.encode([example.text]).spans
    assert spans is not None  # as of every conversation
    return _answer(spans.conversations[0], where)


def _answer(chat: ChatRow, where: str) -> tuple[int, int]:
    try:
        return chat.answer()
    except SteersmanError as error:
        raise SteersmanError(f"{where}: {error}") from error
