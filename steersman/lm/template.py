"""A tokenizer's chat template: conversations written out as text, what identifies it, and what it can express."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steersman.conversations import Conversation
from steersman.errors import SteersmanError

THINK_MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)
"""How models write thinking, as pairs of an opening and a closing marker: those whose template holds them are its."""


class ChatTemplate:
    """The chat template of a tokenizer. Raises SteersmanError where there is none, or none by default of several."""

    def __init__(self, tokenizer: Any, name: str = "") -> None:
        self.tokenizer = tokenizer
        self.name = name or "the tokenizer"
        self._learned: dict[Any, Any] = {}  # what probing conversations showed
        if getattr(tokenizer, "chat_template", None) is None:
            raise SteersmanError(
                f"{self.name} has no chat template: give an instruction-tuned model, write the conversation out as one "
                "string, or set tokenizer.chat_template"
            )
        try:
            self.source = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise SteersmanError(f"{self.name} has several chat templates and none by default: {error}") from error

    def is_current(self) -> bool:
        """Whether the tokenizer still has this template."""
        try:
            return self.source == self.tokenizer.get_chat_template()
        except ValueError:
            return False

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the template's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    def render(
        self,
        messages: Conversation,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        settings: Mapping[str, Any] | None = None,
        where: str = "",
    ) -> str:
        """The conversation as text. `settings` are variables of the template (`enable_thinking`, `tools`, ...), and
        `where` begins the message of an error. Raises SteersmanError for what the template refuses."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **(settings or {}),
                )
            )
        except Exception as error:  # templates are programs of their authors, and refuse in many ways
            reason = " ".join(str(error).split())[:200]
            raise SteersmanError(f"{where}the chat template refuses the conversation ({reason})") from error

    def learned(self, key: Any, find: Callable[[], Any]) -> Any:
        """`find()`, found once."""
        if key not in self._learned:
            self._learned[key] = find()
        return self._learned[key]

    def knows(self, role: str) -> bool:
        """Whether the template writes a message of this role: a system's at the beginning, others anywhere."""
        probe, user = {"role": role, "content": "0probe0"}, {"role": "user", "content": "1user1"}
        reply = {"role": "assistant", "content": "2reply2"}
        first = ([probe, user], [probe])

        def find() -> bool:
            for messages in first if role == "system" else (*first, [user, probe], [user, reply, probe]):
                try:
                    if probe["content"] in self.render(messages):
                        return True
                except SteersmanError:
                    continue
            return False

        return self.learned(("knows", role), find)

    def check_role(self, role: str) -> None:
        """Raise SteersmanError where the template writes no message of this role."""
        if not self.knows(role):
            raise SteersmanError(f"the chat template of {self.name} has no role {role!r}: no token belongs to it")

    @cached_property
    def thinks(self) -> bool:
        """Whether it has markers of thinking that can be followed."""
        try:
            return bool(self.think_markers)
        except SteersmanError:
            return False

    @cached_property
    def think_markers(self) -> tuple[list[int], list[int]]:
        """Token ids of the markers that open and close thinking.

        Raises SteersmanError for a template without such markers, and where the tokenizer's ids of a marker depend on
        what stands around it.
        """
        found = [pair for pair in THINK_MARKERS if pair[0] in self.source] or [
            pair for pair in THINK_MARKERS[:-1] if pair[1] in self.source
        ]
        if not found:
            raise SteersmanError(
                f"the chat template of {self.name} has no markers of thinking such as {THINK_MARKERS[0][0]}: scope "
                "'thinking' is for models that think"
            )
        return self._marker(found[0][0]), self._marker(found[0][1])

    def _marker(self, marker: str) -> list[int]:
        ids = self._ids(marker)
        for around in ("\n{}\n", "a {} a"):
            if not _contains(self._ids(around.format(marker)), ids):
                raise SteersmanError(
                    f"scope 'thinking' is not known: the tokenizer of {self.name} writes {marker} with other tokens in "
                    "other places"
                )
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    n = len(part)
    return any(list(ids[i : i + n]) == list(part) for i in range(len(ids) - n + 1))


def opened(ids: Tensor, turn_start: Tensor, markers: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    """[B, S] bool: the tokens of thinking in rows of token ids [B, S], from the token that completes an opening marker
    to the one that completes the next closing marker, both of them in. `turn_start` [B, S] is the column where each
    token's turn begins: what was opened before it is closed there.

    >>> opened(torch.tensor([[9, 1, 5, 2, 9, 1, 7]]), torch.tensor([[0, 0, 0, 0, 0, 5, 5]]), ([1], [2])).long()
    tensor([[0, 1, 1, 1, 0, 1, 1]])
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    none = torch.full_like(columns, -1)
    start, end = (torch.where(_completes(ids, marker), columns, none).cummax(1).values for marker in markers)
    before = torch.nn.functional.pad(end, (1, 0), value=-1)[:, :-1]  # a closing marker is still inside
    return (start >= turn_start) & (start > before)


def _completes(ids: Tensor, marker: Sequence[int]) -> Tensor:
    """[B, S] bool: where the last token of a marker stands after the others."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for back, token in enumerate(reversed(marker)):
        here = ids == token
        found &= torch.nn.functional.pad(here, (back, 0))[:, : ids.shape[1]] if back else here
    return found
