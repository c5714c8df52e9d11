"""What a step counts, in Triton against PyTorch."""

import pytest
import torch

pytest.importorskip("triton")

from steersman.kernels import torch_ops, triton_counters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("N", "k", "L"), [(300, 7, 2500), (1, 1, 1), (0, 3, 5), (64, 16, 1024)])
def test_steps_are_counted_alike(N: int, k: int, L: int) -> None:
    """Negative values are active, NaN and 0 are not; entries may share a latent."""
    g = torch.Generator().manual_seed(N)
    limits = torch.tensor([2, 3], dtype=torch.int32, device=DEVICE)
    silent = torch.randint(0, 5, (L,), generator=g, dtype=torch.int32).to(DEVICE)
    found = []
    for _ in range(2):
        values = torch.randn(N, k, generator=g).to(DEVICE)
        values[values.abs() < 0.5] = 0.0
        values[values > 2.0] = float("nan")
        indices = torch.randint(0, L, (N, k), generator=g, dtype=torch.int32).to(DEVICE)
        counts = []
        for implementation in (torch_ops, triton_counters):
            fired, n_active = torch.zeros(L, device=DEVICE), torch.full((1,), 5.0, dtype=torch.float64, device=DEVICE)
            implementation.mark_active(values, indices, fired, n_active)
            silence = silent.clone()
            reached = implementation.count_silence(silence, fired, limits)
            counts.append((fired > 0, n_active, silence, reached))
        for want, got in zip(*counts):
            assert torch.equal(want, got)
        silent = counts[0][2]
        found.append(counts[0])
    assert float(found[0][1]) > 5.0 or N <= 1
