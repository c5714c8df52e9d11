"""The latent-major backward kernels against the reference: odd shapes, dtypes, hot latents, silent ones."""

import pytest
import torch
from torch import Tensor

from steersman.kernels import reference, torch_ops, triton_backward
from steersman.kernels.triton_backward import LatentOrder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def code(N: int, L: int, K: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values and indices [N, K]: every index of a row once; `hot` has latent 2 in every row."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(L, generator=g)[:K] for _ in range(N)])
    if kind == "hot":
        indices = torch.where(indices == 2, indices[:, :1], indices)
        indices[:, 0] = 2
    if kind == "one latent":
        indices[:] = L - 1
    return torch.randn(N, K, generator=g).to(DEVICE), indices.int().to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "L", "D", "K", "kind"),
    [
        (1, 1, 1, 1, "even"),
        (23, 11, 7, 3, "even"),
        (50, 9, 130, 2, "hot"),
        (40, 6, 300, 2, "one latent"),
        (5, 33, 520, 4, "even"),
    ],
)
def test_sums_over_pairs_equal_the_reference(
    N: int, L: int, D: int, K: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backward, "CHUNK", 16)
    values, indices = code(N, L, K, kind)
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(N, D, generator=g).to(DEVICE, dtype)
    W = torch.randn(L, D, generator=g).to(DEVICE, dtype)
    order = LatentOrder(indices, L)
    # Operands are rounded before, sums are fp32: the same tolerance for both dtypes.
    torch.testing.assert_close(
        order.scatter_rows(values, rows), reference.scatter_rows(values, rows, indices, L), rtol=1e-5, atol=1e-5
    )
    want = torch.zeros(L, device=DEVICE).scatter_add_(0, indices.flatten().long(), values.flatten())
    torch.testing.assert_close(order.scatter(values), want, rtol=1e-5, atol=1e-5)
    want = reference.value_gradient(rows, W, indices)
    torch.testing.assert_close(order.value_gradient(rows, W), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(triton_backward.value_gradient(rows, W, indices), want, rtol=1e-5, atol=1e-4)


def test_pairs_may_read_rows_that_are_not_their_tokens() -> None:
    """As those of nested SAEs do, from a table with a row for each token and group."""
    (values, indices), g = code(20, 9, 3, "hot"), torch.Generator().manual_seed(1)
    table, W = torch.randn(40, 5, generator=g).to(DEVICE), torch.randn(9, 5, generator=g).to(DEVICE)
    rows = torch.randint(0, 40, (20, 3), generator=g).to(DEVICE)
    dots = (table[rows] * W[indices.long()]).sum(dim=2)
    sums = torch.zeros(9, 5, device=DEVICE).index_add_(
        0, indices.flatten().long(), (values[..., None] * table[rows]).flatten(0, 1)
    )
    for kind in (LatentOrder, torch_ops.LatentOrder):
        order = kind(indices, 9).reading(rows)
        torch.testing.assert_close(order.value_gradient(table, W), dots, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(order.scatter_rows(values, table), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("N", "K", "L"), [(1, 1, 1), (300, 2, 3), (64, 8, 8), (1000, 1, 500), (257, 1, 1)])
@pytest.mark.parametrize("kind", ["even", "one latent"])
def test_the_sort_lists_every_latents_run(N: int, K: int, L: int, kind: str) -> None:
    _, indices = code(N, L, K, kind)
    order = LatentOrder(indices, L)
    flat = indices.flatten()
    assert order.starts.diff().tolist() == torch.bincount(flat, minlength=L).tolist()
    assert torch.equal(flat[order.pairs], order.latents)
    assert torch.equal(order.pairs // K, order.tokens.long())
    for made, empty in zip(order.tensors, LatentOrder.shapes(indices, L)):
        assert made.shape == empty.shape
        assert made.dtype == empty.dtype


def test_chunks_of_one_latent_are_summed_apart_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backward, "CHUNK", 16)
    values, indices = code(50, 9, 2, "hot")
    order = LatentOrder(indices, 9)
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    z = order.sorted(values)[0]
    chunks = order.chunk_tables(z, rows)[0]
    whole = [c for c in range(100 // 16) if len(order.latents[16 * c : 16 * c + 16].unique()) == 1]
    assert len(whole) >= 2
    for c in whole:
        part = slice(16 * c, 16 * c + 16)
        want = (z[part, None] * rows[order.tokens[part].long()]).sum(dim=0)
        torch.testing.assert_close(chunks[c], want, rtol=1e-5, atol=1e-5)


def test_pairs_that_are_not_active_count_for_nothing() -> None:
    values, indices = code(20, 7, 3, "even")
    g = torch.randn(20, 5, device=DEVICE)
    order = LatentOrder(indices, 7, values > 0)
    assert int(order.starts[-1]) == int((values > 0).sum())
    want = reference.scatter_rows(values.relu(), torch.ones(20, 1, device=DEVICE), indices, 7)[:, 0]
    torch.testing.assert_close(order.scatter(values), want, rtol=1e-5, atol=1e-5)
    z, dz = order.sorted(values, values, 3.0)
    torch.testing.assert_close(dz, 3 * z)
    W = torch.randn(7, 5, device=DEVICE)
    want = torch.where(values > 0, reference.value_gradient(g, W, indices), torch.zeros_like(values))
    torch.testing.assert_close(order.value_gradient(g, W), want, rtol=1e-5, atol=1e-5)


def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backward, "CHUNK", 16)
    values, indices = code(60, 9, 3, "hot")
    rows = torch.randn(60, 12, device=DEVICE)
    first, second = (LatentOrder(indices, 9).scatter_rows(values, rows) for _ in range(2))
    assert torch.equal(first, second)
