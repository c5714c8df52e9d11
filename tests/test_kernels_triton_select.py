"""The selection between the waves of the Triton encoders; without a GPU, under the interpreter (see conftest.py)."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from steersman.kernels import triton_select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
C = 128


def rows_of(name: str, n: int) -> Tensor:
    """Values [14, n] that a bound finds hard."""
    values = torch.randn(14, n, generator=torch.Generator().manual_seed(n))
    if name == "ties":
        return values.round()
    if name == "all equal":
        return torch.full_like(values, -2.0)
    if name == "extremes":
        values[:, ::7], values[:, 1::5], values[::2, 2] = torch.inf, -torch.inf, torch.nan
    elif name == "wide":
        values = values.sign() * 10 ** (12 * values)
    return values


@pytest.mark.parametrize("name", ["random", "ties", "all equal", "extremes", "wide"])
@pytest.mark.parametrize(("n", "k", "signed"), [(128, 16, False), (60, 1, True), (30, 16, False)])
def test_tighten_loses_none_of_the_largest_and_bounds_them(name: str, n: int, k: int, signed: bool) -> None:
    """Over every window of a buffer; one row more has lost candidates, and one has fewer than k."""
    values = rows_of(name, n)
    buffer = torch.zeros(16, C, dtype=torch.int64, device=DEVICE)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    buffer[:14, :n] = triton_select.reduce(values.to(DEVICE), n, C, signed=signed)[:, order]
    buffer[14] = buffer[0]
    count = torch.tensor([n] * 14 + [C + 9, 0], dtype=torch.int32, device=DEVICE)
    tau = torch.full((16,), -torch.inf, device=DEVICE)
    triton_select.tighten(buffer, count, tau, k)
    size = values.abs() if signed else values
    largest, latents = (t[:, :k] for t in torch.sort(size, dim=1, descending=True, stable=True))
    assert (count[:14] <= k + k // 8).all()
    assert (count[:14] >= k).all()
    assert count[14:].tolist() == [C + 9, 0]
    assert tau[14:].tolist() == [torch.inf, -torch.inf]
    if n > k + k // 8:
        kth = largest[:, -1].where(~largest[:, -1].isnan(), torch.inf)
        assert (tau[:14].cpu() <= kth).all()
        reached = ~(size < tau[:14, None].cpu())
        assert (reached.sum(dim=1) >= k).all()
    out, indices = torch.empty(14, k, device=DEVICE), torch.empty(14, k, dtype=torch.int32, device=DEVICE)
    triton_select.finish(buffer[:14], count[:14], k, out, indices, signed=signed)
    assert torch.equal(indices.cpu().long(), latents)
    want = values.gather(1, latents)
    torch.testing.assert_close(out.cpu(), want if signed else want.relu(), rtol=0, atol=0, equal_nan=True)
