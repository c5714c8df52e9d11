"""Scopes: exactly the tokens they name, whatever the padding, the cache and the chunks."""

from typing import Any

import pytest
import torch
from support.tiny_models import D

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Scope, Steerer

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["w5 w6 w7 w8", "w9"]  # five and two tokens with the BOS
NEW = 4  # generated tokens, of which the last is never fed back


def pairs(lm: LanguageModel, scope: Any, **options: Any) -> list[list[int]]:
    """Steered positions of each prompt while generating."""
    bos = options.pop("include_bos", False)
    with Steerer(lm).vector(torch.ones(D), hook=HOOK, scope=scope, include_bos=bos) as ctx:
        lm.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=None, **options)
    found: list[list[int]] = [[], []]
    for row, position in ctx.trace.pairs():
        found[row].append(position)
    assert ctx.trace.count == sum(map(len, found))
    return found


EXPECTED = [
    ("all", [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]]),
    ("prompt", [[1, 2, 3, 4], [1]]),
    ("generation", [[5, 6, 7], [2, 3, 4]]),
    ("last_prompt", [[4], [1]]),
    ("2:6", [[2, 3, 4, 5], [2, 3, 4]]),
    (slice(0, 3), [[1, 2], [1, 2]]),
    ((6, None), [[6, 7], []]),
    ({5, 9}, [[1], [1]]),
]


@pytest.mark.parametrize(("scope", "expected"), EXPECTED)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}])
def test_exact_tokens(lm: LanguageModel, scope: Any, expected: list[list[int]], options: dict[str, Any]) -> None:
    assert pairs(lm, scope, **options) == expected


def test_bos_only_on_request(lm: LanguageModel) -> None:
    assert pairs(lm, "prompt", include_bos=True) == [[0, 1, 2, 3, 4], [0, 1]]
    assert pairs(lm, "0:3", include_bos=True) == [[0, 1, 2], [0, 1, 2]]
    assert pairs(lm, {0}) == [[0], [0]]  # the token id names it


def test_mask(lm: LanguageModel) -> None:
    """Aligned with the left-padded batch; padding stays untouched, later columns too; a named BOS is steered."""
    mask = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 1, 1]])
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        assert pairs(lm, mask, **options) == [[0, 3], [0, 1]]
        assert pairs(lm, torch.tensor([0, 0, 0, 1, 1], dtype=torch.bool), **options) == [[3, 4], [0, 1]]
    with pytest.raises(SteersmanError, match="the scope mask has 3 rows and the batch has 2"):
        pairs(lm, torch.ones(3, 5))


def test_only_the_first_token_of_a_row_is_the_bos(lm: LanguageModel) -> None:
    """Its id further on is text: many chat models begin every turn with their BOS."""
    ids, mask = torch.tensor([[0, 5, 6, 0, 7, 8], [3, 0, 5, 0, 6, 0]]), torch.tensor([[1] * 6, [0] + [1] * 5])
    with Steerer(lm).vector(torch.ones(D), hook=HOOK, scope="all") as ctx:
        lm.logits(ids, mask)
    assert ctx.trace.pairs() == [(row, p) for row, n in ((0, 6), (1, 5)) for p in range(1, n)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_passes_and_teacher_forcing(lm: LanguageModel, side: str) -> None:
    batch = lm.encode(PROMPTS, padding_side=side)

    def found(scope: Any, **options: Any) -> list[tuple[int, int]]:
        with Steerer(lm).vector(torch.ones(D), hook=HOOK, scope=scope) as ctx:
            lm.logits(batch.input_ids, batch.attention_mask, **options)
        return ctx.trace.pairs()

    assert found("all") == found("prompt") == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1)]
    assert found("generation") == []
    assert found("generation", prompt_length=[3, 1]) == [(0, 3), (0, 4), (1, 1)]
    assert found("last_prompt", prompt_length=[3, 2]) == [(0, 2), (1, 1)]
    assert found("1:3") == [(0, 1), (0, 2), (1, 1)]
    assert found("0:-1") == [(0, 1), (0, 2), (0, 3)]
    assert found("0:-1", prompt_length=[3, 2]) == [(0, 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("everything", "unknown scope 'everything'"),
        ("5:2", "window 5:2 is empty"),
        ("a:b", "unknown scope 'a:b'"),
        ("tokens:", "unknown scope 'tokens:'"),
        (slice(0, 8, 2), "no step"),
        ([1, 2], "unknown scope"),
        (set(), "at least one id"),
        (torch.ones(1, 1, 1), r"\[B, S\] or \[S\]"),
    ],
)
def test_wrong_scopes(given: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        Scope.of(given)


def test_forms_of_the_same_scope() -> None:
    assert Scope.of("2:5").window == Scope.of((2, 5)).window == Scope.of(slice(2, 5)).window == (2, 5)
    assert Scope.of("3:").window == (3, None)
    assert Scope.of(":3").window == (0, 3)
    assert Scope.of("tokens:5,7").token_ids == Scope.of({7, 5}).token_ids
    assert Scope.of(Scope.of("all")).kind == "all"
