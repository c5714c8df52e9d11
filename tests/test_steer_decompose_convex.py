"""Lasso and NNLS: optimality over all features, against a slow independent solver, and their paths."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae import SAE, SAEConfig
from steersman.steer.decompose import decompose
from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.homotopy import walk_path


def unit_rows(L: int = 200, D: int = 24, coherent: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(5)
    W = torch.randn(L, D, generator=g, dtype=torch.float64)
    if coherent:
        W = W[torch.arange(L) // 4] + 0.1 * torch.randn(L, D, generator=g, dtype=torch.float64)
    return W / W.norm(dim=1, keepdim=True)


def objective(v: Tensor, W: Tensor, c: Tensor, penalty: float) -> float:
    return float(0.5 * (v - c @ W).square().sum() + penalty * c.abs().sum())


def slow_solution(v: Tensor, W: Tensor, penalty: float, positive: bool) -> Tensor:
    """Proximal gradient descent with momentum, float64."""
    c = y = torch.zeros(len(W), dtype=torch.float64)
    step, t = 1 / float(torch.linalg.matrix_norm(W, 2)) ** 2, 1.0
    for _ in range(1500):
        z = y + step * (W @ (v - y @ W))
        new = (z - step * penalty).clamp_min(0) if positive else z.sign() * (z.abs() - step * penalty).clamp_min(0)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, c, t = new + (t - 1) / t_new * (new - c), new, t_new
    return c


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("coherent", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_optimal_over_all_features(positive: bool, coherent: bool, share: float) -> None:
    W = unit_rows(coherent=coherent)
    V = torch.randn(3, W.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for v, solution in zip(V, walk_path(V, Atoms(W), k=None, penalty=share, positive=positive)):
        penalty = share * float((W @ v).max() if positive else (W @ v).abs().max())
        c = torch.zeros(len(W), dtype=torch.float64)
        c[solution.features] = solution.coefficients
        products = W @ (v - c @ W)
        assert float((products if positive else products.abs()).max()) <= penalty * (1 + 1e-9)
        torch.testing.assert_close(products[c != 0], penalty * c[c != 0].sign(), rtol=1e-9, atol=0)
        slow = objective(v, W, slow_solution(v, W, penalty, positive), penalty)
        assert objective(v, W, c, penalty) <= slow * (1 + 1e-12)
        assert slow == pytest.approx(objective(v, W, c, penalty), rel=1e-3)
        assert solution.violation < 1e-10
        assert solution.penalty == pytest.approx(share)


def test_the_end_of_the_path_is_nnls() -> None:
    W = unit_rows()
    v = torch.randn(1, W.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (solution,) = walk_path(v, Atoms(W[:30]), k=None, penalty=0.0, positive=True)
    gradient = W[:30] @ (v[0] - solution.coefficients @ W[solution.features])
    assert bool((solution.coefficients > 0).all())
    assert float(gradient.max()) < 1e-6
    assert float(gradient[solution.features].abs().max()) < 1e-6


def test_k_features_and_the_path() -> None:
    W = unit_rows(L=500, D=64)
    V = torch.randn(5, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for solution in walk_path(V, Atoms(W.float()), k=10, penalty=None, positive=False):
        assert len(solution.features) == 10
        assert solution.violation < 1e-6
        penalties = [point.penalty for point in solution.path]
        assert penalties == sorted(penalties, reverse=True)
        explained = [point.explained_variance for point in solution.path]
        assert explained == sorted(explained)


def test_copies_and_opposites_do_no_harm() -> None:
    W = torch.cat([unit_rows(40), unit_rows(40), -unit_rows(40)])
    v = torch.randn(1, W.shape[1], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for positive in (False, True):
        (solution,) = walk_path(v, Atoms(W), k=None, penalty=0.05, positive=positive)
        assert solution.violation < 1e-9


def test_lasso_fits_again_unless_the_penalty_is_given() -> None:
    sae = SAE(SAEConfig(d_in=64, d_sae=400, k=4), torch.Generator().manual_seed(0))
    v = 2 * sae.W_dec[3].detach() - sae.W_dec[7].detach()
    fitted = decompose(v, sae, method="lasso", k=4)
    assert fitted.as_features()[3] == pytest.approx(2, abs=1e-4)
    shrunk = decompose(v, sae, method="lasso", k=None, penalty=0.5)
    assert 0 < shrunk.as_features()[3] < 1.6
    assert shrunk.path is not None
    assert shrunk.path[-1].penalty == pytest.approx(0.5)
    assert decompose(v, sae, method="nnls", k=4).coefficients.min() > 0


def test_no_non_negative_part() -> None:
    sae = SAE(SAEConfig(d_in=4, d_sae=2, k=1), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(4)[:2])
    found = decompose(torch.tensor([-1.0, -1.0, 0.0, 0.0]), sae, method="nnls", k=2)
    assert len(found) == 0
    assert "says nothing" in " ".join(found.warnings)
    assert "nnls: 0 features" in found.to_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lasso", "penalty": 1.5}, "penalty is a fraction"),
        ({"method": "omp", "penalty": 0.1}, "penalty is a setting of lasso and nnls, not of omp"),
        ({"method": "lasso", "k": 65}, "k = 65 is out of range: 1 to 64"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    sae = SAE(SAEConfig(d_in=64, d_sae=400, k=4))
    with pytest.raises(SteersmanError, match=message):
        decompose(torch.ones(64), sae, **settings)
