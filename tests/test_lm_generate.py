"""Generation: batches equal their rows, seeds, settings that mean what they say."""

from typing import Any

import pytest
import torch
from support.tiny_models import with_text

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.generate import real_generated, sampling_settings

PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w14 w15"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "opt", "phi"])
def test_a_batch_equals_its_rows_one_by_one(family: str) -> None:
    lm = with_text(family)
    batch = lm.generate(PROMPTS, max_new_tokens=8)
    for i, prompt in enumerate(PROMPTS):
        alone = lm.generate(prompt, max_new_tokens=8)
        assert alone.texts[0] == batch.texts[i]
        assert batch.tokens[i][batch.attention_mask[i].bool()].tolist() == alone.tokens[0].tolist()


def test_what_is_returned(lm: LanguageModel) -> None:
    out = lm.generate(PROMPTS, max_new_tokens=4, eos_token_id=None)
    assert out.prompts == PROMPTS
    assert out.prompt_length.tolist() == [4, 2, 6, 3]
    assert out.tokens.shape == out.attention_mask.shape == (4, 10)
    assert out.new_tokens.shape == out.new_mask.shape == (4, 4)
    for text, prompt, completion in zip(out.texts, out.prompts, out.completions):
        assert text == prompt + completion
    more = lm.generate(PROMPTS[:2], max_new_tokens=3, num_return_sequences=2, do_sample=True, seed=0)
    assert more.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert more.prompt_length.tolist() == [4, 4, 2, 2]


def test_cache_or_not_is_the_same_text(lm: LanguageModel) -> None:
    assert lm.generate(PROMPTS, max_new_tokens=8).texts == lm.generate(PROMPTS, max_new_tokens=8, use_cache=False).texts


def test_seeded_sampling(lm: LanguageModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = lm.generate(PROMPTS, max_new_tokens=8, seed=1)
    assert torch.equal(torch.rand(1), expected)  # the caller's generator was not touched
    assert torch.equal(one.tokens, lm.generate(PROMPTS, max_new_tokens=8, seed=1).tokens)
    assert not torch.equal(one.tokens, lm.generate(PROMPTS, max_new_tokens=8, seed=2).tokens)
    greedy = lm.generate(PROMPTS, max_new_tokens=8)
    assert torch.equal(lm.generate(PROMPTS, max_new_tokens=8, top_k=1, seed=3).tokens, greedy.tokens)


def test_the_models_own_sampling_defaults_do_not_slip_in(lm: LanguageModel) -> None:
    config, before = lm.model.generation_config, lm.generate(PROMPTS, max_new_tokens=8, seed=1).tokens
    config.top_k, config.temperature, config.do_sample = 1, 0.1, True
    try:
        assert torch.equal(lm.generate(PROMPTS, max_new_tokens=8, seed=1).tokens, before)
    finally:
        config.top_k, config.temperature, config.do_sample = None, None, None


def test_real_generated() -> None:
    new = torch.tensor([[5, 1, 3, 3], [1, 1, 1, 1], [5, 6, 7, 8]])
    assert real_generated(new, [1]).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert real_generated(new, []).tolist() == [[1] * 4] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_k": 0}, "top_k must be"),
        ({"temperature": 0.7, "do_sample": False}, "need sampling"),
        ({"temperature": 0.0, "do_sample": True}, "greedy decoding"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    given = {"do_sample": None, "temperature": 1.0, "top_k": None, "top_p": None, "seed": None, **settings}
    with pytest.raises(SteersmanError, match=message):
        sampling_settings(**given)


def test_too_long(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="exceed the context of llama, 32 tokens"):
        lm.generate("w5 w6", max_new_tokens=30)
    with pytest.raises(SteersmanError, match="max_new_tokens"):
        lm.generate("w5 w6", max_new_tokens=0)
