"""Texts of which some tokens count: prompt and answer as token ids, and how likely a model finds the answer.

Shape letters: B texts, S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.measures import common_prefix
from steersman.steer.methods.examples import Example
from steersman.steer.methods.reading import answer_span, prompt_tokens


@dataclass(frozen=True)
class Target:
    """One text."""

    ids: list[int]
    """All its tokens, the BOS included."""
    start: int
    """Where its answer begins; 1 for a text as a whole, whose first token nothing predicts."""


def completion(lm: LanguageModel, example: Example, where: str) -> Target:
    """An example as a target: its answer counts, or the whole text where it has no prompt. Of a conversation the
    assistant's last message counts with the token that ends it, and nothing stands behind that."""
    ids = lm.token_ids(example.text, bos=True)
    if example.prompt and not isinstance(example.text, str):
        start, end = answer_span(lm, example, where)
        return _checked(lm, Target(ids[: end + 1], start), where)
    start = min(max(prompt_tokens(lm, example, where), 1), len(ids) - 1) if example.prompt else 1
    return _checked(lm, Target(ids, start), where)


def paired_targets(lm: LanguageModel, prompt: Any, teacher: Any, answer: str, where: str) -> tuple[Target, Target]:
    """One answer behind two prompts (texts, token ids or conversations), token for token the same."""
    ids = lm.token_ids(prompt, bos=True)
    other = lm.token_ids(teacher, bos=True)
    if isinstance(prompt, str) and isinstance(teacher, str):
        whole = lm.token_ids(prompt + answer, bos=True)
        start = common_prefix(whole, ids)  # a token may hold the prompt's end and the answer's beginning
        behind = other[: len(other) - (len(ids) - start)] + whole[start:]
    else:
        tokens = lm.token_ids(answer)
        whole, start, behind = ids + tokens, len(ids), other + tokens
    length = len(whole) - start
    if length < 1:
        raise SteersmanError(f"{where} has no token")
    pair = Target(whole, start), Target(behind, len(behind) - length)
    return _checked(lm, pair[0], where), _checked(lm, pair[1], where)


def _checked(lm: LanguageModel, target: Target, where: str) -> Target:
    if len(target.ids) < 2:
        raise SteersmanError(f"{where} has {len(target.ids)} token(s): there is none to predict")
    if lm.context_length is not None and len(target.ids) > lm.context_length:
        raise SteersmanError(
            f"{where} has {len(target.ids)} tokens and the context of {lm.name} is {lm.context_length}: shorten it"
        )
    return target


def log_likelihoods(lm: LanguageModel, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """(log p of every token but the first [B, S-1] fp32, which of them are the answer's [B, S-1] bool), from one pass
    with gradients. Scopes see where each prompt ends."""
    batch = lm.encode([t.ids for t in targets])
    starts = [t.start for t in targets]
    logits = lm.logits(batch.input_ids, batch.attention_mask, prompt_length=starts, grad=True)
    ids = batch.input_ids.to(logits.device)
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    column = torch.arange(1, ids.shape[1], device=ids.device)
    chosen = (column >= torch.tensor(starts, device=ids.device)[:, None]) & batch.attention_mask[:, 1:].bool()
    return logp, chosen
