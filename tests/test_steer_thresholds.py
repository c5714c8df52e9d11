"""Lines along a direction: percentiles, thresholds by F1, conditions with their null, probes with their sides."""

import pytest
import torch
from support.tiny_models import D

from steersman import LanguageModel, SteeringVector
from steersman.errors import SteersmanError
from steersman.steer.analysis.thresholds import (
    Threshold,
    best_threshold,
    f1_score,
    find_condition,
    percentile_limits,
    probe_sides,
    projections,
)

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"w{i} w{i + 1} w{j}" for i in range(5, 15) for j in (30, 41)]


def test_a_percentile_leaves_its_share_above(lm: LanguageModel) -> None:
    v = SteeringVector.of(3 * torch.randn(D, generator=torch.Generator().manual_seed(0)), hook_name=HOOK)
    limits = percentile_limits(lm, TEXTS, v, 75)
    rho = projections(lm, TEXTS, v)[HOOK]
    assert float((rho > limits[HOOK]).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert len(rho) == 3 * len(TEXTS), "every token but the BOS"
    h = lm.capture(lm.encode(TEXTS[:1]).input_ids, hooks=[HOOK])[HOOK][0, 1:]
    torch.testing.assert_close(rho[:3], h @ v.vector / v.norm(), atol=1e-5, rtol=1e-5)
    with pytest.raises(SteersmanError, match="between 0 and 100"):
        percentile_limits(lm, TEXTS, v, 100)


def test_the_best_threshold_is_the_best_of_all() -> None:
    g = torch.Generator().manual_seed(0)
    for shift in (0.5, -0.5, 3.0):
        yes, no = torch.randn(12, generator=g) + shift, torch.randn(9, generator=g)
        found = best_threshold(yes, no)
        lines = torch.cat([yes, no]).sort().values
        middles = [float(x) for x in (lines[:-1] + lines[1:]) / 2]
        every = [f1_score(yes, no, Threshold(value=m, above=a, f1=0)) for m in middles for a in (True, False)]
        assert found.f1 == pytest.approx(max(every))
        assert f1_score(yes, no, found) == pytest.approx(found.f1)
    with pytest.raises(SteersmanError, match="the same number"):
        best_threshold(torch.ones(3), torch.ones(3))


def test_a_condition_is_found_and_its_null_is_chance(lm: LanguageModel) -> None:
    yes = [f"w{i} w{i + 7} w40 w{i + 2}" for i in range(5, 21)]
    no = [f"w{i} w{i + 7} w50 w{i + 2}" for i in range(5, 21)]
    found = find_condition(lm, yes, no)
    assert found.heldout_f1 > 0.9
    assert found.null_f1 < 0.85
    assert found.vector.hook_name.endswith("hook_resid_pre")
    with pytest.raises(SteersmanError, match="at least 4 prompts"):
        find_condition(lm, yes[:3], no)


def test_a_probe_decides_at_its_middle(lm: LanguageModel) -> None:
    yes = [f"w{i} w40 w{i + 2}" for i in range(5, 25)]
    no = [f"w{i} w50 w{i + 2}" for i in range(5, 25)]
    found = probe_sides(lm, yes, no, hook=HOOK)
    rho = {
        side: projections(lm, texts, found.direction, positions="mean")[HOOK] for side, texts in (("y", yes), ("n", no))
    }
    assert found.direction.norm() == pytest.approx(1.0, rel=1e-5)
    assert found.mean == pytest.approx(float(rho["y"].mean()), rel=1e-4)
    assert found.sd == pytest.approx(float(rho["y"].std()), rel=1e-3)
    assert found.negative_mean == pytest.approx(float(rho["n"].mean()), rel=1e-4)
    assert float((rho["y"] > found.middle).double().mean()) > 0.9
    assert float((rho["n"] < found.middle).double().mean()) > 0.9
    assert found.tokens_below is not None
    assert found.tokens_below > float((rho["y"] < found.middle).double().mean()), "tokens scatter more than means"
