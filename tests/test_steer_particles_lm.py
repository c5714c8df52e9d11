"""Particles of language models: exact targets by enumeration, caches that follow their particles, steering, costs."""

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.tiny_models import D, V, build, count_hooks, toy_sae, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Steerer
from steersman.steer.decoding import (
    Constraint,
    Critic,
    FeaturePotential,
    Mix,
    MixSource,
    Multinomial,
    NoRepeat,
    ParticleConfig,
    ParticleSet,
    Potential,
    Reward,
    RolloutValue,
    StatePotential,
    WithoutReplacement,
    best_of_n,
    particles,
)

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["w5 w6 w7 w8", "w9"]
IDS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module", autouse=True)
def nothing_ends(lm: LanguageModel) -> Iterator[None]:
    """No end token, so that texts of three tokens are all there are; tests that want one set it."""
    before, lm.model.generation_config.eos_token_id = lm.model.generation_config.eos_token_id, None
    yield
    lm.model.generation_config.eos_token_id = before


def log_prior(lm: LanguageModel, prompt: str, texts: list[tuple[int, ...]]) -> Tensor:
    """[n] log-probability of each continuation, from passes without a cache."""
    start = lm.token_ids(prompt, bos=True)
    ids = torch.tensor([[*start, *text] for text in texts])
    log_p = lm.logits(ids).double().log_softmax(-1)[:, len(start) - 1 : -1]
    return log_p.gather(2, ids[:, len(start) :, None])[..., 0].sum(1)


def some(prefix: tuple[int, ...]) -> list[int]:
    return IDS


def count_5(completions: list[str]) -> list[float]:
    return [float(text.split().count("w5")) for text in completions]


def shares(found: ParticleSet) -> dict[tuple[int, ...], float]:
    out: dict[tuple[int, ...], float] = {}
    for text, p in zip(found.tokens, found.probabilities.tolist()):
        out[text] = out.get(text, 0.0) + p
    return out


@pytest.mark.parametrize("resampler", ["multinomial", WithoutReplacement(3), "never"])
def test_the_posterior_of_a_model_is_that_of_enumeration(lm: LanguageModel, resampler: Any) -> None:
    texts = list(itertools.product(IDS, repeat=3))
    sets = particles(
        lm, PROMPTS, mask=some, potential=Reward(count_5, 1.5), n=1500, max_new_tokens=3, resampler=resampler
    )
    for prompt, found in zip(PROMPTS, sets):
        prior = log_prior(lm, prompt, texts)
        weight = prior + 1.5 * torch.tensor([text.count(5) for text in texts])
        target = dict(zip(texts, weight.softmax(0).tolist()))
        got = shares(found)
        assert 0.5 * sum(abs(got.get(text, 0) - p) for text, p in target.items()) < 0.13
        assert found.log_z == pytest.approx(float(weight.logsumexp(0)), abs=0.3)
        known = dict(zip(texts, prior.tolist()))
        assert found.log_prior.tolist() == pytest.approx([known[text] for text in found.tokens], abs=1e-4)


def test_weights_without_resampling_are_the_masses_of_the_mask(lm: LanguageModel) -> None:
    [found] = particles(lm, PROMPTS[0], mask=some, n=4, max_new_tokens=3, resampler="never")
    start = lm.token_ids(PROMPTS[0], bos=True)
    for text, w in zip(found.tokens, found.log_weights.tolist()):
        ids = torch.tensor([[*start, *text]])
        mass = lm.logits(ids).double().softmax(-1)[0, len(start) - 1 : -1, IDS].sum(1).log().sum()
        assert w == pytest.approx(float(mass), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("resampler", [Multinomial(1.0), WithoutReplacement(3)])
def test_a_batch_of_prompts_equals_them_one_by_one(family: str, resampler: Any) -> None:
    """Left padding and neighbours change nothing; caches follow their particles through resampling."""
    lm = with_text(family)
    settings: dict[str, Any] = {"n": 6, "max_new_tokens": 6, "mask": some, "resampler": resampler}
    together = particles(lm, PROMPTS, potential=Reward(count_5, 2.0), seed=3, **settings)
    for i, prompt in enumerate(PROMPTS):
        [alone] = particles(lm, prompt, potential=Reward(count_5, 2.0), seed=3 + i, **settings)
        assert alone.tokens == together[i].tokens
        assert torch.allclose(alone.log_weights, together[i].log_weights, atol=1e-4)
        prior = log_prior(lm, prompt, together[i].tokens)
        assert torch.allclose(together[i].log_prior, prior, atol=1e-4)
        assert len(together[i].roots.unique()) < 6
    assert together[0].prompt == PROMPTS[0]
    assert together[1].texts == [PROMPTS[1] + text for text in together[1].completions]
    assert together[0].completions == [" " + " ".join(f"w{t}" for t in text) for text in together[0].tokens]


def test_end_tokens_end_a_particle() -> None:
    lm = with_text("llama")
    [found] = particles(lm, "w5", n=12, max_new_tokens=5, mask=lambda prefix: [1, 5, 6], seed=2)
    assert bool(found.ended.any())
    for text, over in zip(found.tokens, found.ended.tolist()):
        assert over == (text[-1] == 1)
        assert 1 not in text[:-1]
        assert len(text) == 5 or over


# Steering


def test_steering_around_the_call_steers_the_target(lm: LanguageModel) -> None:
    st, v = Steerer(lm), torch.randn(D, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"n": 4, "max_new_tokens": 4, "mask": some}
    plain = particles(lm, PROMPTS, **settings)
    with st.vector(v, hook=HOOK, scale=0.0):
        same = particles(lm, PROMPTS, **settings)
    for a, b in zip(plain, same):
        assert a.tokens == b.tokens
        assert torch.equal(a.log_weights, b.log_weights)
    with st.vector(v, hook=HOOK, scale=[0.0, 6.0]) as steering:  # one number per prompt
        rows = particles(lm, PROMPTS, **settings)
    assert rows[0].tokens == plain[0].tokens
    assert torch.allclose(rows[0].log_weights, plain[0].log_weights, atol=1e-5)
    assert not torch.allclose(rows[1].log_weights, plain[1].log_weights, atol=1e-2)
    assert steering.trace.count > 0
    with st.vector(v, hook=HOOK, scale=6.0):
        prior = log_prior(lm, PROMPTS[1], rows[1].tokens)
    assert torch.allclose(rows[1].log_prior, prior, atol=1e-4)
    assert count_hooks(lm.model) == 0


def test_a_steered_proposal_leaves_the_unsteered_model_as_target(lm: LanguageModel) -> None:
    st, v = Steerer(lm), torch.randn(D, generator=torch.Generator().manual_seed(0))
    texts = list(itertools.product(IDS, repeat=2))
    prior = log_prior(lm, PROMPTS[0], texts)
    target = dict(zip(texts, prior.softmax(0).tolist()))
    [found] = particles(
        lm,
        PROMPTS[0],
        mask=some,
        guide=lambda: st.vector(v, hook=HOOK, scale=1.5, scope="generation"),
        n=800,
        max_new_tokens=2,
        resampler="never",
    )
    got = shares(found)
    assert 0.5 * sum(abs(got.get(text, 0) - p) for text, p in target.items()) < 0.12
    assert found.log_z == pytest.approx(float(prior.logsumexp(0)), abs=0.2)
    assert found.log_prior.tolist() == pytest.approx(log_prior(lm, PROMPTS[0], found.tokens).tolist(), abs=1e-4)
    assert found.cost.forward_passes == 2 * 2  # two streams, the prompt and one token each
    assert not torch.allclose(found.log_weights, found.log_weights[0])


def test_a_mixture_proposes_and_the_model_stays_the_target(lm: LanguageModel) -> None:
    mix = Mix([(1.6, MixSource()), (-0.6, MixSource(prompts="w40 w41"))], plausible=None)
    texts = list(itertools.product(IDS, repeat=2))
    prior = log_prior(lm, PROMPTS[0], texts)
    target = dict(zip(texts, prior.softmax(0).tolist()))
    sets = particles(lm, PROMPTS, mask=some, guide=mix, n=800, max_new_tokens=2)
    got = shares(sets[0])
    assert 0.5 * sum(abs(got.get(text, 0) - p) for text, p in target.items()) < 0.15
    assert sets[0].log_z == pytest.approx(float(prior.logsumexp(0)), abs=0.2)
    for prompt, found in zip(PROMPTS, sets):
        assert torch.allclose(found.log_prior, log_prior(lm, prompt, found.tokens), atol=1e-4)
    assert sets[0].cost.forward_passes == 3 * 2
    assert count_hooks(lm.model) == 0


# Potentials


@pytest.mark.parametrize(("reduce", "of"), [("sum", Tensor.sum), ("mean", Tensor.mean), ("max", Tensor.amax)])
def test_states_are_read_as_the_particle_goes(lm: LanguageModel, reduce: Any, of: Any) -> None:
    potential = StatePotential(HOOK, lambda h: h[:, 3], 0.5, reduce=reduce)
    sets = particles(lm, PROMPTS, mask=some, potential=potential, n=5, max_new_tokens=4)
    for prompt, found in zip(PROMPTS, sets):
        start = lm.token_ids(prompt, bos=True)
        for text, a in zip(found.tokens, found.log_potential.tolist()):
            states = lm.capture(torch.tensor([[*start, *text]]), hooks=HOOK)[HOOK][0, len(start) :]
            assert a == pytest.approx(0.5 * float(of(states[:, 3], 0)), abs=1e-4)
        assert found.cost.forward_passes == 5  # the last token is read too


def test_a_feature_of_an_sae_is_a_potential(lm: LanguageModel) -> None:
    sae = toy_sae(HOOK, lm.name)
    with torch.no_grad():
        sae.b_enc += 0.5
    potential = FeaturePotential(sae, 7, 2.0)
    plain = particles(lm, PROMPTS[0], mask=some, n=64, max_new_tokens=4, resampler="never")[0]
    [found] = particles(lm, PROMPTS[0], mask=some, potential=potential, n=64, max_new_tokens=4)

    def activation(texts: list[tuple[int, ...]]) -> list[float]:
        start = lm.token_ids(PROMPTS[0], bos=True)
        ids = torch.tensor([[*start, *text] for text in texts])
        return sae.encode(lm.capture(ids, hooks=HOOK)[HOOK][:, len(start) :])[..., 7].sum(1).tolist()

    assert found.log_potential.tolist() == pytest.approx([2.0 * a for a in activation(found.tokens)], abs=1e-3)
    assert found.mean(activation(found.tokens)) > plain.mean(activation(plain.tokens)) + 0.1
    with pytest.raises(SteersmanError, match="feature 40 does not exist"):
        FeaturePotential(sae, 40)
    with pytest.raises(SteersmanError, match="made for 'elsewhere'"):
        particles(lm, "w5", potential=FeaturePotential(toy_sae(HOOK, "elsewhere"), 7), n=2)


def test_rollouts_estimate_the_exact_critic(lm: LanguageModel) -> None:
    potential = RolloutValue(lm, count_5, 2.0, rollouts=400, tokens=1)
    start = lm.token_ids(PROMPTS[0], bos=True)
    seen: list[tuple[Any, Tensor]] = []
    value = potential.value

    def noted(candidates: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
        out = value(candidates, memory)
        seen.append((candidates.prefixes, out[0]))
        return out

    potential.value = noted  # pyright: ignore[reportAttributeAccessIssue]
    [found] = particles(lm, PROMPTS[0], mask=some, potential=potential, n=3, max_new_tokens=2)
    prefixes, a = seen[0]
    for prefix, got in zip(prefixes, a.tolist()):
        p = lm.logits(torch.tensor([[*start, *prefix]]))[0, -1].softmax(-1)
        exact = 2.0 * prefix.count(5) + math.log(1 + float(p[5]) * (math.exp(2.0) - 1))
        assert got == pytest.approx(exact, abs=0.25)
    assert found.log_potential.tolist() == [2.0 * text.count(5) for text in found.tokens]
    assert found.cost.rows >= 400
    assert found.cost.reward_calls > 3


def test_best_of_n_asks_once_for_each_text(lm: LanguageModel) -> None:
    calls: list[str] = []

    def reward(texts: list[str]) -> list[float]:
        calls.extend(texts)
        return [float(len(set(text.split()))) for text in texts]

    sets = best_of_n(lm, PROMPTS, reward, 8, max_new_tokens=5, temperature=0.7, mask=some)
    assert len(calls) == sets[0].cost.reward_calls <= 16
    for found in sets:
        assert found.effective_size <= 8
        best = found.best()
        assert len(set(found.tokens[best])) == max(len(set(text)) for text in found.tokens)
        assert len(found.roots.unique()) == 8


# A critic that reads states


class Reads(Critic):
    """V = exp(one coordinate of the state after the candidate)."""

    hook = HOOK

    def __init__(self, top: int | None) -> None:
        self.top = top
        self.seen: list[tuple[list[tuple[int, ...]], Tensor, Tensor]] = []

    def log_values(self, prefixes: Any, candidates: Tensor, states: Tensor | None) -> Tensor:
        assert states is not None
        self.seen.append((prefixes, candidates, states))
        return states[..., 2].double()


def test_a_critic_sees_the_states_after_every_candidate_in_one_pass(lm: LanguageModel) -> None:
    critic = Reads(4)
    sets = particles(lm, PROMPTS, mask=some, critic=critic, n=3, max_new_tokens=4, resampler="multinomial")
    for step, (prefixes, candidates, states) in enumerate(critic.seen):
        assert candidates.shape == (6, 4)
        for row in range(6):
            start = lm.token_ids(PROMPTS[row // 3], bos=True)
            assert len(prefixes[row]) == step
            ids = torch.tensor([[*start, *prefixes[row], x] for x in candidates[row].tolist()])
            assert torch.allclose(lm.capture(ids, hooks=HOOK)[HOOK][:, -1], states[row], atol=1e-4)
    assert sets[0].cost.forward_passes == 1 + 4
    assert sets[0].cost.rows == 2 + 4 * 6 * 4
    for prompt, found in zip(PROMPTS, sets):
        assert torch.allclose(found.log_prior, log_prior(lm, prompt, found.tokens), atol=1e-4)
    exact = particles(lm, PROMPTS, critic=Reads(None), mask=some, n=600, max_new_tokens=2)[0]
    texts = list(itertools.product(IDS, repeat=2))
    target = dict(zip(texts, log_prior(lm, PROMPTS[0], texts).softmax(0).tolist()))
    got = shares(exact)
    assert 0.5 * sum(abs(got.get(text, 0) - p) for text, p in target.items()) < 0.12  # the twist is taken back


# Masks of tokens


def test_no_n_gram_comes_twice(lm: LanguageModel) -> None:
    [found] = particles(lm, "w5", mask=NoRepeat(2, V), n=6, max_new_tokens=20, temperature=0.3)
    for text in found.tokens:
        pairs = list(itertools.pairwise(text))
        assert len(pairs) == len(set(pairs))
    assert NoRepeat(1, 5).allowed((3, 1), 9).tolist() == [True, False, True, False, True]
    assert bool(NoRepeat(4, 5).allowed((3, 1), 9).all())


# Mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"particles": 3}, "unknown setting 'particles'"),
        ({"n": 0}, "n must be at least 1"),
        ({"max_new_tokens": 60}, "exceed the context"),
        ({"mask": 7}, "a mask is a regular expression"),
        ({"potential": [len]}, "a potential is an object"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 prompts"),
        ({"mask": "(?=w5)w6"}, "looking ahead or behind"),
        ({"mask": "w5("}, "is no regular expression"),
        ({"potential": Constraint(lambda text: False), "max_new_tokens": 2}, "the constraint <lambda> leaves none"),
        ({"corrected": False, "guide": nullcontext}, "corrected=False has no meaning"),
        ({"temperature": 0.0}, "corrected=False"),
        ({"potential": StatePotential("blocks.9.hook_resid_post", lambda h: h[:, 0])}, "layer"),
    ],
)
def test_mistakes_get_one_line(lm: LanguageModel, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message) as caught:
        particles(lm, "w5 w6", **{"n": 2, "max_new_tokens": 3, **given})
    assert "\n" not in str(caught.value)
    assert count_hooks(lm.model) == 0


def test_an_encoder_is_refused_and_a_config_takes_keywords(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match="tokenizer|decoder"):
        particles(build("bert"), "w5")
    [found] = particles(lm, "w5", config=ParticleConfig(n=3, max_new_tokens=2), n=5)
    assert len(found) == 5
    assert max(map(len, found.tokens)) == 2


def test_a_potential_from_outside_is_used(lm: LanguageModel) -> None:
    class Late(Potential):
        """exp(1) for each token above 6, remembered one by one."""

        numbers = 1

        def value(self, candidates: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
            new = memory[:, 0] + torch.tensor([float(prefix[-1] > 6) for prefix in candidates.prefixes])
            return new, new[:, None]

    [found] = particles(lm, "w5", mask=some, potential=Late(), n=8, max_new_tokens=4)
    assert found.log_potential.tolist() == [sum(t > 6 for t in text) for text in found.tokens]
