"""The fast PyTorch kernels against the reference, over odd shapes and adversarial rows."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.kernels import cpu_select, reference, torch_ops


def weights(N: int, L: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, D, generator=g),
        torch.randn(L, D, generator=g),
        torch.randn(L, generator=g),
        torch.randn(D, generator=g),
    )


def assert_same_code(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.int32
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(got[1], want[1]), f"first differing rows: {(got[1] != want[1]).any(1).nonzero()[:5].flatten()}"


@pytest.mark.parametrize(
    ("N", "L", "D", "k"),
    [(1, 1, 1, 1), (1, 513, 7, 5), (37, 1000, 33, 16), (65, 4099, 24, 32), (8, 16, 4, 16), (300, 777, 12, 1)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_topk_encode_equals_the_reference(
    N: int, L: int, D: int, k: int, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "ROWS_AT_ONCE", 13)  # several blocks, the last one not full
    monkeypatch.setattr(torch_ops, "BLOCK_BYTES", 4 * 13 * (L // 3 + 1))
    x, W, b_enc, b_dec = weights(N, L, D)
    got = torch_ops.topk_encode(x, W, b_enc, k, b_dec, signed=signed)
    assert_same_code(got, reference.topk_encode(x, W, b_enc, k, b_dec, signed=signed))


def largest(Z: Tensor, k: int, width: int = 100) -> tuple[Tensor, Tensor]:
    """By `cpu_select.Largest` in tiles, and by sorting the rows that it leaves."""
    found = cpu_select.Largest(len(Z), k)
    for first in range(0, Z.shape[1], width):
        found.add(Z[:, first : first + width].contiguous(), first)
    values, indices, left = found.finish()
    values[left], indices[left] = torch_ops._select_by_sort(Z[left], k)
    return values, indices


def adversarial(name: str, L: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    Z = torch.randn(6, L, generator=g)
    if name == "all equal":
        return torch.ones(6, L)
    if name == "all negative":
        return -Z.abs() - 1
    if name == "few positive":
        return torch.where(torch.arange(L) % 100 == 7, Z.abs() + 1, -Z.abs())
    if name == "ties across the boundary":
        return Z.mul(4).round()
    if name == "one hot group":
        Z[:, : L // 8] += 100
        return Z
    if name == "infinite":
        Z[:, 3] = float("inf")
        Z[:, 9] = float("inf")
        return Z
    raise ValueError(name)


@pytest.mark.parametrize("select", [largest, torch_ops._select_branch_free])
@pytest.mark.parametrize("L", [64, 1000, 4096])
@pytest.mark.parametrize(
    "name", ["all equal", "all negative", "few positive", "ties across the boundary", "one hot group", "infinite"]
)
def test_selection_is_exact_on_adversarial_rows(name: str, L: int, select) -> None:
    Z, k = adversarial(name, L), 16
    values, indices = torch.sort(Z, dim=1, descending=True, stable=True)
    assert_same_code(select(Z, k), (values[:, :k], indices[:, :k].int()))


@pytest.mark.parametrize("select", [None, torch_ops._select_by_sort, torch_ops._select_branch_free])
@pytest.mark.parametrize(
    "name", ["all equal", "all negative", "few positive", "ties across the boundary", "one hot group", "infinite"]
)
def test_a_signed_code_is_exact_on_adversarial_rows(name: str, select, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers times a unit vector, so that products are exact; signs alternate."""
    if select is not None:
        monkeypatch.setattr(torch_ops, "_plain_topk", partial(torch_ops._whole_rows, select=select))
    Z = adversarial(name, 1000)[0] * torch.tensor([1.0, -1.0]).repeat(500)
    x, W, b = torch.ones(3, 1), Z.nan_to_num(posinf=9.0)[:, None], torch.zeros(1000)
    b[:9] = torch.where(Z[:9].isinf(), Z[:9], b[:9])
    values, indices = torch_ops.topk_encode(x, W, b, 16, signed=True)
    expected = torch.sort((W[:, 0] + b).abs(), descending=True, stable=True).indices[:16]
    assert indices.tolist() == [expected.tolist()] * 3
    assert torch.equal(values, (W[:, 0] + b)[expected].expand(3, -1))
    want = reference.topk_encode(x, W, b, 16, signed=True)
    assert torch.equal(values, want[0])
    assert torch.equal(indices, want[1])


def test_a_signed_code_says_nan() -> None:
    x, W = torch.randn(4, 8), torch.randn(512, 8)
    x[1, 3] = torch.nan
    for implementation in (reference, torch_ops):
        values, _ = implementation.topk_encode(x, W, torch.zeros(512), 8, signed=True)
        assert values.isnan().any(dim=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("select", [largest, torch_ops._select_branch_free])
def test_a_row_with_nan_says_nan_and_leaves_other_rows_alone(select) -> None:
    Z = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    clean = select(Z.clone(), 8)
    Z[1, 100] = float("nan")
    values, indices = select(Z, 8)
    assert values[1].isnan().any()
    for row in (0, 2, 3):
        assert torch.equal(values[row], clean[0][row])
        assert torch.equal(indices[row], clean[1][row])


def test_selection_does_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_select, "_SHARED", 1)
    Z = torch.randn(11, 1000, generator=torch.Generator().manual_seed(0))
    Z[3, 5], Z[7] = float("nan"), 1.0
    alone = largest(Z, 8)
    for n_threads in (3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        assert_same_code(largest(Z, 8), alone)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_selection_is_exact_on_rows_full_of_ties(data: st.DataObject) -> None:
    L = data.draw(st.integers(1, 300))
    k = data.draw(st.integers(1, L))
    levels = data.draw(st.integers(1, 6))
    seed = data.draw(st.integers(0, 10_000))
    Z = torch.randint(-levels, levels + 1, (5, L), generator=torch.Generator().manual_seed(seed)).float()
    values, indices = torch.sort(Z, dim=1, descending=True, stable=True)
    for select in (largest, torch_ops._select_branch_free):
        assert_same_code(select(Z, k), (values[:, :k], indices[:, :k].int()))


@pytest.mark.parametrize(("N", "L", "k"), [(40, 96, 3), (7, 12, 12), (64, 300, 1)])
@pytest.mark.parametrize("concentrated", [False, True])
def test_batch_topk_equals_the_reference(N: int, L: int, k: int, concentrated: bool) -> None:
    x, W, b_enc, b_dec = weights(N, L, 9)
    if concentrated:  # one token takes far more than its share, so the proposals must be widened
        x[0] *= 50
    values, indices, smallest = torch_ops.batch_topk_encode(x, W, b_enc, k, b_dec)
    *want, want_smallest = reference.batch_topk_encode(x, W, b_enc, k, b_dec)
    assert values.shape == want[0].shape
    dense, code = (torch.zeros(N, L).scatter_add_(1, i.long(), v) for v, i in ((values, indices), want))
    torch.testing.assert_close(dense, code, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(smallest, want_smallest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [torch.tensor(0.5), torch.linspace(-2, 2, 50)])
def test_threshold_encode_equals_the_reference(threshold: Tensor) -> None:
    x, W, b_enc, b_dec = weights(20, 50, 8)
    got = torch_ops.threshold_encode(x, W, b_enc, threshold, b_dec)
    torch.testing.assert_close(got, reference.threshold_encode(x, W, b_enc, threshold, b_dec))


@pytest.mark.parametrize(("N", "L", "D", "K"), [(1, 3, 2, 1), (33, 100, 17, 5), (16, 40000, 8, 4)])
def test_decode_and_gradient_pieces_equal_the_reference(N: int, L: int, D: int, K: int) -> None:
    x, W, _, b_dec = weights(N, L, D)
    g = torch.Generator().manual_seed(2)
    values = torch.randn(N, K, generator=g)
    indices = torch.stack([torch.randperm(min(L, 1000), generator=g)[:K] for _ in range(N)]).int()
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(torch_ops.sparse_decode(values, indices, W, b_dec), reference.sparse_decode(values, indices, W, b_dec))
    close(torch_ops.value_gradient(x, W, indices), reference.value_gradient(x, W, indices))
    for n_latents in (len(x), len(W)):  # no more latents than tokens, and more: in both orders
        few, W_few = indices % n_latents, W[:n_latents]
        got = torch_ops.LatentOrder(few, n_latents).value_gradient(x, W_few)
        close(got, reference.value_gradient(x, W_few, few))
    order = torch_ops.LatentOrder(indices, L)
    close(order.scatter_rows(values, x), reference.scatter_rows(values, x, indices, L))
    want = torch.zeros(L).scatter_add_(0, indices.flatten().long(), values.flatten())
    close(order.scatter(values), want)


def test_two_runs_give_the_same_bits() -> None:
    x, W, b_enc, b_dec = weights(200, 512, 32)
    first, second = (torch_ops.topk_encode(x, W, b_enc, 16, b_dec) for _ in range(2))
    assert torch.equal(first[0], second[0])
    rows = [torch_ops.LatentOrder(c[1], 512).scatter_rows(c[0], x) for c in (first, second)]
    assert torch.equal(rows[0], rows[1])


def test_the_threshold_code_passes_nan_on() -> None:
    x, W, b = torch.randn(3, 4), torch.randn(6, 4), torch.zeros(6)
    x[1, 2] = float("nan")
    for implementation in (reference, torch_ops):
        code = implementation.threshold_encode(x, W, b, torch.full((6,), 0.1))
        assert code[1].isnan().all()
        assert code[[0, 2]].isfinite().all()
