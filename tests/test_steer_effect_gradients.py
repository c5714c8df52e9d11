"""Effects by gradients: what texts say of every direction at once, against differences that are measured."""

from pathlib import Path

import pytest
import torch
from support.effect_toys import HOOK, quick, toy
from support.tiny_models import D

from steersman import EffectMap, SteersmanError, collect_effects
from steersman.lm.sampling import Sampling
from steersman.steer.effects.fit import response_fit
from steersman.steer.effects.gradients import text_scores
from steersman.steer.effects.rollouts import RolloutMeter, uniforms
from steersman.steer.effects.verify import verify_effect


@pytest.mark.parametrize("scope", ["all", "generation"])
def test_gradients_are_differences_of_the_likelihood(scope: str) -> None:
    lm, sae = toy()
    config = quick(vectors="gradients", scope=scope, top_k=9, top_p=0.95, temperature=0.8)
    meter = RolloutMeter(lm, sae, HOOK, config)
    found = text_scores(meter, 0, 4)
    texts = {}
    for group in meter.groups:
        rows = meter.rollouts_of(group, 4)
        drawn = [uniforms(config.seed, int(i), 1, config.new_tokens) for i in rows]
        _, _, (tokens, mask) = meter.unsteered(group, torch.zeros(1, D), rows, torch.cat(drawn)[None])
        texts |= {int(i): (tokens[n], mask[n], group.prompts.input_ids.shape[1]) for n, i in enumerate(rows)}
    x = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(1)), dim=0)
    for i, (tokens, mask, width) in texts.items():
        sides = []
        for step in (2e-3, -2e-3):
            with meter.steerer.vector(x, scale=step, hook=HOOK, scope=scope):
                logits = lm.logits(tokens[None], mask[None], prompt_length=width)
            logp = config.sampling.log_prob(logits[0, width - 1 : -1], tokens[width:])
            sides.append(float(logp[mask[width:].bool()].sum()))
        assert float(found.gradient[i] @ x) == pytest.approx((sides[0] - sides[1]) / 4e-3, rel=0.02, abs=5e-3)


def test_probabilities_are_those_of_the_draw() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0.7, top_k=6, top_p=0.8)
    u = (torch.arange(20_000) + 0.5) / 20_000
    tokens = sampling.draw(logits.expand(20_000, -1), u)
    share = torch.bincount(tokens, minlength=12) / 20_000
    for token in share.nonzero()[:, 0]:
        p = sampling.log_prob(logits, token[None]).exp()
        assert float(p) == pytest.approx(float(share[token]), abs=2e-4)


def test_the_response_and_what_it_costs() -> None:
    g = torch.Generator().manual_seed(0)
    F = torch.diag(torch.tensor([1.0, 4.0, 0.25]))
    scores = torch.randn(60_000, 3, generator=g) @ F.sqrt()
    M = torch.tensor([[1.0, 0.0], [4.0, -1.0], [1.0, 0.0]])
    features = 5 + scores @ torch.linalg.inv(F) @ M + torch.randn(60_000, 2, generator=g)
    found = response_fit([(scores, features)], tokens=2.0)
    assert torch.allclose(found.M, M, atol=0.1)
    assert torch.allclose(found.metric.float(), F / 2, atol=0.03)
    natural = torch.linalg.solve(found.metric.float() + found.damping * torch.eye(3), found.M)
    assert torch.nn.functional.cosine_similarity(natural[:, 0], torch.tensor([1.0, 1.0, 4.0]), dim=0) > 0.999
    assert torch.nn.functional.cosine_similarity(natural, found.natural.M, dim=0).min() > 0.9999


def test_by_default_effects_are_of_gradients(tmp_path: Path) -> None:
    lm, sae = toy()
    settings = {"n_vectors": 8 * D, "new_tokens": 5, "rollouts": 2, "prompts": ("w5 w6", "w7"), "shard_vectors": 64}
    effects = collect_effects(lm, sae, out=str(tmp_path / "e"), **settings)
    again = collect_effects(lm, sae, out=str(tmp_path / "e"), **settings)  # resumed: nothing is left to do
    assert torch.equal(next(effects.iterate()).vectors, next(again.iterate()).vectors)
    fitted = effects.fit()
    assert fitted.metric is not None
    feature = int(fitted.signal.argmax())
    vector = fitted.solve(feature, min_signal=0.0, metric=True)
    assert vector.method == "sae_ts_natural"
    at_its_cost = [v.vector @ fitted.M[:, feature] / (v.vector @ fitted.metric @ v.vector).sqrt()
                   for v in (vector, fitted.solve(feature, min_signal=0.0))]  # fmt: skip
    assert at_its_cost[0] > at_its_cost[1]
    found = verify_effect(fitted, lm, sae, vector, rollouts=2)  # no held-out text: no scale has to be looked for
    assert found.scale == pytest.approx(fitted.median_scale)
    fitted.save(tmp_path / "map.safetensors")
    assert torch.equal(
        EffectMap.load(tmp_path / "map.safetensors").solve(feature, min_signal=0.0, metric=True).vector, vector.vector
    )
    with pytest.raises(SteersmanError, match="closed form"):
        effects.fit(method="adam")
