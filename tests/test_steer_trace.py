"""The trace: distinct (row, position) pairs, over many texts."""

import pytest
import torch
from support.tiny_models import D

from steersman.lm import LanguageModel
from steersman.steer import Steerer, trace

HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("fold", [1, 2, 256])
def test_counts_do_not_depend_on_when_they_are_folded(
    lm: LanguageModel, fold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "FOLD_EVERY", fold)
    with Steerer(lm).vector(torch.ones(D), hook=HOOK) as ctx:
        for use_cache in (True, False):
            lm.generate(["w5 w6", "w7"], max_new_tokens=4, eos_token_id=None, use_cache=use_cache)
        lm.logits(torch.tensor([[0, 5, 6]]))
    # twice (2 + 3) + (1 + 3) tokens, and a plain pass of 2
    assert ctx.trace.count == 9 + 9 + 2
    assert ctx.trace.rows == [2]
    assert ctx.trace.pairs() == [(0, 1), (0, 2)]


def test_nothing_steered(lm: LanguageModel) -> None:
    with Steerer(lm).vector(torch.ones(D), hook=HOOK, scope="generation") as ctx:
        lm.logits(torch.tensor([[0, 5, 6]]))
    assert (ctx.trace.count, ctx.trace.rows, ctx.trace.pairs(), ctx.trace.passes) == (0, [], [], 0)
    assert str(ctx.trace) == "Trace(0 positions steered in 0 passes)"


def test_several_hook_points_count_a_pair_once(lm: LanguageModel) -> None:
    with Steerer(lm).vector({"layers.0": torch.ones(D), "layers.2": torch.ones(D)}) as ctx:
        lm.logits(torch.tensor([[0, 5, 6]]))
    assert ctx.trace.count == 2
