"""Whose the tokens of a batch of conversations are: what the hooks of a pass ask, wherever the pass stands.

The spans of the prompts are kept by absolute position, so that padding and KV caches change nothing; what follows a
prompt is the assistant's turn that it ends with. A token across a border belongs to what its last character is of.

Shape letters: R conversations, L tokens of the longest, B rows of a pass, S its tokens, T columns so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.conversations import Conversation
from steersman.doors import whole_number
from steersman.errors import SteersmanError
from steersman.lm.passes import ForwardPass
from steersman.lm.template import ChatTemplate, opened
from steersman.lm.turns import NO_TURN, Writing, find_turns

PARTS = ("assistant", "user", "system", "thinking", "last_user")
"""What part of a conversation a scope can name; also `role:NAME` for any role, and `turn:N`."""
_PADDING = -2  # in the place of a turn


@dataclass(frozen=True)
class ChatPart:
    """A part of a conversation: `role` with its name, `turn` with its number, `thinking` or `last_user`."""

    kind: str
    role: str = ""
    turn: int = 0

    @classmethod
    def parse(cls, text: str) -> "ChatPart | None":
        """From how a scope names it; None for another text. Turns count from 0, negative ones from the end.

        >>> ChatPart.parse("turn:-1"), ChatPart.parse("all")
        (ChatPart(kind='turn', role='', turn=-1), None)
        """
        if text in ("thinking", "last_user"):
            return cls(text)
        if text in PARTS:
            return cls("role", role=text)
        head, _, tail = text.partition(":")
        if head == "role" and tail:
            return cls("role", role=tail)
        if head == "turn":
            try:
                return cls("turn", turn=whole_number(int(tail), "the number of a turn"))
            except ValueError:
                raise SteersmanError(f"scope {text!r}: a turn is a number, such as turn:0 or turn:-1") from None
        return None

    def __str__(self) -> str:
        return {"role": self.role, "turn": f"turn:{self.turn}"}.get(self.kind, self.kind)


class ChatRow:
    """One conversation of a batch: its token ids, and whose they are."""

    def __init__(self, template: ChatTemplate, messages: Conversation, writing: Writing, where: str = "") -> None:
        self.template, self.writing = template, writing
        self.messages = [dict(message) for message in messages]
        self.text = writing.render(template, self.messages, where)
        read = template.tokenizer(self.text, add_special_tokens=False, verbose=False)
        self.ids: list[int] = list(read["input_ids"])

    @property
    def next_turn(self) -> int:
        """The turn of what follows the text."""
        return len(self.messages) - self.writing.continue_final_message

    @property
    def n_turns(self) -> int:
        """Messages, and one more where the text ends with the header of a turn to come."""
        return len(self.messages) + self.writing.add_generation_prompt

    def answer(self) -> tuple[int, int]:
        """From which to which token (half-open) the text of the assistant's last message goes, thinking left out.

        Raises SteersmanError where the last message is another's, and where it has no token of its own.
        """
        if self.messages[-1]["role"] != "assistant":
            raise SteersmanError(f"the last message is not the assistant's but the {self.messages[-1]['role']}'s")
        _, turns, content = self.tokens
        mine = turns == len(self.messages) - 1
        if self.template.thinks:
            start = torch.full((1, len(self.ids)), int(mine.argmax()))
            mine &= ~opened(torch.tensor([self.ids]), start, self.template.think_markers)[0].numpy()
        at = np.flatnonzero(mine & content)
        if not len(at):
            raise SteersmanError("the assistant's last message has no token of its own")
        return int(at[0]), int(at[-1]) + 1

    def with_reply(self, text: str) -> list[dict[str, Any]]:
        """The messages and a reply that was generated, which goes on with the last where it was to be continued."""
        if not self.writing.continue_final_message:
            return [*self.messages, {"role": "assistant", "content": text.strip()}]
        *before, last = self.messages
        if not isinstance(last["content"], str):
            raise SteersmanError("a message of several parts was continued: its text is in completions")
        return [*before, {**last, "content": (last["content"] + text).strip()}]

    @property
    def last_user(self) -> int:
        """Number of the last message of a user; `NO_TURN` without one."""
        found = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        return found[-1] if found else NO_TURN

    @cached_property
    def tokens(self) -> tuple[list[str | None], np.ndarray, np.ndarray]:
        """Of each token its role (None for the BOS), turn [L] int64, and whether it is text of the message [L] bool."""
        tokenizer = self.template.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise SteersmanError(
                f"whose tokens are whose is not known: the tokenizer of {self.template.name} does not say where in the "
                "text its tokens stand"
            )
        written = find_turns(self.template, self.messages, self.writing)
        read = tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        stops = np.array([piece.stop for piece in written.pieces])
        of = np.searchsorted(stops, _last_characters(read["offset_mapping"]), side="right").clip(max=len(stops) - 1)
        found = [written.pieces[i] for i in of]
        turns = np.array([piece.turn for piece in found], dtype=np.int64)
        return [piece.role for piece in found], turns, np.array([piece.content for piece in found], dtype=bool)


def _last_characters(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The place of each token's last character. A token of white space alone may be given none, and has what lies
    between its neighbours."""
    places, before = [], 0
    for start, stop in offsets:
        places.append(stop - 1 if stop > start or before < start else start)
        before = max(before, stop)
    return np.array(places, dtype=np.int64).clip(min=0)


@dataclass(frozen=True, kw_only=True)
class _Tables:
    role: Tensor  # [R, L] int64: number of the role in `names`, -1 for none
    turn: Tensor  # [R, L] int64
    content: Tensor  # [R, L] bool
    length: Tensor  # [R] int64
    next_turn: Tensor  # [R] int64
    n_turns: Tensor  # [R] int64
    last_user: Tensor  # [R] int64


class ChatSpans:
    """Whose the tokens of a batch of prompts are. What is not a conversation has no spans, and is refused when they are
    asked for."""

    def __init__(self, rows: Sequence[ChatRow | None]) -> None:
        self.rows = list(rows)
        self._on: dict[torch.device, _Tables] = {}
        self._thinking: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"ChatSpans({len(self)} conversations)"

    def __getitem__(self, rows: Tensor | Sequence[int]) -> "ChatSpans":
        """The spans of some rows, in any order, each as often as it is named."""
        return ChatSpans([self.rows[int(i)] for i in rows])

    @cached_property
    def conversations(self) -> list[ChatRow]:
        """The rows. Raises SteersmanError where one of them is plain text."""
        for i, row in enumerate(self.rows):
            if row is None:
                raise SteersmanError(f"prompt {i} is plain text and has no roles: give every prompt as messages")
        return [row for row in self.rows if row is not None]

    @property
    def template(self) -> ChatTemplate:
        """The template that all were written with."""
        return self.conversations[0].template

    @cached_property
    def names(self) -> list[str]:
        """The roles that have tokens, the assistant's always among them."""
        found = {role for row in self.conversations for role in row.tokens[0] if role is not None}
        return ["assistant", *sorted(found - {"assistant"})]

    # Tables by position

    def _tables(self, device: torch.device) -> _Tables:
        if device not in self._on:
            rows, numbers = self.conversations, {name: i for i, name in enumerate(self.names)}
            width = max(len(row.ids) for row in rows)
            role, turn = (torch.full((len(rows), width), fill) for fill in (-1, _PADDING))
            content = torch.zeros(len(rows), width, dtype=torch.bool)
            for i, row in enumerate(rows):
                roles, turns, texts = row.tokens
                n = len(row.ids)
                role[i, :n] = torch.tensor([-1 if r is None else numbers[r] for r in roles])
                turn[i, :n], content[i, :n] = torch.from_numpy(turns), torch.from_numpy(texts)
            each = {
                "length": [len(row.ids) for row in rows],
                "next_turn": [row.next_turn for row in rows],
                "n_turns": [row.n_turns for row in rows],
                "last_user": [row.last_user for row in rows],
            }
            tables = {"role": role, "turn": turn, "content": content}
            tables |= {name: torch.tensor(values) for name, values in each.items()}
            self._on[device] = _Tables(**{name: table.to(device) for name, table in tables.items()})
        return self._on[device]

    def table(self, part: ChatPart, device: torch.device) -> Tensor:
        """[R, L] bool: the tokens of a part of the conversations, by position."""
        self.check(part)
        t = self._tables(device)
        if part.kind == "role":
            return t.role == (self.names.index(part.role) if part.role in self.names else _PADDING)
        if part.kind == "thinking":
            if device not in self._thinking:
                rows = [torch.tensor(row.ids) for row in self.conversations]
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
                self._thinking[device] = self._opened(ids, t.turn, t.role == 0)
            return self._thinking[device]
        return t.turn == self._asked(part, t)[:, None]

    @staticmethod
    def _asked(part: ChatPart, t: _Tables) -> Tensor:
        """[R] the number of the turn that is asked for; one that no token has where a row has no such turn."""
        if part.kind == "last_user":
            return torch.where(t.last_user >= 0, t.last_user, _PADDING - 1)
        asked = torch.full_like(t.n_turns, part.turn) if part.turn >= 0 else t.n_turns + part.turn
        return torch.where(asked >= 0, asked, _PADDING - 1)

    def check(self, part: ChatPart) -> None:
        """Raise SteersmanError for a role or markers that the template does not have, and for a turn that no
        conversation has."""
        if part.kind == "role" and part.role not in self.names:
            self.template.check_role(part.role)
        if part.kind == "thinking":
            _ = self.template.think_markers
        most = max(max(row.n_turns, row.next_turn + 1) for row in self.conversations)
        if part.kind == "turn" and not -most <= part.turn < most:
            raise SteersmanError(f"scope {part}: the longest conversation has {most} turns, numbered from 0")

    # In a pass

    def where(self, part: ChatPart, fwd: ForwardPass) -> Tensor | bool:
        """The tokens of a pass that are of a part of the conversation, [B, S] bool; True or False when all or none are,
        known without the device. Padding is in no part."""
        self.check(part)
        if fwd.phase == "generation" and fwd.run is not None and part.kind == "role":
            if part.role != "assistant":
                return False
            return True if fwd.all_real else fwd.real
        t, rows = self._tables(fwd.device), self._rows(fwd)
        length = t.length[rows][:, None]
        inside = fwd.positions < length
        of = self.table(part, fwd.device)[rows].gather(1, fwd.positions.clamp(0, t.turn.shape[1] - 1))
        if part.kind == "role":
            follows: Tensor | bool = part.role == "assistant"
        elif part.kind == "thinking":
            known = fwd.run is not None and fwd.phase == "prompt"
            follows = False if known else self._follows_thinking(fwd, rows, inside)
        else:
            follows = (t.next_turn == self._asked(part, t))[rows][:, None]
        return torch.where(inside, of, follows) & fwd.real

    def _rows(self, fwd: ForwardPass) -> Tensor:
        index = fwd.row_index(len(self), "the layout of the chat")
        return torch.arange(fwd.batch, device=fwd.device) if index is None else index

    def _follows_thinking(self, fwd: ForwardPass, rows: Tensor, inside: Tensor) -> Tensor:
        """[B, S] bool: thinking among the tokens after the prompts, by all tokens so far."""
        t, seen = self._tables(fwd.device), fwd.past + fwd.length
        ids = fwd.history
        if ids is None or tuple(ids.shape) != (fwd.batch, seen):
            if bool(inside.all()):
                return torch.zeros_like(inside)
            raise SteersmanError(
                "scope 'thinking' needs the tokens before those of a pass: use generate, a Session, or a pass over the "
                "whole text"
            )
        positions = fwd.key_positions
        at = positions.clamp(0, t.turn.shape[1] - 1)
        prompt = positions < t.length[rows][:, None]
        turn = torch.where(prompt, t.turn[rows].gather(1, at), t.next_turn[rows][:, None])
        mine = torch.where(prompt, t.role[rows].gather(1, at) == 0, True)
        turn = torch.where(positions < 0, _PADDING, turn)
        return self._opened(ids, turn, mine)[:, fwd.past :]

    def _opened(self, ids: Tensor, turn: Tensor, assistant: Tensor) -> Tensor:
        """[B, T] bool: thinking in rows of ids whose turns are known."""
        columns = torch.arange(ids.shape[1], device=ids.device)
        changed = torch.ones_like(turn, dtype=torch.bool)
        changed[:, 1:] = turn[:, 1:] != turn[:, :-1]
        start = torch.where(changed, columns, torch.zeros_like(columns)).cummax(1).values
        start = torch.where(assistant, start, ids.shape[1])
        return opened(ids, start, self.template.think_markers)
