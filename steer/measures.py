"""What steering did to text, measured with no judge: per-token divergence and likelihood, repetition, distinct n-grams.

All in fp32 and nats. B texts, S tokens, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from steersman.lm import Generation


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
    """Share of the n-grams of `tokens` that occurred before in it; 0 for texts too short to hold one.

    >>> repetition_rate([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Distinct n-grams over n-grams of `tokens`; 1 for texts too short to hold one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def generated_tokens(text: Generation) -> Tensor:
    """[B, S-1] bool: which next-token predictions are of real generated tokens."""
    chosen = text.attention_mask.bool().clone()
    chosen[:, : text.prompt_columns] = False
    return chosen[:, 1:]
