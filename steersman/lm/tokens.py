"""Text to token ids: one beginning-of-sequence token where the model's family has one, and a padding id for batches."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Self

import torch
from torch import Tensor

from steersman.conversations import Conversation, is_conversation, is_message
from steersman.errors import SteersmanError
from steersman.lm.chat_spans import PARTS, ChatPart, ChatRow, ChatSpans
from steersman.lm.template import ChatTemplate
from steersman.lm.turns import NO_TURN, Writing

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Conversation
"""One text: a string, its token ids, or a conversation of `{"role": ..., "content": ...}` messages."""

Prompts = str | Conversation | Sequence[Prompt] | Tensor
"""One text, or several."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Texts as token ids, padded to one length."""

    input_ids: Tensor
    """[B, S] int64 token ids."""
    attention_mask: Tensor
    """[B, S] int64, 1 for real tokens and 0 for padding."""
    spans: ChatSpans | None = None
    """Whose the tokens are, where rows were given as conversations."""

    @property
    def lengths(self) -> Tensor:
        """[B] int64: real tokens per row."""
        return self.attention_mask.sum(1)

    def check_left_padded(self) -> None:
        """Raise a SteersmanError where a row ends in padding, so that nothing can continue it."""
        if bool((self.attention_mask[:, -1] == 0).any()):
            raise SteersmanError("prompts to continue are padded on the left: encode them with padding_side='left'")

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """Some rows, in any order, each as often as it is named; as wide as the batch."""
        index = torch.as_tensor(index, device=self.input_ids.device)
        spans = None if self.spans is None else self.spans[index]
        return replace(self, input_ids=self.input_ids[index], attention_mask=self.attention_mask[index], spans=spans)


@dataclass(frozen=True, kw_only=True)
class ChatBatch(TokenBatch):
    """Conversations as token ids, and whose each token is.

    A turn is everything that the template writes for a message, its header and its end included; `content` is the
    text of the message alone. A system prompt that the template adds by itself is of the system and of no turn.
    """

    spans: ChatSpans  # pyright: ignore[reportGeneralTypeIssues]
    """The same, as passes take it."""

    @property
    def roles(self) -> list[list[str | None]]:
        """The role of each token, one list of S for each row; None for padding and the BOS."""
        names = [None, *self.spans.names]
        role = self._columns(self.spans._tables(self.input_ids.device).role, -1)
        return [[names[i + 1] for i in row] for row in role.tolist()]

    @property
    def turns(self) -> Tensor:
        """[B, S] int64: the number of the message that each token is of, -1 for padding and what is of none."""
        return self._columns(self.spans._tables(self.input_ids.device).turn, NO_TURN)

    @property
    def content(self) -> Tensor:
        """[B, S] bool: tokens of the messages' texts, and not of what the template writes around them."""
        return self._columns(self.spans._tables(self.input_ids.device).content, False)

    def mask(self, part: str) -> Tensor:
        """[B, S] bool: the tokens of a part of the conversations, named as in a scope: assistant, user, system,
        `role:NAME`, thinking, last_user or `turn:N`."""
        found = ChatPart.parse(part)
        if found is None:
            raise SteersmanError(f"{part!r} is no part of a conversation: use {', '.join(PARTS)}, role:NAME or turn:N")
        return self._columns(self.spans.table(found, self.input_ids.device), False)

    def _columns(self, table: Tensor, fill: int | bool) -> Tensor:
        """A table by position [B, L] as one by column [B, S], with `fill` at padding."""
        real = self.attention_mask.bool()
        at = (self.attention_mask.cumsum(1) - 1).clamp(0, table.shape[1] - 1)
        return table.gather(1, at).masked_fill(~real, fill)


def bos_tokens(input_ids: Tensor, mask: Tensor | None, bos_id: int | None, doc_ids: Tensor | None = None) -> Tensor:
    """Which tokens are beginning-of-sequence tokens, [B, S] bool: the first real token of a row, and of a document in
    a packed row, where its id is `bos_id`. The same id further on is text, such as the turn token of a chat.

    `input_ids` [B, S]; `mask` [B, S] is 1 for real tokens, None where all are; `doc_ids` [B, S] number the documents.

    >>> bos_tokens(torch.tensor([[3, 0, 5, 0, 6]]), torch.tensor([[0, 1, 1, 1, 1]]), bos_id=0)
    tensor([[False,  True, False, False, False]])
    """
    if bos_id is None:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    real = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
    first = (real.cumsum(1) == 1) & real.bool()
    if doc_ids is not None:
        first[:, 1:] |= (doc_ids[:, 1:] != doc_ids[:, :-1]) & real[:, 1:].bool()
    return first & (input_ids == bos_id)


def choose_pad_token(tokenizer: Any) -> int | None:
    """The padding id: the tokenizer's own, else its end-of-sequence or unknown token. Embeddings are never resized.

    It is set on the tokenizer, so that transformers agrees; the attention mask is what marks padding, so an id
    that also has another meaning does no harm.
    """
    if tokenizer.pad_token_id is None:
        for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
            if token is not None:
                tokenizer.pad_token = token
                break
    return tokenizer.pad_token_id


class TextEncoder:
    """Turns text into ids. Encoders get their own special tokens ([CLS] ... [SEP]), decoders exactly one BOS.

    `bos=False` leaves out, in every call, a BOS that the text does not hold itself.
    """

    def __init__(self, tokenizer: Any, *, is_encoder: bool, bos: bool = True) -> None:
        self.tokenizer = tokenizer
        self.is_encoder = is_encoder
        self.pad_token_id = choose_pad_token(tokenizer)
        self.known_bos: int | None = tokenizer.bos_token_id
        """The token that begins a text where it stands there, whoever put it there."""
        if self.known_bos is None and is_encoder:
            self.known_bos = tokenizer.cls_token_id
        self.bos_token_id = self.known_bos if bos else None
        if self.bos_token_id is not None and not self.adds_bos:
            _say_bos(str(getattr(tokenizer, "name_or_path", "")), str(tokenizer.convert_ids_to_tokens(self.known_bos)))

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with its BOS by itself, when it is asked for special tokens."""
        try:
            return self.tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [self.known_bos]
        except Exception:  # a tokenizer that cannot read plain text: its own error comes when it is used
            return True

    def ids(self, text: Prompt, bos: bool) -> list[int]:
        """Token ids of one text, with the beginning-of-sequence token once if `bos` and the family has one."""
        return self.many([text], bos)[0]

    def many(self, texts: Sequence[Prompt], bos: bool) -> list[list[int]]:
        """Token ids of each text. A BOS written in the text itself is not doubled, token ids are taken as they are, and
        a conversation is what the tokenizer's chat template makes of it.

        Raises SteersmanError for what is none of these, and for a conversation where the tokenizer has no template.
        """
        return self._read(texts, bos)[0]

    def _read(self, texts: Sequence[Prompt], bos: bool) -> tuple[list[list[int]], list[ChatRow | None]]:
        """The ids of each text, and whose they are where it is a conversation."""
        chats = [self._chat(i, text) if is_conversation(text) else None for i, text in enumerate(texts)]
        rows = [self._given(i, text) if chat is None else chat.ids for i, (text, chat) in enumerate(zip(texts, chats))]
        strings = [i for i, text in enumerate(texts) if isinstance(text, str)]
        if strings:
            # verbose=False: longer than the context is this library's own check, with a message that says what to do
            special = bos and self.is_encoder and self.bos_token_id is not None
            try:
                read = self.tokenizer([texts[i] for i in strings], add_special_tokens=special, verbose=False)[
                    "input_ids"
                ]
            except (TypeError, ValueError, OverflowError) as error:  # its files hold values of other types
                reason = " ".join(str(error).split())[:200]
                raise SteersmanError(f"the tokenizer cannot read texts ({reason}): are its files whole?") from error
            start = [self.bos_token_id] if bos and not self.is_encoder and self.bos_token_id is not None else []
            for i, row in zip(strings, read):
                rows[i] = [*start, *row] if row[:1] != start else list(row)
        return rows, chats

    def _given(self, i: int, text: Any) -> list[int]:
        """The ids that text `i` is, where it is no string."""
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = text[error.start].encode("unicode_escape").decode()
                raise SteersmanError(
                    f"text {i} holds half of a surrogate pair ({half}, character {error.start}), which is no text: "
                    "mend it, or replace it with U+FFFD"
                ) from None
            return []
        if isinstance(text, Tensor) and text.ndim == 1 and not text.is_floating_point():
            text = text.tolist()
        if isinstance(text, list | tuple) and text and all(type(entry) is int for entry in text):
            return self._checked(i, text)
        got = type(text).__name__ if not isinstance(text, list | tuple) else f"{type(text).__name__} of {len(text)}"
        raise SteersmanError(
            f"text {i} is a {got}: give strings, token ids, or conversations of messages with a role and a content"
        )

    def _checked(self, i: int, ids: Sequence[int]) -> list[int]:
        n = len(self.tokenizer)
        if unknown := [token for token in ids if not 0 <= token < n]:
            raise SteersmanError(f"text {i} holds the token id {unknown[0]}: the tokenizer has ids 0 to {n - 1}")
        return [int(token) for token in ids]

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer can write conversations."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template. Raises SteersmanError where it has none."""
        name = str(getattr(self.tokenizer, "name_or_path", "") or "")
        return ChatTemplate(self.tokenizer, f"the tokenizer of {name}" if name else "the tokenizer")

    def current_template(self) -> ChatTemplate:
        """`template`, made anew where another was set on the tokenizer since."""
        if "template" in self.__dict__ and not self.template.is_current():
            del self.__dict__["template"]
        return self.template

    def _chat(self, i: int, messages: Conversation) -> ChatRow:
        try:
            template = self.current_template()
        except SteersmanError as error:
            raise SteersmanError(f"text {i} is a conversation, and {error}") from error
        return ChatRow(template, messages, writing_of(messages), f"text {i}: ")

    def chats(self, conversations: Sequence[tuple[Conversation, Writing]]) -> list[ChatRow]:
        """Conversations with how each is to be written."""
        template = self.current_template()
        return [
            ChatRow(template, messages, writing, f"conversation {i}: ")
            for i, (messages, writing) in enumerate(conversations)
        ]

    def batch(self, texts: Any, bos: bool, padding_side: str, max_length: int | None) -> TokenBatch:
        """Ids of all texts in one [B, S] batch, padded on `padding_side` and cut to `max_length` tokens."""
        texts = as_prompts(texts)
        if padding_side not in ("left", "right"):
            raise SteersmanError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if not texts:
            raise SteersmanError("no texts to encode")
        rows, chats = self._read(texts, bos)
        for i, row in enumerate(rows):
            if not row:
                fix = "the tokenizer has no BOS token" if self.known_bos is None else "no BOS was asked for"
                raise SteersmanError(f"text {i} of {len(rows)} is empty and {fix} to stand for it")
        input_ids, mask = self.padded([row[:max_length] for row in rows], padding_side)
        spans = ChatSpans(chats) if any(chat is not None for chat in chats) else None
        return TokenBatch(input_ids=input_ids, attention_mask=mask, spans=spans)

    def padded(self, rows: Sequence[Sequence[int]], padding_side: str) -> tuple[Tensor, Tensor]:
        """Rows of ids as one [B, S], padded on a side, and the mask of what is not padding."""
        if padding_side not in ("left", "right"):
            raise SteersmanError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        width = max(map(len, rows))
        if self.pad_token_id is None and any(len(row) < width for row in rows):
            raise SteersmanError(
                "the tokenizer has no pad, eos or unk token: texts of different length cannot share a batch"
            )
        input_ids = torch.full((len(rows), width), self.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            where = slice(width - len(row), None) if padding_side == "left" else slice(0, len(row))
            input_ids[i, where] = torch.tensor(row)
            mask[i, where] = 1
        return input_ids, mask

    def shown(self, text: Prompt) -> str:
        """A text as a string, whatever it was given as."""
        return text if isinstance(text, str) else str(self.tokenizer.decode(self.ids(text, bos=False)))


def as_prompts(texts: Any) -> list[Prompt]:
    """The texts that were given, as a list: one string, one conversation or one row of token ids is one text.

    >>> as_prompts("hello"), as_prompts([{"role": "user", "content": "hello"}]), as_prompts([[0, 5], [0, 6]])
    (['hello'], [[{'role': 'user', 'content': 'hello'}]], [[0, 5], [0, 6]])
    """
    if isinstance(texts, Tensor):
        texts = texts.tolist()
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise SteersmanError(f"texts must be a string or a list of them, got {type(texts).__name__}")
    texts = list(texts)
    if texts and (isinstance(texts[0], int) or is_message(texts[0])):
        return [texts]
    return texts


def writing_of(
    messages: Conversation,
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Writing:
    """How a conversation is written: it ends with the header of the assistant's turn unless its last message is one, or
    `add_generation_prompt` says otherwise.

    >>> writing_of([{"role": "user", "content": "Hello"}]).add_generation_prompt
    True
    """
    if add_generation_prompt is None:
        add_generation_prompt = messages[-1]["role"] != "assistant" and not continue_final_message
    if add_generation_prompt and continue_final_message:
        raise SteersmanError("continue_final_message goes on with the last message: it has no generation prompt")
    return Writing(
        add_generation_prompt=bool(add_generation_prompt),
        continue_final_message=continue_final_message,
        settings=dict(settings or {}),
    )


@cache
def _say_bos(tokenizer: str, token: str) -> None:
    """Once for each tokenizer."""
    log.warning(
        "the tokenizer %sputs no BOS before a text by itself: %s is put there all the same; bos=False leaves it out",
        f"of {tokenizer} " if tokenizer else "",
        token,
    )
