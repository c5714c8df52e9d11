"""Which part of a written conversation belongs to which message, found from any chat template that keeps its messages.

The conversation is written out once more with marks around the text of its messages. Without the marks it must be the
conversation as the model reads it, to the letter; so trimming, a default system prompt, earlier thinking that is
dropped, or a system message that moves into the user's turn are seen as the template does them. What stands between two
texts is the end of one turn and the beginning of the next, told apart by writing the conversation up to there.

A turn is everything that the template writes for a message: its header, its text and its end. Where the template writes
a system message inside the turn of the next one (Gemma, Mistral, Llama 2), the system message is its text alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from steersman.conversations import Conversation
from steersman.errors import SteersmanError
from steersman.lm.template import THINK_MARKERS, ChatTemplate

NO_TURN = -1
"""The turn of what belongs to no message: the BOS, and a system prompt that the template adds by itself."""
_OPEN, _CLOSE = "\U0010fd00", "\U0010fd01"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_THINK = re.compile("|".join(re.escape(marker) for pair in THINK_MARKERS for marker in pair))
_MARKED_FIELDS = ("content", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Piece:
    """Characters `start` to `stop` of a written conversation."""

    start: int
    stop: int
    turn: int
    """Number of the message, or `NO_TURN`."""
    role: str | None
    """The message's role; system for a system prompt that the template adds by itself; None for the BOS."""
    content: bool = False
    """Whether it is the text of the message, and not what the template writes around it."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A conversation as text, and whose its pieces are."""

    text: str
    """What the template makes of the conversation."""
    pieces: list[Piece]
    """All of the text, in order."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a conversation is written out."""

    add_generation_prompt: bool = False
    """End with the header of an assistant's turn."""
    continue_final_message: bool = False
    """End with the text of the last message, for the model to go on with it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template: `enable_thinking`, `tools`, ..."""

    def render(self, template: ChatTemplate, messages: Conversation, where: str = "") -> str:
        """The conversation as text."""
        return template.render(
            messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            settings=self.settings,
            where=where,
        )


@dataclass
class _Block:
    """The text of one message in a written conversation."""

    message: int
    start: int
    stop: int


def find_turns(template: ChatTemplate, messages: Conversation, writing: Writing) -> Written:
    """The conversation as text, and whose each character is.

    Raises SteersmanError where the template refuses the conversation, and where it writes the messages in a way that
    hides which text is whose.
    """
    text = writing.render(template, messages)
    marked = _marked(messages)
    plain, blocks = _blocks(template, writing.render(template, marked))
    if plain != text:
        raise _hidden(template, "it writes other text when a message is marked")
    find = _Finder(template, messages, marked, writing, text, blocks)
    pieces = list(find.pieces())
    return Written(text=text, pieces=pieces)


class _Finder:
    def __init__(
        self,
        template: ChatTemplate,
        messages: Conversation,
        marked: Conversation,
        writing: Writing,
        text: str,
        blocks: list[_Block],
    ) -> None:
        self.template, self.messages, self.marked, self.writing = template, messages, marked, writing
        self.text, self.blocks = text, blocks
        self._tails: dict[int, str | None] = {}

    def role(self, message: int) -> str:
        return str(self.messages[message]["role"])

    def pieces(self) -> Iterator[Piece]:
        """All of the text, in order."""
        text, blocks = self.text, self.blocks
        if not blocks:
            raise _hidden(self.template, "it leaves every message out")
        # bounds[j]: where the turn of block j ends and that of the next begins; None where the two are one turn
        bounds = [self._bound(j) for j in range(len(blocks) - 1)]
        owners, owner = [], blocks[-1].message
        for j in reversed(range(len(blocks))):  # the frame around a text inside another's turn is that one's
            owner = owner if j < len(bounds) and bounds[j] is None else blocks[j].message
            owners.insert(0, owner)
        first = self._first(owners[0])
        yield from self._before(first)
        at = first
        for j, (block, owner) in enumerate(zip(blocks, owners)):
            frame = partial(Piece, turn=owner, role=self.role(owner))
            yield frame(at, block.start)
            yield Piece(block.start, block.stop, block.message, self.role(block.message), True)
            end = bounds[j] if j < len(bounds) else self._last(blocks[-1])
            at = block.stop if end is None else end
            yield frame(block.stop, at)
        if at < len(text) or self.writing.add_generation_prompt:
            yield Piece(at, len(text), len(self.messages), "assistant")

    # Between two texts

    def _bound(self, j: int) -> int | None:
        block, following = self.blocks[j], self.blocks[j + 1]
        gap = self.text[block.stop : following.start]
        own = self._tail(block.message)
        tails = [] if own is None else [own]
        if own is not None and not gap.startswith(own):  # the last of all turns may end otherwise than those before it
            tails += filter(None, map(self._tail, range(len(self.messages))))
        for tail in tails:
            if gap.startswith(tail):
                return block.stop + len(tail)
        header = self._header(self.role(following.message))
        if header and gap.endswith(header):
            return following.start - len(header)
        if own is None:
            return None  # the template does not write it by itself
        raise _hidden(self.template, f"where message {block.message} ends is not told by what it writes for it alone")

    def _tail(self, message: int) -> str | None:
        """What the template writes after the text of the last of the messages up to this one; None where it does not
        write that text."""
        if message not in self._tails:
            self._tails[message] = self._find_tail(message)
        return self._tails[message]

    def _find_tail(self, message: int) -> str | None:
        try:
            written = self.template.render(self.marked[: message + 1], settings=self.writing.settings)
            plain, blocks = _blocks(self.template, written)
        except SteersmanError:
            return None
        found = [block for block in blocks if block.message == message]
        return plain[found[0].stop :] if found and found[0] is blocks[-1] else None

    def _header(self, role: str) -> str | None:
        """What the template writes before the text of a message of this role in the middle of a conversation."""

        def find() -> str | None:
            roles = ["user", "assistant", "user"] if role != "assistant" else ["user", "assistant"]
            probe = [{"role": r, "content": f"probe {i}"} for i, r in enumerate([*roles[:-1], role])]
            finder = _Finder(self.template, probe, _marked(probe), self.writing, "", [])
            try:
                written = self.template.render(finder.marked, settings=self.writing.settings)
                finder.text, finder.blocks = _blocks(self.template, written)
            except SteersmanError:
                return None
            if [block.message for block in finder.blocks] != list(range(len(probe))):
                return None
            before, last = finder.blocks[-2:]
            gap, tail = finder.text[before.stop : last.start], finder._tail(before.message)
            if tail is None or not gap.startswith(tail):
                tail = finder._tail(0)  # as the turn of a user ends
            return gap[len(tail) :] if tail is not None and gap.startswith(tail) else None

        return self.template.learned(("header", role, repr(sorted(self.writing.settings.items(), key=str))), find)

    # Before the first text and after the last

    def _first(self, owner: int) -> int:
        """Where the turn of the first text begins."""
        before = self.text[: self.blocks[0].start]
        header = self._header("user" if self.role(owner) == "system" else self.role(owner))
        bos = str(getattr(self.template.tokenizer, "bos_token", None) or "")
        skip = len(bos) if bos and before.startswith(bos) and not (header or "").startswith(bos) else 0
        if self.role(owner) == "system" or not header:
            return skip
        at = before.rfind(header)
        return skip if at < 0 else max(at, skip)

    def _before(self, first: int) -> Iterator[Piece]:
        before = self.text[:first]
        tokenizer = self.template.tokenizer
        words = before
        for token in sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True):
            words = words.replace(str(token), "")
        bos = str(getattr(tokenizer, "bos_token", None) or "")
        turn_token = bos and self.text[first:].startswith(bos)
        skip = len(bos) if bos and before.startswith(bos) and not turn_token else 0
        yield Piece(0, skip, NO_TURN, None)
        yield Piece(skip, first, NO_TURN, "system" if words.strip() else None)

    def _last(self, block: _Block) -> int:
        """Where the turn of the last text ends."""
        if not self.writing.add_generation_prompt:
            return len(self.text)
        without = Writing(settings=self.writing.settings).render(self.template, self.messages)
        if self.text.startswith(without):
            return len(without)
        tail = self._tail(len(self.messages) - 1)
        if tail is not None and self.text.startswith(tail, block.stop):
            return block.stop + len(tail)
        raise _hidden(self.template, "where the turn to come begins is not told by the text without it")


def _hidden(template: ChatTemplate, why: str) -> SteersmanError:
    return SteersmanError(
        f"which tokens are whose is hidden by the chat template of {template.name}: {why}; steer a window or a mask of "
        "positions in place of a role"
    )


# Marks


def _marked(messages: Conversation) -> list[dict[str, Any]]:
    """The messages with a mark before and after every text in them, next to its letters, so that trimming takes no
    mark. Marks 2n and 2n + 1 are of message n."""
    return [_marked_message(message, 2 * n) for n, message in enumerate(messages)]


def _marked_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    marked = dict(message)
    for name in _MARKED_FIELDS:
        if name in marked:
            marked[name] = _mark(marked[name], number)
    calls = marked.get("tool_calls")
    if isinstance(calls, list | tuple):
        marked["tool_calls"] = [_marked_call(call, number) for call in calls]
    return marked


def _marked_call(call: Any, number: int) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return call
    return {**call, "function": {**function, "name": _mark(function["name"], number)}}


def _mark(value: Any, number: int) -> Any:
    """A text, or a list of parts with texts, with marks; other values as they are."""
    if isinstance(value, list | tuple):
        return [
            {**part, "text": _mark(part["text"], number)}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part
            for part in value
        ]
    if not isinstance(value, str):
        return value
    out, at = [], 0
    for found in [*_THINK.finditer(value), None]:
        part = value[at : len(value) if found is None else found.start()]
        core = part.strip()
        if core:
            start = part.index(core)
            part = part[:start] + _one(number) + core + _one(number + 1) + part[start + len(core) :]
        elif value == "":
            part = _one(number) + _one(number + 1)
        out.append(part)
        if found is not None:
            out.append(found[0])
            at = found.end()
    return "".join(out)


def _one(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"


def _blocks(template: ChatTemplate, marked: str) -> tuple[str, list[_Block]]:
    """The text without its marks, and from where to where the text of each message goes in it, in order."""
    parts, at, length = [], 0, 0
    blocks: list[_Block] = []
    for found in _MARK.finditer(marked):
        parts.append(marked[at : found.start()])
        length += len(parts[-1])
        at = found.end()
        message = int(found[1]) // 2
        if blocks and blocks[-1].message == message:
            blocks[-1].stop = length
        else:
            blocks.append(_Block(message, length, length))
    plain = "".join([*parts, marked[at:]])
    numbers = [int(found[1]) for found in _MARK.finditer(marked)]
    if any(numbers.count(2 * block.message) != numbers.count(2 * block.message + 1) for block in blocks):
        raise _hidden(template, "it writes a part of a message")
    if len({block.message for block in blocks}) < len(blocks):
        raise _hidden(template, "it writes the text of a message in two places")
    return plain, blocks
