"""What must hold of everything that steers, whatever it does: the runtime contract, checked by generating."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from steersman.lm import LanguageModel

PROMPTS = ("w5 w6 w7 w8", "w9", "w10 w11 w12")
"""Prompts of several lengths for `tiny_models`, so that a batch is padded."""

Open = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""Opens the steering of the rows with these numbers: of all in a batch, of one alone."""


def rows_of(lm: LanguageModel, prompts: Sequence[Any], context: Any, **options: Any) -> list[list[int]]:
    """Greedily generated tokens of each row, up to its end."""
    with context:
        out = lm.generate(list(prompts), max_new_tokens=8, **options)
    return [row[keep.bool()].tolist() for row, keep in zip(out.new_tokens, out.new_mask)]


def check_contract(
    lm: LanguageModel, open_steering: Open, prompts: Sequence[Any] = PROMPTS, *, acts: bool = True
) -> None:
    """Cache on equals off, a batch its rows one by one, left padding right padding, and nothing stays on the model.

    `open_steering(rows)` opens the steering of those rows of `prompts`, a new context each time. `acts`: it must change
    what is written.
    """
    every = list(range(len(prompts)))
    plain = rows_of(lm, prompts, nullcontext())
    steered = rows_of(lm, prompts, open_steering(every))
    if acts:
        assert steered != plain, "the steering changes nothing that is written"
    assert rows_of(lm, prompts, open_steering(every), use_cache=False) == steered, "the KV cache changes the text"
    for i in every:
        alone = rows_of(lm, [prompts[i]], open_steering([i]))
        assert alone == [steered[i]], f"row {i} differs from the same row alone"
    logits = {}
    for side in ("left", "right"):
        batch = lm.encode(list(prompts), padding_side=side)
        with open_steering(every):
            found = lm.logits(batch.input_ids, batch.attention_mask)
        logits[side] = torch.cat([row[keep.bool()] for row, keep in zip(found, batch.attention_mask)])
    torch.testing.assert_close(logits["left"], logits["right"], rtol=1e-4, atol=1e-4)
    beams = rows_of(lm, prompts, open_steering(every), num_beams=2)
    assert len(beams) == len(prompts)
    assert rows_of(lm, prompts, nullcontext()) == plain, "something stayed on the model"


def check_off(lm: LanguageModel, context: AbstractContextManager[Any], prompts: Sequence[Any] = PROMPTS) -> None:
    """What is off (scale 0, a gate of 0) leaves logits and text as they are, bit for bit."""
    batch = lm.encode(list(prompts))
    clean = lm.logits(batch.input_ids, batch.attention_mask)
    with context:
        assert lm.logits(batch.input_ids, batch.attention_mask).equal(clean)
    assert rows_of(lm, prompts, context) == rows_of(lm, prompts, nullcontext())
