"""Measures on given text, teacher-forced: held-out loss while steering, and whole continuations for and against.

A continuation item is a prompt with a positive and a negative continuation. Its margin is log p(positive | prompt) -
log p(negative | prompt), over all tokens of both (arXiv 2410.17245). The slope of the margin over the scale says how
steerable the item is, and the fraction of items with a negative slope how many move the other way (arXiv 2407.12404).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steersman.conversations import Document, answered
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel, TokenBatch
from steersman.steer.evaluation.rollouts import Arm
from steersman.steer.measures import common_prefix, token_nll


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """One prompt and two ways to continue."""

    prompt: Document
    """What comes before: a text, or a conversation that the assistant answers."""
    positive: str
    """The continuation that steering should make likelier."""
    negative: str
    """The one it should make less likely."""


ContinuationLike = Continuations | Mapping[str, Any] | Sequence[Any]
"""`Continuations`, a mapping with its fields, or (prompt, positive, negative)."""


def as_continuations(given: Sequence[ContinuationLike]) -> list[Continuations]:
    """From `Continuations`, mappings with their fields, or (prompt, positive, negative). Raises SteersmanError."""
    found = []
    for i, entry in enumerate(given):
        if isinstance(entry, Mapping) and {"prompt", "positive", "negative"} <= set(entry):
            entry = (entry["prompt"], entry["positive"], entry["negative"])
        if not isinstance(entry, Continuations):
            if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 3:
                raise SteersmanError(f"continuation {i} must have a prompt, a positive and a negative; got {entry!r}")
            entry = Continuations(prompt=entry[0], positive=entry[1], negative=entry[2])
        if not entry.positive.strip() or not entry.negative.strip():
            raise SteersmanError(f"continuation {i} is empty on one side")
        found.append(entry)
    return found


@torch.no_grad()
def heldout_loss(lm: LanguageModel, texts: Sequence[Document], arm: Arm, batch_size: int) -> np.ndarray:
    """Mean negative log-likelihood per token of each text while steering, in nats; NaN for a text of one token."""
    losses = []
    length = lm.context_length
    for start in range(0, len(texts), batch_size):
        batch = lm.encode(texts[start : start + batch_size], max_length=length)
        with arm(len(batch.input_ids)):
            logits = lm.logits(batch)
        real = batch.attention_mask[:, 1:].bool()
        nll = token_nll(logits, batch.input_ids).masked_fill(~real, 0.0)
        n = real.sum(1)
        losses += torch.where(n > 0, nll.sum(1) / n.clamp(min=1), torch.nan).tolist()
    return np.array(losses)


def margins(lm: LanguageModel, items: Sequence[Continuations], arm: Arm, batch_size: int) -> np.ndarray:
    """log p(positive | prompt) - log p(negative | prompt) of each item while steering, in nats."""
    return likelihoods(lm, items, arm, batch_size)[0] @ np.array([1.0, -1.0])


@torch.no_grad()
def likelihoods(
    lm: LanguageModel, items: Sequence[Continuations], arm: Arm, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """log p(continuation | prompt) in nats while steering, and the number of its tokens: [items, 2] each, the positive
    continuation first. A token that holds the end of the prompt counts as the continuation's. A reply in a conversation
    is taken without what the template writes after it."""
    rows: list[tuple[Document, list[int], int | None]] = []  # text, its prompt's tokens, another last token to look at
    for item in items:
        prompt = lm.token_ids(item.prompt, bos=True) if item.prompt else []
        sides = [answered(item.prompt, side) for side in (item.positive, item.negative)]
        positive, negative = (_open(lm, [side]).input_ids[0].tolist() for side in sides)
        if positive[:-1] == negative[:-1] and len(positive) - 1 >= max(1, len(prompt)):
            rows.append((sides[0], prompt, negative[-1]))  # one pass tells both last tokens
        else:
            rows += [(side, prompt, None) for side in sides]
    logp: list[float] = []
    counts: list[int] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = _open(lm, [text for text, _, _ in part])
        lengths = batch.lengths.tolist()
        starts = [
            max(1, min(common_prefix(batch.input_ids[row].tolist(), prompt), lengths[row] - 1))
            for row, (_, prompt, _) in enumerate(part)
        ]
        first = torch.tensor(starts, device=batch.input_ids.device)
        with arm(len(part)):
            logits = lm.logits(batch, prompt_length=first)
        each = -token_nll(logits, batch.input_ids)
        for row, (_, _, other) in enumerate(part):
            own = each[row, starts[row] - 1 : lengths[row] - 1]
            logp.append(float(own.sum()))
            counts.append(len(own))
            if other is not None:
                last = logits[row, lengths[row] - 2].float().log_softmax(-1)[other]
                logp.append(float(own[:-1].sum() + last))
                counts.append(len(own))
    return np.array(logp).reshape(-1, 2), np.array(counts).reshape(-1, 2)


def slopes(scales: Sequence[float], values: np.ndarray) -> np.ndarray:
    """Least-squares slope over the scale of each column of `values` [scales, items].

    >>> slopes([0.0, 1.0, 2.0], np.array([[0.0, 5.0], [1.0, 4.0], [2.0, 3.0]])).tolist()
    [1.0, -1.0]
    """
    s = np.asarray(scales, dtype=np.float64)
    s = s - s.mean()
    return s @ (values - values.mean(0)) / (s @ s)


def _open(lm: LanguageModel, texts: Sequence[Document]) -> TokenBatch:
    """Texts, or conversations that end with the last letter of their last message."""
    chats = [text for text in texts if not isinstance(text, str)]
    if chats and len(chats) < len(texts):
        raise SteersmanError("continuations are all of texts or all of conversations")
    return lm.encode_chat(chats, continue_final_message=True) if chats else lm.encode(texts)
