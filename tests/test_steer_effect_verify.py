"""Verification: what is predicted against what is measured, specificity and side effects."""

import json
import math

import pytest
import torch
from support.effect_toys import HOOK, TEXTS, quick, toy
from support.tiny_models import D, toy_sae

from steersman.errors import SteersmanError
from steersman.steer.effects.collect import collect_effects
from steersman.steer.effects.map import EffectMap
from steersman.steer.vectors.vector import SteeringVector


@pytest.fixture(scope="module")
def fitted() -> EffectMap:
    lm, sae = toy()
    config = quick(
        n_vectors=100, rollouts=200, shard_vectors=100, batch_rows=4000, base_rollouts=4000, scale_rule="kl",
        scale_target=0.05,
    )  # fmt: skip
    return collect_effects(lm, sae, TEXTS, config).fit()


def test_small_steering_does_what_the_map_says(fitted: EffectMap) -> None:
    lm, sae = toy()
    target = int(fitted.signal.argmax())
    v = fitted.solve(target)
    found = fitted.verify(lm, sae, v, texts=TEXTS, rollouts=3000)
    assert [row.feature for row in found.targets] == [target]
    assert found.reached
    assert found.achieved == pytest.approx(0.05, rel=0.051)
    assert found.targets[0].measured > 5 * found.targets[0].standard_error
    assert found.correlation > 0.5
    y, p = found.measured.double(), found.predicted.double()
    assert found.slope == pytest.approx(float(y @ p / p.square().sum()), rel=1e-4)
    assert found.specificity == pytest.approx(float(y[target] / y.norm()), rel=1e-5)
    sizes = [abs(row.measured) for row in found.side_effects]
    assert sizes == sorted(sizes, reverse=True)
    assert target not in [row.feature for row in found.side_effects]
    others = y.abs()
    others[target] = 0
    assert sizes[0] == pytest.approx(float(others.max()), rel=1e-5)
    torch.testing.assert_close(found.predicted, fitted.predict(v), atol=1e-6, rtol=1e-5)
    data = json.loads(found.to_json())
    assert data["targets"][0]["feature"] == target
    assert "specificity" in found.to_text()


def test_the_opposite_vector_does_the_opposite(fitted: EffectMap) -> None:
    lm, sae = toy()
    target = int(fitted.signal.argmax())
    v = fitted.solve(target, bias_weight=0.0)
    up = fitted.verify(lm, sae, v, scale=0.6, rollouts=3000)
    down = fitted.verify(lm, sae, -v, {target: 1.0}, scale=0.6, rollouts=3000)
    assert up.targets[0].measured > 3 * up.targets[0].standard_error
    assert down.targets[0].measured < -3 * down.targets[0].standard_error
    assert math.isnan(up.achieved)


def test_seeds_are_fresh_and_repeatable(fitted: EffectMap) -> None:
    lm, sae = toy()
    x = torch.randn(D, generator=torch.Generator().manual_seed(0))
    a = fitted.verify(lm, sae, x, scale=1.0, rollouts=20)
    assert torch.equal(a.measured, fitted.verify(lm, sae, x, scale=1.0, rollouts=20).measured)
    assert not torch.equal(a.measured, fitted.verify(lm, sae, x, scale=1.0, rollouts=20, seed=2).measured)
    assert a.targets == []
    assert math.isnan(a.specificity)
    assert json.loads(a.to_json())["specificity"] is None


def test_what_does_not_fit_the_map(fitted: EffectMap) -> None:
    lm, sae = toy()
    with pytest.raises(SteersmanError, match="another SAE"):
        fitted.verify(lm, toy_sae(HOOK), torch.randn(D))
    elsewhere = SteeringVector.of(torch.randn(D), hook_name="blocks.0.hook_resid_post")
    with pytest.raises(SteersmanError, match="was made at"):
        fitted.verify(lm, sae, elsewhere)
    with pytest.raises(SteersmanError, match="held-out text"):
        fitted.verify(lm, sae, torch.randn(D))
    with pytest.raises(SteersmanError, match="rollouts"):
        fitted.verify(lm, sae, torch.randn(D), scale=1.0, rollouts=1)
    lm.name = "other"
    with pytest.raises(SteersmanError, match="the model is 'other'"):
        fitted.verify(lm, sae, torch.randn(D), scale=1.0)
