"""A trained critic against the exact one, and evolution over instructions as beam search over blocks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import with_text

from steersman.demo import MODEL_PATH
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.decoding import (
    CriticConfig,
    DarwinConfig,
    ParticleConfig,
    Reward,
    TrainedCritic,
    Truncation,
    darwin,
    particles,
    train_critic,
)
from steersman.steer.decoding.critic import td_returns

GOOD = {f"w{i}" for i in range(4, 24)}


@pytest.fixture(scope="module", autouse=True)
def quiet(lm: LanguageModel) -> None:
    """Texts of a fixed length."""
    lm.model.generation_config.eos_token_id = None


def reward(completions: list[str]) -> list[float]:
    return [float(sum(word in GOOD for word in text.split())) for text in completions]


@pytest.fixture(scope="module")
def critic(lm: LanguageModel) -> TrainedCritic:
    return train_critic(
        lm, ["w30", "w31 w32"], reward, new_tokens=2, rounds=25, batch_size=192, hidden=64, lr=0.02, td_lambda=1.0
    )


def exact_log_values(lm: LanguageModel, prompt: str) -> torch.Tensor:
    """[V] log E[exp(r) | prompt and one token], for every token."""
    start = lm.token_ids(prompt, bos=True)
    vocabulary = lm.hook_width("logits")
    good = torch.tensor([float(4 <= i < 24) for i in range(vocabulary)])
    ids = torch.tensor([[*start, x] for x in range(vocabulary)])
    p = lm.logits(ids)[:, -1].softmax(-1)
    return good + (p * good.exp()).sum(1).log()


def test_a_trained_critic_agrees_with_the_exact_one(lm: LanguageModel, critic: TrainedCritic) -> None:
    for prompt in ("w30", "w31 w32"):
        exact = exact_log_values(lm, prompt)
        start = lm.token_ids(prompt, bos=True)
        ids = torch.tensor([[*start, x] for x in range(len(exact))])
        states = lm.capture(ids, hooks=str(critic.hook))[str(critic.hook)][:, -1]
        found = critic.log_value(states)
        p = lm.logits(torch.tensor([start]))[0, -1].softmax(-1)
        seen = p > 1 / 500  # tokens that the rollouts came to
        assert torch.corrcoef(torch.stack([found[seen], exact[seen]]))[0, 1] > 0.8
    assert critic.history[-1] < critic.history[0]


def test_its_proposal_raises_the_reward_and_potentials_make_it_exact(lm: LanguageModel, critic: TrainedCritic) -> None:
    settings: dict[str, Any] = {"n": 400, "max_new_tokens": 2, "seed": 1}
    critic.top = lm.hook_width("logits")
    try:
        [plain] = particles(lm, "w30", resampler="never", **settings)
        [twisted] = particles(lm, "w30", critic=critic, resampler="never", **settings)
        [exact] = particles(lm, "w30", critic=critic, potential=Reward(reward), resampler="never", **settings)
        [unguided] = particles(lm, "w30", potential=Reward(reward), resampler="never", **settings)
    finally:
        critic.top = 10
    start = lm.token_ids("w30", bos=True)
    first = lm.logits(torch.tensor([start]))[0, -1].double().softmax(-1)
    z = float((first * exact_log_values(lm, "w30").double().exp()).sum())
    mean = sum(reward(plain.completions)) / 400
    assert sum(reward(twisted.completions)) / 400 > mean + 0.15
    assert twisted.mean(reward(twisted.completions)) == pytest.approx(mean, abs=0.2)  # its weights undo it
    assert exact.log_z == pytest.approx(math.log(z), abs=0.05)
    assert exact.effective_size > 340 > unguided.effective_size + 20


def test_a_critic_has_a_file(lm: LanguageModel, critic: TrainedCritic, tmp_path: Path) -> None:
    critic.save(tmp_path / "critic.safetensors")
    again = TrainedCritic.load(tmp_path / "critic.safetensors")
    states = torch.randn(3, 4, lm.d_model)
    assert torch.equal(again.log_value(states), critic.log_value(states))
    assert again.config == critic.config
    assert (again.model_name, again.hook, again.top) == (lm.name, critic.hook, critic.top)
    with pytest.raises(SteersmanError, match="critic was made for 'llama', the model is 'gpt2'"):
        particles(with_text("gpt2"), "w5", critic=again, n=1, max_new_tokens=2)
    critic.history.clear()
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(SteersmanError, match=r"other\.safetensors"):
        TrainedCritic.load(tmp_path / "other.safetensors")


def test_the_authors_value_is_a_sigmoid(lm: LanguageModel) -> None:
    critic = train_critic(lm, "w30", reward, new_tokens=2, rounds=2, batch_size=16, value="logit", gamma=0.99)
    states = torch.randn(5, lm.d_model)
    assert torch.allclose(critic.log_value(states), torch.nn.functional.logsigmoid(critic.raw(states)))
    [found] = particles(
        lm, "w30", critic=critic, n=1, max_new_tokens=4, temperature=0.0, corrected=False, resampler="never"
    )
    assert len(found.tokens[0]) == 4


def test_td_returns_at_both_ends_of_lambda() -> None:
    value, y, last = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([10.0, 20.0]), torch.tensor([2, 1])
    assert td_returns(value, y, last, 1.0, 1.0).tolist() == [[10.0, 10.0, 10.0], [20.0, 20.0, 20.0]]
    assert td_returns(value, y, last, 0.5, 0.0)[:, 0].tolist() == [1.0, 2.5]
    assert td_returns(value, y, last, 0.5, 1.0)[:, 0].tolist() == [2.5, 10.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gamma": 0.0}, "gamma"), ({"td_lambda": 2.0}, "td_lambda"), ({"rounds": 0}, "rounds"), ({"steps": 1}, "steps")],
)
def test_wrong_settings_of_a_critic(lm: LanguageModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        train_critic(lm, "w30", reward, **settings)
    assert CriticConfig().top == 10


# DARWIN


def test_one_instruction_is_beam_search_over_blocks(lm: LanguageModel) -> None:
    """The same particles as those of one prompt whose caches are copied, token for token."""
    found = darwin(
        lm, "w5 w6", reward, iterations=1, variants=0, beams=6, block=3, keep=2, max_new_tokens=9, top_k=None, seed=4
    )
    [beams] = particles(
        lm,
        "w5 w6",
        potential=Reward(reward),
        resampler=Truncation(2),
        config=ParticleConfig(n=6, max_new_tokens=9, every=3, temperature=0.7, corrected=False, seed=4),
    )
    assert found.sets[0].tokens == beams.tokens
    assert torch.equal(found.sets[0].ancestors, beams.ancestors)
    assert found.best == beams.completions[beams.best()]
    assert found.reward == reward([found.best])[0] == float(beams.log_potential.max())
    assert found.sets[0].log_z is None
    assert found.archive == ["w5 w6"]
    assert found.cost.reward_calls == beams.cost.reward_calls


def test_texts_go_between_instructions_as_tokens_and_the_cost_is_exact(lm: LanguageModel) -> None:
    asked: list[str] = []

    def counted(texts: list[str]) -> list[float]:
        asked.extend(texts)
        return reward(texts)

    def mutate(instruction: str, n: int, seed: int) -> list[str]:
        return [f"{instruction} w{10 + seed + i}" for i in range(n)]

    passes = []
    handle = lm.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        found = darwin(
            lm,
            "w5",
            counted,
            mutate=mutate,
            second=lambda texts: [float(len(text)) for text in texts],
            config=DarwinConfig(iterations=2, variants=2, beams=2, block=2, keep=1, max_new_tokens=6, seed=0),
        )
    finally:
        handle.remove()
    assert found.cost.forward_passes == len(passes)
    assert found.cost.reward_calls == len(asked)
    assert found.second == len(found.best)
    assert found.reward == max(float(one.log_potential.max()) for one in found.sets)
    assert found.instructions[0] == ["w5", "w5 w10", "w5 w11"]
    assert 1 <= len(found.archive) <= 2
    assert set(found.archive) <= set(found.instructions[1])
    for one in found.sets:
        assert len(one) == 6
        assert one.prompt == "w5"  # rewards and texts are those of the original instruction
        assert len({text[:4] for text in one.tokens}) == 1  # one text was kept, whatever the instruction
        assert one.log_potential.tolist() == reward(one.completions)


def test_without_a_function_the_model_is_asked_for_variants(lm: LanguageModel) -> None:
    demo = LanguageModel.load(str(MODEL_PATH))
    found = darwin(demo, "One day", reward, iterations=1, variants=2, beams=1, block=2, max_new_tokens=2, seed=1)
    assert len(found.instructions[0]) == 3
    assert found.cost.forward_passes > 2
    with pytest.raises(SteersmanError, match="must return 2 instructions"):
        darwin(lm, "w5", reward, mutate=lambda *_: ["w6"], variants=2)
    with pytest.raises(SteersmanError, match="beams must be at least 1"):
        darwin(lm, "w5", reward, beams=0)
