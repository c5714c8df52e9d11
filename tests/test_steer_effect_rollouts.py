"""Averages over rollouts: against exact expectations, plain second readings, and their own standard errors."""

import pytest
import torch
import transformers
from support.effect_toys import HOOK, quick, toy
from support.tiny_models import LLAMA, D, V
from torch import Tensor

from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer.effects.rollouts import BASE, RolloutMeter, Sums, uniforms
from steersman.steer.steerer import Steerer


def exact_first_token(lm: LanguageModel, sae: SAE, prompts: tuple[str, ...], delta: Tensor) -> Tensor:
    """The expected average activation [L] over one new token, from the whole next-token distribution."""
    total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    weight = 0.0
    for prompt in prompts:
        ids = lm.encode([prompt]).input_ids
        with Steerer(lm).vector(delta, hook=HOOK):
            p = lm.logits(ids)[0, -1].softmax(-1).double()
        p[1] = 0  # the end token counts nowhere
        every = torch.cat([ids.expand(V, -1), torch.arange(V)[:, None]], dim=1)
        code = sae.encode(lm.capture(every, hooks=[HOOK])[HOOK][:, -1]).double()
        total += p @ code
        weight += float(p.sum())
    return total / weight


def test_rollouts_come_to_the_exact_expectation() -> None:
    lm, sae = toy()
    config = quick(rollouts=4000, new_tokens=1, batch_rows=2000)
    meter = RolloutMeter(lm, sae, HOOK, config)
    vectors = torch.nn.functional.normalize(torch.randn(3, D, generator=torch.Generator().manual_seed(4)), dim=1)
    scales = torch.tensor([1.0, 3.0, 0.0])
    found = meter.measure(vectors, scales, [0, 1, 2], config.rollouts, seed=0)
    for i in range(3):
        exact = exact_first_token(lm, sae, config.prompts, scales[i] * vectors[i])
        z = (found.mean[i] - exact).abs() / found.standard_error[i].clamp_min(1e-6)
        assert float(z.max()) < 4.5
        assert float(z.mean()) < 1.1
        assert float((found.mean[i] - exact).abs().max()) < 0.1
    unsteered = meter.measure(vectors[:1], torch.zeros(1), [BASE], config.rollouts, seed=0)
    exact = exact_first_token(lm, sae, config.prompts, torch.zeros(D))
    assert float(((unsteered.mean[0] - exact).abs() / unsteered.standard_error[0].clamp_min(1e-6)).max()) < 4.5


def test_standard_errors_are_the_spread_over_repetitions() -> None:
    lm, sae = toy()
    config = quick(rollouts=40, new_tokens=6, batch_rows=400)
    meter = RolloutMeter(lm, sae, HOOK, config)
    v = torch.randn(1, D, generator=torch.Generator().manual_seed(4)).expand(150, -1)
    found = meter.measure(v, torch.full((150,), 0.5), range(150), 40, seed=1)
    spread, claimed = found.mean.std(0), found.standard_error.mean(0)
    alive = claimed > 0.01
    ratio = (spread / claimed)[alive]
    assert int(alive.sum()) > 10
    assert 0.85 < float(ratio.mean()) < 1.15


@pytest.mark.parametrize("positions", ["generated", "text", "all"])
def test_reading_in_passing_is_reading_again(positions: str) -> None:
    lm, sae = toy()
    meter = RolloutMeter(lm, sae, HOOK, quick(positions=positions))
    v, s = torch.randn(3, D, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.0, 2.0])
    assert not meter.read_again
    once = meter.measure(v, s, [0, 1, 2], 6, seed=3)
    meter.read_again = True
    again = meter.measure(v, s, [0, 1, 2], 6, seed=3)
    torch.testing.assert_close(once.mean, again.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(once.standard_error, again.standard_error, atol=1e-4, rtol=1e-3)
    assert torch.equal(once.positions, again.positions)


def test_positions_are_what_is_averaged_over() -> None:
    lm, sae = toy()
    v, s = torch.randn(1, D, generator=torch.Generator().manual_seed(0)), torch.tensor([1.5])
    drawn = uniforms(3, 0, 6, 5)[None]
    counted = {}
    for positions in ("generated", "text", "all"):
        meter = RolloutMeter(lm, sae, HOOK, quick(positions=positions, prompts=("w5 w6", "w7 w8")))
        (group,) = meter.groups
        _, _, (tokens, mask) = meter._batch(group, v, s, torch.arange(6), drawn)
        code = sae.encode(lm.capture(tokens, mask, hooks=[HOOK])[HOOK])
        on = mask.bool() & (tokens != 1)
        width = group.prompts.input_ids.shape[1]
        if positions == "generated":
            on[:, :width] = False
        elif positions == "text":
            on[:, :width] &= tokens[:, :width] != 0
        found = meter.measure(v, s, [0], 6, seed=3)
        torch.testing.assert_close(found.mean[0], code[on].double().mean(0), atol=1e-5, rtol=1e-4)
        assert int(found.positions[0]) == counted.setdefault(positions, int(on.sum()))
    assert counted["generated"] < counted["text"] < counted["all"]


@pytest.mark.parametrize("scope", ["all", "generation"])
def test_batches_decide_nothing(scope: str) -> None:
    lm, sae = toy()
    v = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    s = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    whole = RolloutMeter(lm, sae, HOOK, quick(batch_rows=1000, scope=scope)).measure(v, s, range(5), 7, seed=3)
    for rows in (7, 3, 15):  # a vector a batch, a vector over several batches, two vectors a batch
        parts = RolloutMeter(lm, sae, HOOK, quick(batch_rows=rows, scope=scope)).measure(v, s, range(5), 7, seed=3)
        torch.testing.assert_close(parts.mean, whole.mean, atol=1e-5, rtol=1e-4)
        assert torch.equal(parts.positions, whole.positions)
    alone = RolloutMeter(lm, sae, HOOK, quick(scope=scope)).measure(v[3:4], s[3:4], [3], 7, seed=3)
    torch.testing.assert_close(alone.mean[0], whole.mean[3], atol=1e-5, rtol=1e-4)


def test_prompts_of_all_lengths_share_the_rollouts() -> None:
    lm, sae = toy()
    meter = RolloutMeter(lm, sae, HOOK, quick(prompts=("w5 w6", "w7", "w8 w9", "w4 w5 w6")))
    assert [group.members.tolist() for group in meter.groups] == [[1], [0, 2], [3]]
    rows = [meter.rollouts_of(group, 10).tolist() for group in meter.groups]
    assert rows == [[1, 5, 9], [0, 2, 4, 6, 8], [3, 7]]
    v, s = torch.randn(2, D, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 2.0])
    whole = meter.measure(v, s, [0, 1], 10, seed=3)
    drawn = torch.stack([uniforms(3, i, 10, 5) for i in range(2)])
    total, count = torch.zeros(2, 40), torch.zeros(2, dtype=torch.long)
    for group, mine in zip(meter.groups, rows):
        table, counts, (tokens, _) = meter._batch(group, v, s, torch.tensor(mine), drawn[:, mine])
        assert tokens.view(2, len(mine), -1)[0, :, :-5].tolist() == [
            lm.encode([meter.config.openings[r % 4]]).input_ids[0].tolist() for r in mine
        ]
        total, count = total + table.sum(1), count + counts.sum(1)
    torch.testing.assert_close(whole.mean, (total / count[:, None]).double(), atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.positions, count)


def test_steering_below_the_sae_reads_again_and_differs() -> None:
    lm, sae = toy()
    below = RolloutMeter(lm, sae, "blocks.0.hook_resid_post", quick(prompts=("w5 w6", "w7 w8")))
    assert below.read_again
    v, s = torch.randn(2, D, generator=torch.Generator().manual_seed(0)), torch.full((2,), 2.0)
    drawn = torch.stack([uniforms(0, i, 6, 5) for i in range(2)])
    table, counts, (tokens, mask) = below._batch(below.groups[0], v, s, torch.arange(6), drawn)
    code = sae.encode(lm.capture(tokens, mask, hooks=[HOOK])[HOOK])[:, -5:]  # of the unsteered model
    on = (mask[:, -5:].bool() & (tokens[:, -5:] != 1))[..., None]
    torch.testing.assert_close(table.flatten(0, 1), (code * on).sum(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(counts.flatten(), on[..., 0].sum(1))


@pytest.mark.parametrize(
    ("hook", "of", "below"),
    [
        ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post", False),
        ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_post", False),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", True),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", True),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out", False),
        ("blocks.2.attn.hook_z", "blocks.2.hook_attn_out", True),
        ("blocks.2.hook_attn_out", "blocks.2.attn.hook_z", False),
        ("blocks.2.mlp.hook_post", "logits", True),
        ("logits", "blocks.2.hook_resid_post", False),
        ("blocks.10.hook_resid_pre", "blocks.9.hook_resid_post", False),
    ],
)
def test_which_steering_leaves_the_reading_alone(hook: str, of: str, below: bool) -> None:
    """It is what decides whether a rollout is read while it is steered, or again afterwards."""
    deep = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 11}))
    lm = LanguageModel(deep)
    assert (lm.hook_point(hook) < lm.hook_point(of)) is below
    assert (lm.hook_point(hook) >= lm.hook_point(of)) is not below


def test_random_numbers_are_a_vectors_own() -> None:
    assert torch.equal(uniforms(0, 3, 4, 5), uniforms(0, 3, 4, 5))
    assert not torch.equal(uniforms(0, 3, 4, 5), uniforms(0, 4, 4, 5))
    assert not torch.equal(uniforms(0, 3, 4, 5), uniforms(1, 3, 4, 5))
    assert not torch.equal(uniforms(0, BASE, 4, 5), uniforms(0, 0, 4, 5))


def test_sums_by_hand() -> None:
    sums = Sums(1, 1)
    sums.add(0, torch.tensor([[2.0], [6.0]]), torch.tensor([2, 2]))
    sums.add(0, torch.tensor([[1.0]]), torch.tensor([1]))
    found = sums.averages()
    assert float(found.mean) == pytest.approx(9 / 5)
    residuals = [2 - 3.6, 6 - 3.6, 1 - 1.8]
    assert float(found.standard_error) == pytest.approx((3 / 2 * sum(r * r for r in residuals)) ** 0.5 / 5)
    assert Sums(1, 1).averages().standard_error.isinf().all()
