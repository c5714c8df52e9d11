"""The part of `LanguageModel` that turns text and conversations into tokens."""

from collections.abc import Sequence
from typing import Any

from steersman.conversations import Conversation
from steersman.errors import SteersmanError
from steersman.lm import chat as chats
from steersman.lm.model_points import ModelPoints
from steersman.lm.template import ChatTemplate
from steersman.lm.tokens import ChatBatch, Prompt, Prompts, TextEncoder, TokenBatch, writing_of


class ModelText(ModelPoints):
    """A model's tokenizer and chat template."""

    tokenizer: Any
    _text: TextEncoder | None

    @property
    def bos_token_id(self) -> int | None:
        """The token put before every text ([CLS] for encoders), or None in families that use none and with
        `bos=False`."""
        return None if self._text is None else self._text.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence token, or None."""
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills short rows: the tokenizer's own, else its eos or unk token."""
        return None if self._text is None else self._text.pad_token_id

    def _texts(self) -> TextEncoder:
        if self._text is None:
            raise SteersmanError(f"{self.name} was wrapped without a tokenizer: pass token ids, or give it one")
        return self._text

    def encode(
        self,
        texts: Prompts,
        *,
        bos: bool = True,
        padding_side: str = "right",
        max_length: int | None = None,
    ) -> TokenBatch:
        """Texts as one padded batch on the model's device. `bos` adds the family's special tokens, never twice.

        A text may also be given as token ids, taken as they are, or as a conversation (a list of messages), written out
        by the tokenizer's chat template.
        """
        return self._texts().batch(texts, bos, padding_side, max_length).to(self.device)

    def token_ids(self, text: Prompt, bos: bool = False) -> list[int]:
        """The ids of one text, without special tokens unless `bos`."""
        return self._texts().ids(text, bos)

    def shown(self, text: Prompt) -> str:
        """A prompt as a string, whatever it was given as."""
        return self._texts().shown(text)

    @property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's chat template. Raises SteersmanError where there is none."""
        return self._texts().current_template()

    @property
    def template_digest(self) -> str | None:
        """Sixteen hexadecimal digits of the chat template, which whatever is made from chats records; None without."""
        return None if self._text is None or not self._text.has_template else self.chat_template.digest

    def written(self, messages: Conversation) -> str:
        """A conversation as the text that the chat template makes of it, with the header of the reply unless its last
        message is the assistant's."""
        return writing_of(messages).render(self.chat_template, messages)

    def encode_chat(
        self,
        conversations: str | Conversation | Sequence[str | Conversation],
        *,
        system: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        padding_side: str = "right",
        max_length: int | None = None,
        **settings: Any,
    ) -> ChatBatch:
        """Conversations as one padded batch, written out by the model's own chat template, that knows whose each token
        is: `roles`, `turns`, `content`, `mask("last_user")`. No BOS is added to what the template writes.

        A conversation is a list of messages; a string is a user's message. `system` puts a system message before each.
        Each ends with the header of the assistant's turn, unless its last message is one or `add_generation_prompt` is
        False; `continue_final_message` ends with the last message's text, open. `settings` are the template's
        variables, such as `enable_thinking` or `tools`.

        Raises SteersmanError for a tokenizer without a template, and for conversations that the template refuses;
        whose tokens are whose is found when it is asked for, and may be refused then (see `docs/chat.md`).
        """
        writing = chats.Asked(system, add_generation_prompt, continue_final_message, settings)
        return chats.encode(self._texts(), conversations, writing, padding_side, max_length).to(self.device)
