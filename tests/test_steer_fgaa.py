"""FGAA targets: the difference of all examples, filtered."""

import pytest
import torch
from support.effect_toys import HOOK, toy

from steersman.errors import SteersmanError
from steersman.sae import FeatureStats
from steersman.steer.effects.fgaa import fgaa_targets

POSITIVE, NEGATIVE = ["w5 w6 w7", "w8", "w9 w10"], ["w30 w31", "w32 w33 w34 w35"]


def difference(positive: list[str], negative: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    lm, sae = toy()
    means, fired = [], torch.zeros(40)
    for texts in (positive, negative):
        batch = lm.encode(texts)
        code = sae.encode(lm.capture(batch.input_ids, batch.attention_mask, hooks=[HOOK])[HOOK])
        code = code[batch.attention_mask.bool() & (batch.input_ids != 0)]
        means.append(code.mean(0))
        fired += (code > 0).sum(0)
    h = lm.capture(torch.tensor([[0]]), hooks=[HOOK])[HOOK]
    return (means[0] - means[1]).where(sae.encode(h)[0, 0] == 0, torch.zeros(40)), fired


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_largest_rises_and_falls_of_the_mean_difference(batch_size: int) -> None:
    lm, sae = toy()
    found = fgaa_targets(
        lm, sae, POSITIVE, NEGATIVE, max_density=1.0, n_positive=3, n_negative=2, batch_size=batch_size
    )
    d, _ = difference(POSITIVE, NEGATIVE)
    order = d.argsort()
    chosen = [*order[-3:].tolist(), *order[:2].tolist()]
    assert set(found) == set(chosen)
    total = float(d[chosen].abs().sum())
    for j, weight in found.items():
        assert weight == pytest.approx(float(d[j]) / total, rel=1e-4)
    assert sum(map(abs, found.values())) == pytest.approx(1)
    sizes = [abs(w) for w in found.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_every_example_counts() -> None:
    lm, sae = toy()
    options = {"max_density": 1.0, "n_positive": 5}
    whole = fgaa_targets(lm, sae, POSITIVE, NEGATIVE, **options)
    for i in range(3):
        assert fgaa_targets(lm, sae, POSITIVE[:i] + POSITIVE[i + 1 :], NEGATIVE, **options) != whole


def test_dense_features_are_left_out() -> None:
    lm, sae = toy()
    d, _ = difference(POSITIVE, NEGATIVE)
    first = int(d.argmax())
    density = torch.zeros(40)
    density[first] = 0.5
    sae.feature_stats = FeatureStats(
        max_act=torch.ones(40), density=density, mean_act=torch.ones(40), n_tokens=10, median_norm=1.0
    )
    assert first not in fgaa_targets(lm, sae, POSITIVE, NEGATIVE, n_positive=40)
    assert first in fgaa_targets(lm, sae, POSITIVE, NEGATIVE, n_positive=40, max_density=0.6)


def test_wrong_requests_have_one_line() -> None:
    lm, sae = toy()
    for positive, negative in (([], NEGATIVE), (POSITIVE, []), ("w5", NEGATIVE)):
        with pytest.raises(SteersmanError, match="two lists of texts"):
            fgaa_targets(lm, sae, positive, negative)
    with pytest.raises(SteersmanError, match="keeps at least one feature"):
        fgaa_targets(lm, sae, POSITIVE, NEGATIVE, n_positive=0)
    with pytest.raises(SteersmanError, match="leave no feature"):
        fgaa_targets(lm, sae, POSITIVE, POSITIVE, max_density=1.0)
