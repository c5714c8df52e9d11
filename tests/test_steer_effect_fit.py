"""Fits: exact recovery, the ridge formula, cross-validation, what noise looks like."""

import pytest
import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.effects.fit import adam_fit, ridge_fit, score


def planted(n: int, D: int, L: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, D, generator=g, dtype=torch.float64), dim=1)
    M, b = torch.randn(D, L, generator=g, dtype=torch.float64), torch.randn(L, generator=g, dtype=torch.float64)
    return x, x @ M + b + noise * torch.randn(n, L, generator=g, dtype=torch.float64), M, b


def blocks(x: Tensor, y: Tensor, size: int = 17) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size)))


def test_a_linear_map_is_recovered_to_numerical_precision() -> None:
    x, y, M, b = planted(200, 12, 30)
    fit = ridge_fit(blocks(x, y), ridge=0.0)
    torch.testing.assert_close(fit.M, M, atol=1e-11, rtol=0)
    torch.testing.assert_close(fit.b, b, atol=1e-11, rtol=0)
    automatic = ridge_fit(blocks(x, y))
    torch.testing.assert_close(automatic.M, M, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ridge", [0.3, 7.0])
@pytest.mark.parametrize("L", [5, 2100])  # within a block of columns, and over several
def test_the_ridge_formula(ridge: float, L: int) -> None:
    x, y, _, _ = planted(60, 8, L, noise=0.5)
    fit = ridge_fit(blocks(x, y), ridge=ridge)
    xc, yc = x - x.mean(0), y - y.mean(0)
    M = torch.linalg.solve(xc.T @ xc + ridge * torch.eye(8, dtype=torch.float64), xc.T @ yc)
    torch.testing.assert_close(fit.M, M, atol=1e-10, rtol=0)
    torch.testing.assert_close(fit.b, y.mean(0) - x.mean(0) @ M, atol=1e-10, rtol=0)


def test_blocks_make_no_difference() -> None:
    x, y, _, _ = planted(60, 8, 9, noise=0.5)
    a, b = ridge_fit([(x, y)]), ridge_fit(blocks(x, y, 7))
    torch.testing.assert_close(a.M, b.M, atol=1e-10, rtol=0)
    assert a.ridge == pytest.approx(b.ridge)


def test_the_chosen_ridge_is_near_the_best_for_new_vectors() -> None:
    x, y, M, b = planted(60, 20, 40, noise=2.0)
    fresh, exact, _, _ = planted(2000, 20, 40, seed=1)
    exact = fresh @ M + b

    def error(ridge: float | None) -> float:
        fit = ridge_fit([(x, y)], ridge=ridge)
        return float((fresh @ fit.M + fit.b - exact).square().mean())

    best = min(error(r) for r in (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0))
    assert error(None) < 1.1 * best
    assert error(None) < 0.9 * error(0.0)


def test_signal_is_one_without_any_and_tells_how_much_there_is() -> None:
    g = torch.Generator().manual_seed(0)
    x, y, M, _ = planted(300, 16, 400)
    y[:, :200] = torch.randn(300, 200, generator=g, dtype=torch.float64)  # noise only
    y[:, 200:] += torch.randn(300, 200, generator=g, dtype=torch.float64)
    y[:, 0] = 0.25  # never moves
    fit = ridge_fit([(x, y)], ridge=0.0)
    assert float(fit.signal[0]) == 0
    assert float(fit.signal[1:200].mean()) == pytest.approx(1.0, abs=0.08)
    assert float(fit.signal[1:200].max()) < 3.5
    noise_in_M = torch.linalg.inv((x - x.mean(0)).T @ (x - x.mean(0))).trace()
    expected = 1 + M[:, 200:].square().sum(0) / noise_in_M
    torch.testing.assert_close(fit.signal[200:].double().mean(), expected.mean(), rtol=0.1, atol=0)
    assert float(fit.noise[200:].mean()) == pytest.approx(1.0, abs=0.05)


def test_too_few_vectors() -> None:
    x, y, _, _ = planted(9, 8, 5)
    with pytest.raises(SteersmanError, match="9 vectors are too few for a map of width 8"):
        ridge_fit([(x, y)])
    assert ridge_fit([(x, y)], ridge=0.5).M.isfinite().all()
    with pytest.raises(SteersmanError, match="no vectors"):
        ridge_fit([])
    with pytest.raises(SteersmanError, match="ridge must be"):
        ridge_fit([(x, y)], ridge=-1.0)


def test_directions_that_no_vector_has_stay_out() -> None:
    x, y, M, _ = planted(50, 8, 5)
    x[:, 3] = 0
    y = x @ M
    fit = ridge_fit([(x, y)], ridge=0.0)
    assert float(fit.M[3].abs().max()) < 1e-9
    torch.testing.assert_close(fit.M[:3], M[:3], atol=1e-9, rtol=0)


def test_adam_goes_to_the_same_place_in_time() -> None:
    x, y, _, _ = planted(400, 6, 10, noise=0.05)
    closed = ridge_fit([(x, y)], ridge=0.0)
    fit = adam_fit(lambda: blocks(x.float(), y.float(), 100), epochs=150, lr=2e-2)
    torch.testing.assert_close(fit.M, closed.M.float(), atol=0.01, rtol=0)
    torch.testing.assert_close(fit.b, closed.b.float(), atol=0.01, rtol=0)
    torch.testing.assert_close(fit.signal, closed.signal, rtol=0.1, atol=0)
    again = adam_fit(lambda: blocks(x.float(), y.float(), 100), epochs=2, seed=1)
    assert not torch.equal(again.M, adam_fit(lambda: blocks(x.float(), y.float(), 100), epochs=2, seed=2).M)
    assert torch.equal(again.M, adam_fit(lambda: blocks(x.float(), y.float(), 100), epochs=2, seed=1).M)


def test_scores_by_hand() -> None:
    x, y, M, b = planted(80, 6, 4, noise=0.7)
    y[:, 3] = 2.0
    found = score(M, b, iter([(x[:30], y[:30], torch.full((30, 4), 0.7)), (x[30:], y[30:], torch.full((50, 4), 0.7))]))
    r2 = 1 - (y - x @ M - b).square().sum(0) / (y - y.mean(0)).square().sum(0)
    torch.testing.assert_close(found.r2[:3], r2[:3].float())
    assert found.r2[3].isnan()
    torch.testing.assert_close(found.ceiling[:3], r2[:3].float(), atol=0.15, rtol=0)
    assert found.total == pytest.approx(
        float(1 - (y - x @ M - b).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-6
    )
