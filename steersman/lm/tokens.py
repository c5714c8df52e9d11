"""Text to token ids: one beginning-of-sequence token where the model's family has one, and a padding id for batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Texts as token ids, padded to one length."""

    input_ids: Tensor
    """[B, S] int64 token ids."""
    attention_mask: Tensor
    """[B, S] int64, 1 for real tokens and 0 for padding."""

    @property
    def lengths(self) -> Tensor:
        """[B] int64: real tokens per row."""
        return self.attention_mask.sum(1)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on `device`."""
        return TokenBatch(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


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
    """Turns text into ids. Encoders get their own special tokens ([CLS] ... [SEP]), decoders exactly one BOS."""

    def __init__(self, tokenizer: Any, *, is_encoder: bool) -> None:
        self.tokenizer = tokenizer
        self.is_encoder = is_encoder
        self.pad_token_id = choose_pad_token(tokenizer)
        self.bos_token_id = tokenizer.bos_token_id
        if self.bos_token_id is None and is_encoder:
            self.bos_token_id = tokenizer.cls_token_id

    def ids(self, text: str, bos: bool) -> list[int]:
        """Token ids of one text, with the beginning-of-sequence token once if `bos` and the family has one."""
        return self.many([text], bos)[0]

    def many(self, texts: Sequence[str], bos: bool) -> list[list[int]]:
        """Token ids of each text. A BOS written in the text itself is not doubled."""
        if not texts:
            return []
        # verbose=False: longer than the context is this library's own check, with a message that says what to do
        rows = self.tokenizer(list(texts), add_special_tokens=bos and self.is_encoder, verbose=False)["input_ids"]
        if bos and not self.is_encoder and self.bos_token_id is not None:
            rows = [row if row[:1] == [self.bos_token_id] else [self.bos_token_id, *row] for row in rows]
        return [list(row) for row in rows]

    def batch(self, texts: Sequence[str], bos: bool, padding_side: str, max_length: int | None) -> TokenBatch:
        """Ids of all texts in one [B, S] batch, padded on `padding_side` and cut to `max_length` tokens."""
        if isinstance(texts, str):
            texts = [texts]
        if padding_side not in ("left", "right"):
            raise SteersmanError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if not texts:
            raise SteersmanError("no texts to encode")
        rows = [row[:max_length] for row in self.many(texts, bos)]
        for i, row in enumerate(rows):
            if not row:
                raise SteersmanError(
                    f"text {i} of {len(rows)} is empty and the tokenizer has no BOS token to stand for it"
                )
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
        return TokenBatch(input_ids=input_ids, attention_mask=mask)
