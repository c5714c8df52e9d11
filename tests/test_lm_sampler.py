"""Wide sampling: the drawn distribution, agreement with `generate` and with plain passes, rows that are their own."""

from typing import Any

import pytest
import torch
from support.tiny_models import D, count_hooks, with_text

from steersman.errors import SteersmanError
from steersman.lm.sampler import Sampler
from steersman.lm.sampling import Sampling, largest
from steersman.steer import Steerer

HOOK = "blocks.1.hook_resid_post"
T = 6


def nucleus(p: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """The distribution that temperature, top-k and top-p leave, by sorting in the plainest way."""
    kept = torch.zeros_like(p)
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))[:top_k]
    total = sum(float(p[i]) for i in order)
    before = 0.0
    for i in order:
        if top_p is None or before < top_p * total:
            kept[i] = p[i]
        before += float(p[i])
    return kept / kept.sum()


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.6), (5, 0.7), (1, None), (50, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_have_the_asked_distribution(top_k: int | None, top_p: float | None, temperature: float) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(3)) * 2
    n = 20_000
    u = (torch.arange(n) + 0.5) / n  # an even grid: frequencies are the probabilities, to within a cell
    drawn = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).draw(logits.expand(n, -1), u)
    found = torch.bincount(drawn, minlength=9) / n
    expected = nucleus((logits / temperature).softmax(-1), top_k, top_p)
    assert float((found - expected).abs().max()) < 2e-4


@pytest.mark.parametrize("rows", [5, 64, 301])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_largest_are_those_of_topk(rows: int, k: int) -> None:
    x = torch.randn(rows, 90, generator=torch.Generator().manual_seed(0))
    values, columns = largest(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(columns, x.topk(k).indices)
    x[:, 3:60] = 0.5  # ties: any of them, each once
    values, columns = largest(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x.gather(1, columns), values)
    assert all(len(row.unique()) == k for row in columns)


def test_the_ends_of_the_unit_interval_are_safe() -> None:
    logits = torch.full((2, 4), -1e4)
    logits[:, 2] = 0
    edge = torch.tensor([0.0, 1.0 - 2**-24])
    for sampling in (Sampling(), Sampling(top_k=2), Sampling(top_p=0.5)):
        assert sampling.draw(logits, edge).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("settings", "said"), [({"temperature": 0.0}, "above 0"), ({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p")]
)
def test_settings_that_cannot_be(settings: dict, said: str) -> None:
    with pytest.raises(SteersmanError, match=said):
        Sampling(**settings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "opt", "bloom", "falcon", "gpt_neox"])
def test_the_likeliest_tokens_are_those_of_greedy_generate(family: str) -> None:
    lm = with_text(family)
    prompts = ["w5 w6 w7", "w9", "w10 w11"]
    made = lm.generate(prompts, max_new_tokens=T)
    sampler = Sampler(lm, lm.encode(prompts, padding_side="left"), Sampling(top_k=1), T)
    tokens, real = sampler.run(torch.arange(3), torch.tensor([2, 0, 1, 0]), torch.rand(4, T))
    for row, prompt in enumerate([2, 0, 1, 0]):
        assert torch.equal(real[row], made.new_mask[prompt])
        assert torch.equal(tokens[row][real[row].bool()], made.new_tokens[prompt][made.new_mask[prompt].bool()])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    lm = with_text("llama")
    sampler = Sampler(lm, lm.encode(["w5 w6", "w7"], padding_side="left"), Sampling(), T)
    u = torch.rand(7, T, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    whole, _ = sampler.run(torch.arange(2), index, u)
    for some in ([3], [6, 1, 2], [0, 4]):
        part, _ = sampler.run(torch.arange(2), index[some], u[some])
        assert torch.equal(part, whole[some])


@pytest.mark.parametrize("padded", [False, True])
def test_observed_states_are_those_of_the_unsteered_model(padded: bool) -> None:
    lm = with_text("llama")
    prompts = lm.encode(["w5 w6 w8", "w7"] if padded else ["w5", "w7"], padding_side="left")
    sampler = Sampler(lm, prompts, Sampling(), T)
    v = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0, 1, 2, 3, 3])
    seen: list[torch.Tensor] = []
    st = Steerer(lm)
    tokens, real = sampler.run(
        torch.tensor([0, 1, 0, 1]),
        index,
        torch.rand(5, T, generator=torch.Generator().manual_seed(2)),
        prefix_context=st.vector(v, scale=3.0, hook=HOOK),
        row_context=st.vector(v[index], scale=3.0, hook=HOOK),
        observe=(HOOK, lambda step, h, going: seen.append(h * going[:, None])),
    )
    assert count_hooks(lm.model) == 0
    assert len(seen) == T
    prompt = torch.tensor([0, 1, 0, 1, 1])
    text = torch.cat([prompts.input_ids[prompt], tokens], dim=1)
    mask = torch.cat([prompts.attention_mask[prompt], real], dim=1)
    h = lm.capture(text, mask, hooks=[HOOK])[HOOK][:, -T:]
    on = (real.bool() & (tokens != 1))[..., None]
    torch.testing.assert_close(torch.stack(seen, 1) * on, h * on, atol=1e-5, rtol=1e-5)


def test_steering_the_rows_is_steering_generate() -> None:
    lm = with_text("llama")
    prompts = ["w5 w6 w8", "w7 w9"]
    v = torch.randn(2, D, generator=torch.Generator().manual_seed(1)) * 3
    with Steerer(lm).vector(v, hook=HOOK):
        made = lm.generate(prompts, max_new_tokens=T)
    st = Steerer(lm)
    sampler = Sampler(lm, lm.encode(prompts, padding_side="left"), Sampling(top_k=1), T)
    steered: Any = {"prefix_context": st.vector(v, hook=HOOK), "row_context": st.vector(v, hook=HOOK)}
    tokens, real = sampler.run(torch.arange(2), torch.arange(2), torch.rand(2, T), **steered)
    assert torch.equal(tokens[real.bool()], made.new_tokens[made.new_mask.bool()])
    plain, _ = sampler.run(torch.arange(2), torch.arange(2), torch.rand(2, T))
    assert not torch.equal(plain, tokens)


def test_texts_end_at_the_end_token() -> None:
    lm = with_text("llama")
    sampler = Sampler(lm, lm.encode(["w5"]), Sampling(temperature=5.0), 16)
    tokens, real = sampler.run(
        torch.zeros(1, dtype=torch.long), torch.zeros(300, dtype=torch.long), torch.rand(300, 16)
    )
    ended = (real == 0).any(1)
    assert ended.any()
    for row, on in zip(tokens[ended], real[ended].bool()):
        assert row[on][-1] == 1
        assert not (row[on][:-1] == 1).any()
        assert (row[~on] == 3).all()


def test_wrong_requests_have_one_line() -> None:
    lm = with_text("llama")
    with pytest.raises(SteersmanError, match="exceed the context"):
        Sampler(lm, lm.encode(["w5"]), Sampling(), 40)
    with pytest.raises(SteersmanError, match="padded on the left"):
        Sampler(lm, lm.encode(["w5 w6", "w7"], padding_side="right"), Sampling(), 2)
    with pytest.raises(SteersmanError, match="new_tokens"):
        Sampler(lm, lm.encode(["w5"]), Sampling(), 0)
