"""Conversations as batches: what `LanguageModel.encode_chat` and `LanguageModel.chat` do before the model runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steersman.conversations import Conversation, as_message, is_conversation, is_message, with_system
from steersman.errors import SteersmanError
from steersman.lm.chat_spans import ChatSpans
from steersman.lm.tokens import ChatBatch, TextEncoder, writing_of


@dataclass(frozen=True)
class Asked:
    """How conversations are to be written; see `LanguageModel.encode_chat`."""

    system: str | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    settings: Mapping[str, Any]


def encode(
    texts: TextEncoder,
    given: Any,
    asked: Asked,
    padding_side: str,
    max_length: int | None,
    *,
    to_reply: bool = False,
) -> ChatBatch:
    """Conversations as a batch; `to_reply` refuses those that leave nothing to reply to."""
    conversations = as_conversations(given, asked.system)
    if to_reply and asked.add_generation_prompt is None and not asked.continue_final_message:
        for i, messages in enumerate(conversations):
            if messages[-1]["role"] == "assistant":
                raise SteersmanError(
                    f"conversation {i} ends with the assistant's message: continue_final_message=True goes on with "
                    "it, add_generation_prompt=True begins another"
                )
    how = {name: getattr(asked, name) for name in ("add_generation_prompt", "continue_final_message", "settings")}
    rows = texts.chats([(messages, writing_of(messages, **how)) for messages in conversations])
    for i, row in enumerate(rows):
        if not row.ids:
            raise SteersmanError(f"the chat template writes nothing for conversation {i}")
    ids, mask = texts.padded([row.ids[:max_length] for row in rows], padding_side)
    return ChatBatch(input_ids=ids, attention_mask=mask, spans=ChatSpans(rows))


def as_conversations(given: Any, system: str | None = None) -> list[Conversation]:
    """The conversations that were given: one or several, a string being a user's message; `system` is put before each.

    >>> as_conversations("Hello", system="Be brief.")[0][0]["role"]
    'system'
    """
    entries = [given] if isinstance(given, str) or is_conversation(given) else given
    if not isinstance(entries, Sequence) or not entries or is_message(given):
        raise SteersmanError(
            f"give a conversation, a list of messages with a role and a content, or several; got {_shown(given)}"
        )
    found: list[Conversation] = []
    for i, entry in enumerate(entries):
        if isinstance(entry, str):
            entry = as_message(entry)
        if not is_conversation(entry):
            raise SteersmanError(f"conversation {i} is no list of messages with a role and a content: {_shown(entry)}")
        found.append(entry if system is None else with_system(entry, system, f"conversation {i}"))
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."
