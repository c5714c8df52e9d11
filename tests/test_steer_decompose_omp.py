"""Matching pursuit against a plain float64 implementation: the same features in the same order, equal coefficients."""

import pytest
import torch
from torch import Tensor

from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.gradient_pursuit import gradient_pursuit
from steersman.steer.decompose.omp import matching_pursuit


def plain_omp(v: Tensor, W: Tensor, k: int) -> tuple[list[int], Tensor]:
    """Orthogonal matching pursuit in its plainest form, float64."""
    v, W = v.double(), W.double()
    rows = W / W.norm(dim=1, keepdim=True).clamp_min(1e-300)
    chosen: list[int] = []
    left, c = v, torch.zeros(0, dtype=torch.float64)
    for _ in range(k):
        score = (rows @ left).abs()
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        c = torch.linalg.lstsq(rows[chosen].T, v[:, None]).solution[:, 0]
        left = v - c @ rows[chosen]
    return chosen, c


def dictionary(kind: str, L: int = 600, D: int = 48) -> Tensor:
    g = torch.Generator().manual_seed(7)
    W = torch.randn(L, D, generator=g)
    if kind == "unit":
        return W / W.norm(dim=1, keepdim=True)
    if kind == "coherent":  # clusters of almost equal rows
        return W[torch.arange(L) // 8] + 0.02 * torch.randn(L, D, generator=g)
    if kind == "any length":
        return W * torch.logspace(-3, 3, L)[:, None]
    if kind == "with zero rows":
        W[::5] = 0
        return W
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["unit", "coherent", "any length", "with zero rows"])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_equals_plain_float64(kind: str, scale: float) -> None:
    W = dictionary(kind)
    V = scale * torch.randn(7, W.shape[1], generator=torch.Generator().manual_seed(3))
    found = matching_pursuit(V.double(), Atoms(W), 12)
    for v, terms in zip(V, found):
        features, c = plain_omp(v, W, 12)
        assert terms.features.tolist() == features
        torch.testing.assert_close(terms.coefficients, c, rtol=1e-6, atol=1e-8 * scale)
        rows = W[features].double()
        left = v.double() - c @ (rows / rows.norm(dim=1, keepdim=True))
        assert terms.curve is not None
        assert float(terms.curve[-1]) == pytest.approx(1 - float(left.square().sum() / v.double().square().sum()))
        assert bool((terms.curve.diff() > -1e-12).all())


def test_rows_that_fp32_cannot_tell_apart() -> None:
    """More almost equal rows than candidates are looked at first: the choice is still that of float64."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=g)
    W = base + 1e-6 * torch.randn(300, 64, generator=g)
    V = (base + 1e-4 * torch.randn(20, 64, generator=g)).double()
    ids, value = Atoms(W).strongest(V, torch.zeros(20, 0, dtype=torch.int64))
    rows = W.double() / W.double().norm(dim=1, keepdim=True)
    products = V @ rows.T
    assert ids.tolist() == products.abs().argmax(dim=1).tolist()
    torch.testing.assert_close(value, products.gather(1, ids[:, None])[:, 0], rtol=1e-12, atol=0)
    fp32 = (V.float() @ W.T * (1 / W.norm(dim=1))).abs().argmax(dim=1)
    assert fp32.tolist() != ids.tolist(), "the case is too easy: fp32 alone gets it right"


def test_equal_rows_go_to_the_lower_id_and_are_used_once() -> None:
    W = torch.eye(4).repeat(3, 1)
    (terms,) = matching_pursuit(torch.tensor([[0.0, -2.0, 1.0, 0.0]], dtype=torch.float64), Atoms(W), 4)
    assert terms.features.tolist() == [1, 2]
    assert terms.coefficients.tolist() == [-2.0, 1.0]


def test_a_sparse_vector_ends_early_and_a_batch_equals_its_rows() -> None:
    W = dictionary("unit")
    V = torch.stack([2 * W[5] - W[9], W[100] + 0.5 * W[101] - 0.3 * W[102], torch.ones(W.shape[1])]).double()
    together = matching_pursuit(V, Atoms(W), 8)
    assert [len(terms.features) for terms in together] == [2, 3, 8]
    for v, terms in zip(V, together):
        (alone,) = matching_pursuit(v[None], Atoms(W), 8)
        assert alone.features.tolist() == terms.features.tolist()
        torch.testing.assert_close(alone.coefficients, terms.coefficients, rtol=1e-12, atol=1e-12)


def test_excluded_rows_are_never_chosen() -> None:
    W = dictionary("unit")
    v = (3 * W[4] + W[8]).double()
    excluded = torch.zeros(len(W), dtype=torch.bool)
    excluded[4] = True
    (terms,) = matching_pursuit(v[None], Atoms(W, excluded), 6)
    (other,) = matching_pursuit(v[None], Atoms(W), 6)
    assert 4 not in terms.features.tolist()
    assert set(other.features.tolist()) == {4, 8}


def test_gradient_pursuit_finds_the_same_where_it_is_easy() -> None:
    W = dictionary("unit", D=128)
    V = torch.stack([2 * W[5] - W[9] + 0.7 * W[77], torch.randn(128, generator=torch.Generator().manual_seed(1))])
    easy, hard = gradient_pursuit(V.double(), Atoms(W), 5)
    assert set(easy.features[:3].tolist()) == {5, 9, 77}
    for v, terms in zip(V.double(), (easy, hard)):
        rows = W[terms.features].double()
        rows = rows / rows.norm(dim=1, keepdim=True)
        left = v - terms.coefficients @ rows
        assert float((rows @ left).abs().max()) < 1e-9, "not the least-squares fit of its features"
        assert terms.curve is not None
        assert bool((terms.curve.diff() > -1e-12).all())
