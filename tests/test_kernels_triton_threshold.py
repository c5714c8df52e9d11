"""BatchTopK and JumpReLU in Triton against their references; without a GPU, under the interpreter (see conftest.py)."""

import functools
from collections.abc import Iterator

import pytest
import torch
from support.helpers import PRECISIONS, integers
from torch import Tensor

pytest.importorskip("triton")

from steersman.kernels import operands, reference, torch_ops, triton_encode, triton_threshold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = triton_encode.plan


@pytest.fixture(autouse=True, params=["waves", "few"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once over the waves, with small buffers, and once over the path of a few tokens."""
    few = 64 if request.param == "few" else 0
    for module in (triton_encode, triton_threshold):
        monkeypatch.setattr(module, "SMALL_BATCH", few)
        monkeypatch.setattr(module, "plan", functools.partial(PLAN, smallest=128, largest=256))
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


def test_threshold_passes_on_nan() -> None:
    x, W, b, _ = problem(3, 70, 8)
    x[1, 0] = torch.nan
    arguments = [t.to(DEVICE) for t in (x, W, b, torch.tensor(3.0))]
    assert triton_threshold.threshold_encode(*arguments)[1].isnan().all()
    assert triton_threshold.threshold_select(*arguments)[0][1].isnan().any()


@pytest.mark.parametrize("rank", [1, 2, 50, 99, 100])
def test_rank_value(rank: int) -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(rank)).round(decimals=1) * 1e3
    expected = values.sort(descending=True).values[rank - 1]
    assert float(triton_threshold.rank_value(values.to(DEVICE), rank)) == float(expected)
