"""Scales: bracket and bisection over many vectors at once; nothing is extrapolated."""

import pytest
import torch
from support.tiny_models import D, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.effects.config import EffectsConfig
from steersman.steer.effects.scales import HeldOut, ScaleRule, search_scales
from steersman.steer.effects.vectors import unit_rows
from steersman.steer.steerer import Steerer

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["w5 w6 w7 w8 w9", "w10 w11", "w12 w13 w14 w15", " ", "w20 w21 w22"]


def power(which: Tensor, s: Tensor) -> Tensor:
    return 0.01 * (which + 1) * s.double() ** (1 + which % 3)


def test_each_scale_hits_its_target() -> None:
    found = search_scales(power, 60, target=0.5, start=0.2, limit=100.0, tolerance=0.02)
    assert found.reached.all()
    exact = (0.5 / (0.01 * (torch.arange(60) + 1))) ** (1 / (1 + torch.arange(60) % 3))
    assert float((power(torch.arange(60), found.scale) / 0.5 - 1).abs().max()) <= 0.02
    torch.testing.assert_close(found.scale, exact.float(), rtol=0.03, atol=0)


def test_few_evaluations_do() -> None:
    calls = []

    def counted(which: Tensor, s: Tensor) -> Tensor:
        calls.append(len(which))
        return power(which, s)

    found = search_scales(counted, 40, target=0.5, start=2.0, limit=100.0)
    assert found.reached.all()
    assert len(calls) <= 8
    assert sum(calls) < 40 * 5  # found vectors are not measured again


def test_a_target_exceeded_at_the_start_is_searched_for_below() -> None:
    found = search_scales(lambda which, s: 1e4 * s**2, 2, target=0.5, start=3.0, limit=10.0)
    assert found.reached.all()
    torch.testing.assert_close(found.scale, torch.full((2,), 0.5e-4**0.5), rtol=0.03, atol=0)


def test_what_is_not_reached_is_said_and_not_extrapolated() -> None:
    found = search_scales(
        lambda which, s: torch.where(which == 0, 0.4 * s / (1 + s), s), 2, target=0.5, start=0.1, limit=5.0
    )
    assert found.reached.tolist() == [False, True]
    assert float(found.scale[0]) == 5.0
    assert float(found.achieved[0]) == pytest.approx(0.4 * 5 / 6)


def test_a_step_that_jumps_over_the_target_is_not_called_reached() -> None:
    found = search_scales(lambda which, s: (s > 1).double() * 9.0, 1, target=0.5, start=0.1, limit=5.0)
    assert not found.reached.any()
    assert float(found.scale[0]) <= 1.01


def test_nan_counts_as_far_beyond() -> None:
    found = search_scales(lambda which, s: torch.where(s > 2, torch.nan, s**2), 1, target=3.0, start=1.9, limit=50.0)
    assert found.reached.all()
    assert float(found.scale[0]) == pytest.approx(3**0.5, rel=0.03)


@pytest.mark.parametrize("scope", ["all", "generation"])
@pytest.mark.parametrize("rule", ["loss", "kl"])
def test_rules_measure_what_they_say(rule: str, scope: str) -> None:
    lm = with_text("llama")
    target = {"loss": 0.03, "kl": 0.05}[rule]
    config = EffectsConfig(scale_rule=rule, scale_target=target, scope=scope, batch_rows=10)  # pyright: ignore[reportArgumentType]
    vectors = unit_rows(torch.randn(5, D, generator=torch.Generator().manual_seed(0)))
    scales = ScaleRule(lm, HOOK, config, 4.0, TEXTS)
    found = scales.find(vectors)
    assert found.reached.any()
    batch = lm.encode([text for text in TEXTS if text.strip()])
    base = lm.logits(batch.input_ids, batch.attention_mask).log_softmax(-1)
    where = batch.attention_mask[:, 1:].bool().clone()
    where[:, 0] = False  # what BOS predicts: BOS is not steered
    for i in found.reached.nonzero()[:, 0].tolist():
        with Steerer(lm).vector(vectors[i], scale=float(found.scale[i]), hook=HOOK):
            steered = lm.logits(batch.input_ids, batch.attention_mask).log_softmax(-1)
        if rule == "kl":
            measured = (steered.exp() * (steered - base)).sum(-1)[:, :-1][where].mean()
        else:
            wanted = batch.input_ids[:, 1:, None]
            measured = (base[:, :-1].gather(-1, wanted) - steered[:, :-1].gather(-1, wanted))[..., 0][where].mean()
        assert float(measured) == pytest.approx(target, rel=0.051)
        assert float(found.achieved[i]) == pytest.approx(float(measured), rel=1e-3)


def test_rules_that_measure_nothing() -> None:
    lm = with_text("llama")
    vectors = torch.eye(D)[:3]
    norm = ScaleRule(lm, HOOK, EffectsConfig(scale_rule="norm", scale_target=0.25), 8.0, ()).find(vectors)
    fixed = ScaleRule(lm, HOOK, EffectsConfig(scale_rule="fixed", scale_target=3.0), 8.0, ()).find(vectors)
    assert norm.scale.tolist() == [2.0] * 3
    assert fixed.scale.tolist() == [3.0] * 3
    assert norm.reached.all()
    assert fixed.achieved.isnan().all()


def test_texts_that_cannot_be_measured_on() -> None:
    lm = with_text("llama")
    with pytest.raises(SteersmanError, match="held-out text"):
        HeldOut.of(lm, [" ", ""], EffectsConfig())
    with pytest.raises(SteersmanError, match="too short"):
        HeldOut.of(lm, ["w5"], EffectsConfig(heldout_tokens=2))
