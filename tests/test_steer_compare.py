"""`steer_and_compare`: texts side by side, KL, log-likelihood, and the measures by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import toy_sae

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import SteerConfig, Steerer, parse_features, steer_and_compare
from steersman.steer.measures import distinct, repetition_rate, token_kl, token_nll

CONFIG = SteerConfig(
    feature=("3=6", "8=-2"), prompt=("w5 w6 w7", "w9"), units="raw", max_new_tokens=6
)  # fmt: skip


def test_comparison_by_hand(lm: LanguageModel) -> None:
    sae = toy_sae()
    got = steer_and_compare(lm, sae, CONFIG)
    assert [p.unsteered for p in got.pairs] == lm.generate(list(CONFIG.prompt), max_new_tokens=6).completions
    with Steerer(lm).features(sae, {3: 6.0, 8: -2.0}):
        out = lm.generate(CONFIG.prompt[1], max_new_tokens=6)
        steered = lm.logits(out.tokens)[0]
    assert got.pairs[1].steered == out.completions[0] != got.pairs[1].unsteered
    base = lm.logits(out.tokens)[0]
    p, q = steered.softmax(-1), base.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)[1:-1]  # predictions of the generated tokens
    nll = -q[:-1].log().gather(1, out.tokens[0, 1:, None])[1:, 0]
    assert got.pairs[1].kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert got.pairs[1].kl_p95 == pytest.approx(float(kl.quantile(0.95)), rel=1e-3)
    assert got.pairs[1].nll == pytest.approx(float(nll.mean()), rel=1e-3)
    assert got.edit is not None
    assert got.edit.features[0].achieved > got.edit.features[0].before


def test_scope_decides_where_the_kl_begins(lm: LanguageModel) -> None:
    sae, ids = toy_sae(), torch.tensor([[0, 5, 6, 7, 9, 10]])
    with Steerer(lm).features(sae, {3: 6.0}, scope="generation"):
        kl = token_kl(lm.logits(ids, prompt_length=4), lm.logits(ids, prompt_length=6))[0]
        assert torch.count_nonzero(kl) == 2  # only where the two declared prompts differ
    clean = lm.logits(ids)
    with Steerer(lm).features(sae, {3: 6.0}, scope="generation"):
        kl = token_kl(lm.logits(ids, prompt_length=4), clean)[0]
    assert torch.equal(kl[:4], torch.zeros(4))
    assert (kl[4:] > 0).all()


def test_neutral_edit_costs_nothing(lm: LanguageModel) -> None:
    got = steer_and_compare(lm, toy_sae(), replace(CONFIG, feature=("3=0",)))
    assert got.kl_mean == got.kl_p95 == 0.0
    assert all(p.steered == p.unsteered and p.nll == p.unsteered_nll for p in got.pairs)
    assert got.edit is None
    assert "no token was steered" in got.to_text()


def test_rendering(lm: LanguageModel) -> None:
    got = steer_and_compare(lm, toy_sae(), CONFIG)
    table = got.to_text(width=80)
    assert "unsteered" in table
    assert "KL per token" in table
    assert all(len(line) <= 80 for line in table.splitlines() if " | " in line)
    data: dict[str, Any] = json.loads(got.to_json())
    assert data["pairs"][0]["prompt"] == "w5 w6 w7"
    assert data["edit"]["features"][0]["feature"] == 3
    single = steer_and_compare(lm, toy_sae(), replace(CONFIG, compare=False, prompt=("w5",)))
    assert single.pairs[0].unsteered is single.pairs[0].unsteered_nll is None
    assert " | " not in single.to_text()


def test_default_prompt(lm: LanguageModel) -> None:
    got = steer_and_compare(lm, toy_sae(), replace(CONFIG, prompt=()))
    assert [p.prompt for p in got.pairs] == ["Once upon a time"]


def test_sampling_is_seeded(lm: LanguageModel) -> None:
    config = replace(CONFIG, temperature=1.5, top_p=0.9, seed=4)
    assert steer_and_compare(lm, toy_sae(), config) == steer_and_compare(lm, toy_sae(), config)
    neutral = steer_and_compare(lm, toy_sae(), replace(config, feature=("3=0",)))
    assert neutral.pairs[0].steered == neutral.pairs[0].unsteered
    with pytest.raises(SteersmanError, match="top_p needs a temperature"):
        steer_and_compare(lm, toy_sae(), replace(CONFIG, top_p=0.9))


@pytest.mark.parametrize("text", ["12.5", "a=1", "12=", "1.5=2", "=3", "a"])
def test_wrong_features(text: str) -> None:
    with pytest.raises(SteersmanError, match="not of the form id or id=value"):
        parse_features((text,))


def test_parse_features() -> None:
    assert parse_features(("12=8", "40=-2.5", "7")) == {12: 8.0, 40: -2.5, 7: 1.0}
    with pytest.raises(SteersmanError, match="given twice"):
        parse_features(("12=8", "12=3"))
    with pytest.raises(SteersmanError, match="no feature"):
        parse_features(())


def test_measures() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 9, generator=g), torch.randn(2, 4, 9, generator=g)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    torch.testing.assert_close(token_kl(a, b), expected)
    ids = torch.randint(0, 9, (2, 4), generator=g)
    nll = torch.nn.functional.cross_entropy(a[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(token_nll(a, ids), nll)
    assert repetition_rate([1, 2, 3]) == 0
    assert repetition_rate([7] * 8) == pytest.approx(0.8)
    assert distinct([7] * 5) == 0.25
    assert distinct([1]) == 1
