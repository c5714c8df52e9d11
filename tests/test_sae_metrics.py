"""Reconstruction metrics and feature statistics against their definitions."""

import pytest
import torch
from support.helpers import make_sae

from steersman.errors import SteersmanError
from steersman.sae import SparseCode
from steersman.sae.metrics import FeatureSums, ReconstructionSums, measure_reconstruction


def test_metrics_equal_their_definitions_over_uneven_batches() -> None:
    sae = make_sae()
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)) + 40.0  # a large mean must cost no digits
    got = measure_reconstruction(sae, x.split([1, 300, 199]))
    X, X_hat, F = x.double(), sae(x).double(), sae.encode(x)
    error, variance = (X - X_hat).square().sum(), (X - X.mean(0)).square().sum()
    assert got.fvu == pytest.approx(float(error / variance), rel=1e-5)
    assert got.explained_variance == pytest.approx(1 - got.fvu)
    assert got.l0 == pytest.approx(float((F > 0).double().sum(1).mean()))
    assert got.dead_fraction == pytest.approx(float(((F > 0).sum(0) == 0).double().mean()))
    assert got.dense_fraction == pytest.approx(float(((F > 0).double().mean(0) > 0.1).double().mean()))
    assert got.cosine == pytest.approx(float(torch.cosine_similarity(X, X_hat).mean()), rel=1e-5)
    assert got.relative_norm == pytest.approx(float((X_hat.norm(dim=1) / X.norm(dim=1)).mean()), rel=1e-5)
    assert got.n_tokens == 500
    assert (got.record()["dead_share"], got.record()["dense_share"]) == (got.dead_fraction, got.dense_fraction)


def test_predicting_the_mean_scores_exactly_one() -> None:
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)).double()
    sums = ReconstructionSums(5, 3, torch.device("cpu"))
    nothing = SparseCode(torch.zeros(100, 1), torch.zeros(100, 1, dtype=torch.int64))
    sums.add(x, x.mean(0).expand_as(x), nothing)
    assert sums.result().fvu == pytest.approx(1.0, abs=1e-6)


def test_one_token_has_no_variance() -> None:
    with pytest.raises(SteersmanError, match="too few"):
        measure_reconstruction(make_sae(), [torch.randn(1, 8)])


def test_feature_statistics_equal_their_definitions() -> None:
    sae = make_sae()
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    sums = FeatureSums(sae.cfg.d_sae, sae.device)
    for part in x.split(77):
        sums.add(sae.encode_sparse(part))
    stats = sums.stats(median_norm=2.0)
    F = sae.encode(x)
    torch.testing.assert_close(stats.max_act, F.max(0).values)
    torch.testing.assert_close(stats.density, (F > 0).float().mean(0))
    active = (F > 0).sum(0)
    torch.testing.assert_close(stats.mean_act, F.sum(0) / active.clamp_min(1))
    assert stats.n_tokens == 300
    sae.feature_stats = stats
    dead = [i for i in range(64) if active[i] == 0]
    assert dead == [i for i in range(64) if sae.is_dead(i)]
