"""Conversations as data: lists of messages, and texts that are to be a user's message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from steersman.errors import SteersmanError

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`, with whatever else the template reads (`reasoning_content`, `tool_calls`, ...)."""
Conversation = Sequence[Message]
Document = str | Conversation
"""What can be written: a text, or a conversation for a chat template."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How texts become prompts of a chat model: the same flags of each command that is given text."""

    chat: bool = False
    """Give each text as a user's message, written out by the model's chat template with the header of the reply."""
    system: str | None = None
    """System message before each; texts are user's messages then, too."""

    def apply(self, documents: Sequence[Document]) -> list[Document]:
        """Texts as conversations where that is asked for, and conversations with the system message before them."""
        return [self.apply_to(document) for document in documents]

    def apply_to(self, document: Document) -> Document:
        """The same of one. Raises SteersmanError for a conversation with a system message of its own."""
        if isinstance(document, str):
            return as_message(document, self.system) if self.chat or self.system is not None else document
        return document if self.system is None else with_system(document, self.system)


def is_message(entry: Any) -> TypeGuard[Message]:
    """Whether `entry` is a message: a mapping with a role, and a content or tool calls."""
    return isinstance(entry, Mapping) and "role" in entry and ("content" in entry or "tool_calls" in entry)


def is_conversation(entry: Any) -> TypeGuard[Conversation]:
    """Whether `entry` is a list of messages.

    >>> is_conversation([{"role": "user", "content": "Hello"}]), is_conversation("Hello")
    (True, False)
    """
    return isinstance(entry, list | tuple) and len(entry) > 0 and all(map(is_message, entry))


def as_message(text: str, system: str | None = None) -> list[Message]:
    """A text as a user's message, after a system message where one is given.

    >>> as_message("Hello", system="Be brief.")[0]["role"]
    'system'
    """
    messages: list[Message] = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def with_system(messages: Conversation, system: str, where: str = "the conversation") -> list[Message]:
    """A conversation with a system message before it. Raises SteersmanError where it has one."""
    if messages[0]["role"] == "system":
        raise SteersmanError(f"{where} has a system message of its own: leave out system")
    return [{"role": "system", "content": system}, *messages]


def is_blank(document: Document) -> bool:
    """Whether there is nothing in it to read."""
    return isinstance(document, str) and not document.strip()


def with_prefix(prefix: str, document: Document) -> Document:
    """Words put before a prompt: before a text, or as the system message of a conversation, before what it says.

    >>> with_prefix("Be brief. ", "Hello")
    'Be brief. Hello'
    """
    if isinstance(document, str):
        return prefix + document
    first, *rest = document
    if first["role"] != "system":
        return [{"role": "system", "content": prefix.strip()}, *document]
    return [{**first, "content": prefix + str(first["content"])}, *rest]


def answered(prompt: Document, answer: str) -> Document:
    """A prompt and its answer: one text, or the conversation with the answer as the assistant's message.

    >>> answered("Is it good?", " Yes")
    'Is it good? Yes'
    """
    if isinstance(prompt, str):
        return prompt + answer
    return [*prompt, {"role": "assistant", "content": answer}]
