"""BatchTopK and JumpReLU in Triton against their references; without a GPU, under the interpreter (see conftest.py)."""

import functools
from collections.abc import Iterator

import pytest
import torch
from support.helpers import PRECISIONS, integers
from torch import Tensor

pytest.importorskip("triton")

from steersman.kernels import operands, reference, torch_ops, triton_encode, triton_select, triton_threshold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = triton_encode.plan


@pytest.fixture(autouse=True, params=["waves", "few"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once over the waves, with small buffers, and once over the path of a few tokens."""
    few = 64 if request.param == "few" else 0
    for module in (triton_encode, triton_threshold):
        monkeypatch.setattr(module, "SMALL_BATCH", few)
    monkeypatch.setattr(triton_encode, "plan", functools.partial(PLAN, smallest=128, largest=256))
    monkeypatch.setattr(triton_threshold, "THRESHOLD_SLOTS", 128)


@pytest.fixture(autouse=True, params=PRECISIONS)
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    with operands.precision(request.param):
        yield


def problem(N: int, L: int, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc, b_enc and b_dec whose pre-activations are whole numbers, with many ties."""
    return integers(N, D, seed=1), integers(L, D, seed=2), integers(L, seed=3), integers(D, seed=4)


def dense(values: Tensor, indices: Tensor, L: int) -> Tensor:
    return torch.zeros(len(values), L, device=values.device).scatter_add_(1, indices.long(), values)


@pytest.mark.parametrize(("N", "L", "D", "k"), [(1, 40, 3, 4), (5, 300, 9, 3), (9, 500, 16, 2), (3, 20, 4, 20)])
def test_batch_topk(N: int, L: int, D: int, k: int) -> None:
    x, W, b, b_dec = problem(N, L, D)
    want_values, want_indices, smallest = reference.batch_topk_encode(x, W, b, k, b_dec)
    got = triton_threshold.batch_topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), k, b_dec.to(DEVICE))
    assert torch.equal(dense(got[0], got[1], L).cpu(), dense(want_values, want_indices, L))
    assert float(got[2]) == float(smallest)


def test_batch_topk_of_one_loud_token() -> None:
    """One row holds nearly all of the batch's largest values: it proposes more than 4 k."""
    x, W, b, _ = problem(6, 300, 8)
    x[2] *= 1024  # whole numbers in bf16 too
    want_values, want_indices, _ = reference.batch_topk_encode(x, W, b, 8)
    values, indices, _ = triton_threshold.batch_topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 8)
    assert torch.equal(dense(values, indices, 300).cpu(), dense(want_values, want_indices, 300))
    assert (values[2] > 0).sum() > 32


def test_batch_topk_computes_a_crowded_row_again_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values at the threshold go to the earlier token, whose crowded row may have to give some back."""
    x, W, b = integers(5, 8, seed=1), integers(300, 8, seed=2), integers(300, seed=3)
    x[3] *= 50
    x[4] = x[1]
    again = []
    values_from = triton_threshold._values_from
    monkeypatch.setattr(triton_threshold, "_values_from", lambda *a: again.append(a[1]) or values_from(*a))
    want_values, want_indices, smallest = reference.batch_topk_encode(x, W, b, 6)
    got = triton_threshold.batch_topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 6)
    assert torch.equal(dense(got[0], got[1], 300).cpu(), dense(want_values, want_indices, 300))
    assert got[0].shape == want_values.shape
    assert float(got[2]) == float(smallest)
    assert [rows.tolist() for rows in again] == [[3]]


@pytest.mark.parametrize("value", [-5.0, 0.0])
def test_batch_topk_without_positive_values(value: float) -> None:
    W, b = torch.zeros(200, 4, device=DEVICE), torch.full((200,), value, device=DEVICE)
    values, _, smallest = triton_threshold.batch_topk_encode(torch.ones(3, 4, device=DEVICE), W, b, 2)
    assert not values.any()
    assert float(smallest) == float("inf")


def test_batch_topk_passes_on_nan() -> None:
    x, W, b, _ = problem(3, 200, 8)
    x[1, 0] = torch.nan
    values, _, _ = triton_threshold.batch_topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 2)
    assert values.isnan().any()


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize(("N", "L", "D"), [(1, 30, 3), (5, 300, 9), (18, 129, 16)])
def test_threshold(N: int, L: int, D: int, scalar: bool) -> None:
    x, W, b, b_dec = problem(N, L, D)
    threshold = torch.tensor(6.0) if scalar else 10 + integers(L, seed=5) * 5
    expected = reference.threshold_encode(x, W, b, threshold, b_dec)
    arguments = [t.to(DEVICE) for t in (x, W, b, threshold, b_dec)]
    assert torch.equal(triton_threshold.threshold_encode(*arguments).cpu(), expected)
    values, indices = triton_threshold.threshold_select(*arguments)
    assert torch.equal(dense(values, indices, L).cpu(), expected)
    assert values.shape == torch_ops.threshold_select(x, W, b, threshold, b_dec)[0].shape
    assert (values[:, :-1] >= values[:, 1:]).all()


def test_threshold_with_more_active_latents_than_slots() -> None:
    x, W, b, _ = problem(3, 400, 8)
    expected = reference.threshold_encode(x, W, b + 1000, torch.tensor(0.5))
    arguments = [t.to(DEVICE) for t in (x, W, b + 1000, torch.tensor(0.5))]
    values, indices = triton_threshold.threshold_select(*arguments)
    assert values.shape == (3, 400)
    assert torch.equal(dense(values, indices, 400).cpu(), expected)


def test_threshold_computes_an_overflowing_row_again_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b, _ = problem(6, 400, 8)
    x[1], x[4] = 0.0, 1.0
    b += 300.0
    W[:350, 0] -= 200.0
    x[:, 0] = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 2.0])
    sizes = []
    largest = torch_ops.largest_of_code
    monkeypatch.setattr(torch_ops, "largest_of_code", lambda f, n, m: sizes.append(n) or largest(f, n, m))
    expected = reference.threshold_encode(x, W, b, torch.tensor(0.5))
    values, indices = triton_threshold.threshold_select(*[t.to(DEVICE) for t in (x, W, b, torch.tensor(0.5))])
    assert torch.equal(dense(values, indices, 400).cpu(), expected)
    assert values.shape[1] == (expected > 0).sum(dim=1).max()
    assert sizes == ([6] if triton_threshold.SMALL_BATCH else [1])


def test_threshold_passes_on_nan() -> None:
    x, W, b, _ = problem(3, 70, 8)
    x[1, 0] = torch.nan
    arguments = [t.to(DEVICE) for t in (x, W, b, torch.tensor(3.0))]
    assert triton_threshold.threshold_encode(*arguments)[1].isnan().all()
    assert triton_threshold.threshold_select(*arguments)[0][1].isnan().any()


@pytest.mark.parametrize("rank", [1, 2, 50, 99, 100])
def test_rank(rank: int) -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(rank)).round(decimals=1) * 1e3
    expected = values.sort(descending=True).values[rank - 1]
    assert float(triton_threshold.rank_bits(values.to(DEVICE), rank).view(torch.float32)) == float(expected)


def test_rank_among_the_live_keys_of_rows() -> None:
    keys = triton_select.reduce(integers(5, 64, seed=1).to(DEVICE), 64, 64)
    count = torch.tensor([64, 0, 3, 70, 9], dtype=torch.int32)
    upper = (keys.cpu() >> 32).clamp(min=0)  # the bits of a value that is not negative
    live = torch.cat([row[:n] for row, n in zip(upper, count.tolist())]).sort(descending=True).values.tolist()
    for rank in (1, 5, 30, 140, 150):
        got = int(triton_threshold.rank_bits(keys, rank, count.to(DEVICE)))
        assert got == (live[rank - 1] if rank <= len(live) else 0)
