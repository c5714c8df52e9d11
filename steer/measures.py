"""What steering does to text, with no judge: per-token divergence and likelihood, repetition, distinct n-grams; and
what any way of steering costs on fixed texts.

All in fp32 and nats. B texts, S tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.conversations import Document, is_blank, is_conversation
from steersman.errors import SteersmanError
from steersman.lm import Generation, LanguageModel, TokenBatch
from steersman.lm.tokens import bos_tokens

OWN_TEXTS, OWN_TOKENS = 16, 48
"""Without texts the model writes its own: how many, and how many tokens each."""
OPENINGS = ("The", "I", "In", "It", "We", "When", "My", "There")
"""What they start from where the model's family has no BOS token."""


def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, S-1] fp32: negative log-likelihood of tokens[:, 1:] given logits [B, S, V]."""
    logp = logits[:, :-1].float().log_softmax(-1)
    return -logp.gather(-1, tokens[:, 1:, None])[..., 0]


def token_kl(steered: Tensor, base: Tensor) -> Tensor:
    """[B, S] fp32: KL(steered || base) in nats of the next-token distributions, from logits [B, S, V] of each.

    >>> import torch
    >>> same = torch.randn(1, 3, 7)
    >>> token_kl(same, same).tolist()
    [[0.0, 0.0, 0.0]]
    """
    p, q = steered.float().log_softmax(-1), base.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def repetition_rate(tokens: Sequence[int], n: int = 4) -> float:
    """Fraction of the n-grams of `tokens` that occurred before in it; 0 for texts too short to hold one.

    >>> repetition_rate([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Distinct n-grams over n-grams of `tokens`; 1 for texts too short to hold one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens a and b have in common from the front.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def generated_tokens(text: Generation) -> Tensor:
    """[B, S-1] bool: which next-token predictions are of real generated tokens."""
    chosen = text.attention_mask.bool().clone()
    chosen[:, : text.prompt_columns] = False
    return chosen[:, 1:]


class CostMeter:
    """Texts and the unsteered model's predictions on them, to measure many ways of steering against.

    Without texts the model writes its own from `seed`; given ones are cut to `max_length` tokens.
    """

    def __init__(
        self,
        lm: LanguageModel,
        texts: Sequence[Document] | None,
        *,
        batch_size: int = 16,
        max_length: int = 128,
        seed: int = 0,
    ) -> None:
        self.lm = lm
        if texts is None:
            self.batches = _batches_of_tokens(own_texts(lm, seed), batch_size)
        else:
            texts = [texts] if isinstance(texts, str) or is_conversation(texts) else list(texts)
            empty = next((i for i, text in enumerate(texts) if is_blank(text)), None)
            if not texts or empty is not None:
                raise SteersmanError("there are no texts to measure on" if not texts else f"text {empty} is empty")
            self.batches = _encoded(lm, texts, batch_size, max_length)
        self.n_tokens = sum(int(b.attention_mask[:, 1:].sum()) for b in self.batches)
        if self.n_tokens == 0:
            raise SteersmanError("the texts hold no token to predict: they must be longer than one token")
        self._base: list[Tensor] | None = None
        self._norms: dict[str, float] = {}

    @property
    def has_chats(self) -> bool:
        """Whether any of the texts is a conversation."""
        return any(batch.spans is not None for batch in self.batches)

    def norms(self, hooks: Sequence[str]) -> dict[str, float]:
        """Median norm of the residual stream at each hook point, without padding and BOS."""
        new = [hook for hook in hooks if hook not in self._norms]
        if new:
            self._norms |= _median_norms(self.lm, self.batches, new)
        return {hook: self._norms[hook] for hook in hooks}

    def cost(self, budget: Literal["kl", "loss"], steering: Callable[[], AbstractContextManager[Any]]) -> float:
        """KL or rise of the loss, in nats per predicted token, of what `steering()` opens."""
        if self._base is None:
            # Kept in the model's own dtype: one [B, S, V] per batch of texts.
            self._base = [self.lm.logits(b) for b in self.batches]
        total = 0.0
        for batch, base in zip(self.batches, self._base):
            with steering():
                steered = self.lm.logits(batch)
            chosen = batch.attention_mask[:, 1:].bool()
            if budget == "kl":
                each = token_kl(steered[:, :-1], base[:, :-1])
            else:
                each = token_nll(steered, batch.input_ids) - token_nll(base, batch.input_ids)
            total += float(each[chosen].double().sum())
        return total / self.n_tokens


def own_texts(lm: LanguageModel, seed: int = 0) -> TokenBatch:
    """Texts that the unsteered model writes at temperature 1, from its BOS or from a few openings."""
    if lm.bos_token_id is None:
        prompts = [OPENINGS[i % len(OPENINGS)] for i in range(OWN_TEXTS)]
    else:
        prompts = [""] * OWN_TEXTS
    tokens = OWN_TOKENS if lm.context_length is None else min(OWN_TOKENS, lm.context_length - 8)
    made = lm.generate(prompts, max_new_tokens=max(1, tokens), do_sample=True, seed=seed)
    return TokenBatch(input_ids=made.tokens, attention_mask=made.attention_mask)


def _batches_of_tokens(whole: TokenBatch, size: int) -> list[TokenBatch]:
    ids, mask = whole.input_ids.split(size), whole.attention_mask.split(size)
    return [TokenBatch(input_ids=i, attention_mask=m) for i, m in zip(ids, mask)]


def median_norms(
    lm: LanguageModel, texts: Sequence[Document], hooks: Sequence[str], *, batch_size: int = 16, max_length: int = 128
) -> dict[str, float]:
    """Median |h| at each hook point over the tokens of `texts`, padding and BOS left out."""
    return _median_norms(lm, _encoded(lm, texts, batch_size, max_length), hooks)


def _encoded(lm: LanguageModel, texts: Sequence[Document], batch_size: int, max_length: int) -> list[TokenBatch]:
    length = min(max_length, lm.context_length or max_length)
    return [lm.encode(texts[i : i + batch_size], max_length=length) for i in range(0, len(texts), batch_size)]


def _median_norms(lm: LanguageModel, batches: Sequence[TokenBatch], hooks: Sequence[str]) -> dict[str, float]:
    lengths: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for batch in batches:
        states = lm.capture(batch.input_ids, batch.attention_mask, hooks=hooks)
        real = batch.attention_mask.bool()
        real = real & ~bos_tokens(batch.input_ids, batch.attention_mask, lm.bos_token_id)
        for hook, h in states.items():
            lengths[hook].append(h.float().norm(dim=-1)[real.to(h.device)].cpu())
    norms = {hook: float(torch.cat(parts).median()) for hook, parts in lengths.items()}
    for hook, norm in norms.items():
        if not (math.isfinite(norm) and norm > 0):
            raise SteersmanError(f"the states of {lm.name} at {hook} have a median norm of {norm}")
    return norms
