"""Lines along a direction: percentiles, thresholds by F1, conditions with their null, probes with their sides."""

import pytest
import torch
from support.tiny_models import D

from steersman import LanguageModel, Steerer, SteeringVector
from steersman.errors import SteersmanError
from steersman.steer.analysis.thresholds import (
    Threshold,
    _probe,
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


def test_a_cap_changes_its_share_of_unseen_tokens(lm: LanguageModel) -> None:
    """Those above the limit and no others: one less the percentile, within binomial error."""
    v = SteeringVector.of(torch.randn(D, generator=torch.Generator().manual_seed(1)), hook_name=HOOK)
    g = torch.Generator().manual_seed(2)
    fitted, unseen = (
        [" ".join(f"w{i}" for i in torch.randint(4, 60, (12,), generator=g).tolist()) for _ in range(60)]
        for _ in range(2)
    )
    limits = percentile_limits(lm, fitted, v, 75)
    batch = lm.encode(unseen)
    h = lm.capture(batch.input_ids, hooks=[HOOK])[HOOK][:, 1:]
    with Steerer(lm).direction(read=v, rule="cap", value=limits):
        capped = lm.capture(batch.input_ids, hooks=[HOOK])[HOOK][:, 1:]
    changed = (capped != h).any(-1)
    assert changed.equal(h @ v.vector / v.norm() > limits[HOOK])
    n = changed.numel()
    assert abs(float(changed.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5


def test_probed_sides_lift_and_mirror_what_lies_below_the_middle(lm: LanguageModel) -> None:
    yes = [f"w{i} w40 w{i + 2}" for i in range(5, 25)]
    no = [f"w{i} w50 w{i + 2}" for i in range(5, 25)]
    found = probe_sides(lm, yes, no, hook=HOOK)
    u = found.direction.vector
    batch = lm.encode(no)
    h = lm.capture(batch.input_ids, hooks=[HOOK])[HOOK][:, 1:]
    below = h @ u < found.middle
    assert 0 < int(below.sum()) < below.numel()
    targets = {
        "lifted": (found.lifting(2.0), torch.full_like(h[..., 0], found.mean + 2 * found.sd)),
        "mirrored": (found.mirroring(1.5), h @ u + 3 * (found.middle - h @ u)),
    }
    for edit, target in targets.values():
        with Steerer(lm).edit(HOOK, edit):
            got = lm.capture(batch.input_ids, hooks=[HOOK])[HOOK][:, 1:]
        torch.testing.assert_close((got @ u)[below], target[below], rtol=1e-3, atol=1e-4)
        assert got[~below].equal(h[~below])  # bit for bit
    logits = found.probe.values(h.reshape(-1, D))[:, 0].reshape(below.shape)
    assert (logits < 0).equal(below)


def test_features_of_any_size_give_the_probe_they_would_give_standardised(lm: LanguageModel) -> None:
    """What is folded back decides as the probe on standardised features does."""
    g = torch.Generator().manual_seed(0)
    label = torch.arange(60) < 30
    x = torch.randn(60, 4, generator=g) + 2 * label[:, None] * torch.tensor([1.0, 0, 0, 0])
    size, shift = torch.tensor([1.0, 100.0, 0.01, 5.0]), torch.tensor([3.0, -7.0, 0.5, 0.0])
    w, b = _probe(x[label], x[~label], 0.1)
    w2, b2 = _probe((x * size + shift)[label], (x * size + shift)[~label], 0.1)
    torch.testing.assert_close(x.double() @ w + b, (x * size + shift).double() @ w2 + b2, rtol=1e-4, atol=1e-4)


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
    assert found.layers[found.vector.hook_name] == max(found.layers.values())
    for method in ("pca", "probe"):
        other = find_condition(lm, yes, no, method=method)  # pyright: ignore[reportArgumentType]
        assert other.heldout_f1 > 0.9
        assert other.vector.method == method
    with pytest.raises(SteersmanError, match="unknown method 'lat' of a condition"):
        find_condition(lm, yes, no, method="lat")  # pyright: ignore[reportArgumentType]
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
    assert found.accuracy > 0.75
    assert 0.2 < found.null_accuracy < 0.8
    assert found.tokens_below is not None
    assert found.tokens_below > float((rho["y"] < found.middle).double().mean()), "tokens scatter more than means"
