"""How well a language model knows the story grammar: its loss against the grammar's entropy, and its samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from steersman.demo.grammar import Story, is_sentence, parse


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """A model's loss on stories beside the least loss that is possible on average."""

    loss: float
    """Mean negative log-likelihood in nats per token, over every token after BOS, EOS included."""
    entropy: float
    """The grammar's own mean -log p in nats over the same tokens of the same stories."""
    tokens: int
    """Tokens that were predicted."""


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What the recognizer says of a model's samples."""

    stories: float
    """Fraction of samples that are whole stories of the grammar, to the last word."""
    sentences_in_place: float
    """Fraction of sentences that the grammar allows in their place, after everything said before in the story; a
    story's sentences after its first mistake count as out of place."""
    sentences: float
    """Fraction of sentences that the grammar can say somewhere."""
    texts: tuple[str, ...]
    """The samples."""


@torch.inference_mode()
def story_loss(model: Any, tokenizer: Any, stories: Sequence[Story], batch_size: int = 64) -> LossReport:
    """The loss of a causal transformers model on stories, one story a row, against the grammar's entropy.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, which adds BOS; the text must be followed by EOS in what the model was trained on.
        stories: stories of the grammar that the model was not trained on.
        batch_size: rows per forward pass.
    """
    total, tokens = 0.0, 0
    for at in range(0, len(stories), batch_size):
        rows = [
            tokenizer(story.text)["input_ids"] + [tokenizer.eos_token_id] for story in stories[at : at + batch_size]
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=model.device)
        real = torch.arange(width, device=ids.device) < torch.tensor([[len(row)] for row in rows], device=ids.device)
        logits = model(input_ids=ids, attention_mask=real.long()).logits.float()
        targets = ids[:, 1:].masked_fill(~real[:, 1:], -100)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += int(real[:, 1:].sum())
    entropy = -math.fsum(story.log_probability for story in stories) / tokens
    return LossReport(loss=total / tokens, entropy=entropy, tokens=tokens)


@torch.inference_mode()
def sample_report(model: Any, tokenizer: Any, n: int = 64, seed: int = 0, max_new_tokens: int = 200) -> SampleReport:
    """Sample `n` texts at temperature 1 from BOS alone and read them with the grammar.

    The global torch generator is seeded for the samples and put back afterwards.
    """
    bos = torch.full((n, 1), tokenizer.bos_token_id, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = model.generate(
            bos,
            attention_mask=torch.ones_like(bos),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    readings = [parse(text) for text in texts]
    sentences = [_sentences(text) for text in texts]
    count = max(1, sum(map(len, sentences)))
    return SampleReport(
        stories=sum(reading.complete for reading in readings) / n,
        sentences_in_place=sum(reading.sentences for reading in readings) / count,
        sentences=sum(is_sentence(sentence) for story in sentences for sentence in story) / count,
        texts=tuple(texts),
    )


def _sentences(text: str) -> list[str]:
    """The text cut after every full stop; the frames have no other."""
    return [part.strip() + "." for part in text.split(".") if part.strip()]
