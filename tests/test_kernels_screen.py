"""Screening in bf16: what it proves is the exact top-k, and what it cannot prove it says."""

import pytest
import torch
from torch import Tensor

from steersman.kernels import reference, screen, torch_ops


def problem(seed: int, n: int = 300, d: int = 64, n_latents: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    W = torch.randn(n_latents, d, generator=generator)
    return x, W / W.norm(dim=1, keepdim=True), 0.1 * torch.randn(n_latents, generator=generator)


def check(x: Tensor, W: Tensor, b: Tensor, k: int, signed: bool = False) -> Tensor:
    """Compare the proven rows with float64; returns which rows are not proven."""
    values, indices, unproven = screen.prefiltered_topk(x, W, b, k, signed=signed)
    Z = x.double() @ W.double().T + b.double()
    size = Z.abs() if signed else Z
    expected = size.topk(k, dim=1)
    for row in range(len(x)):
        if not unproven[row]:
            # As sets: fp32 may order values that differ by its rounding either way.
            kth = expected.values[row, -1]
            assert (size[row, indices[row]] >= kth - 1e-5).all()
            assert len(set(indices[row].tolist())) == k
            torch.testing.assert_close(values[row].double(), Z[row, indices[row]], atol=2e-5, rtol=1e-5)
    return unproven


@pytest.mark.parametrize("k", [1, 16, 50])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("signed", [False, True])
def test_most_rows_are_proven_and_those_are_exact(k: int, seed: int, signed: bool) -> None:
    assert check(*problem(seed), k, signed).float().mean() < 0.2


def test_columns_that_no_group_holds_are_candidates() -> None:
    x, W, b = problem(0, n_latents=2053)
    b[2050] = 20.0
    values, indices, unproven = screen.prefiltered_topk(x, W, b, 8)
    assert (indices[~unproven, 0] == 2050).all()
    assert check(x, W, b, 8).float().mean() < 0.5
    assert torch.isfinite(values).all()


def test_weights_that_bf16_cannot_tell_apart_are_not_proven() -> None:
    x, W, b = problem(1)
    W = W[:1] + 1e-4 * W  # all latents agree to three digits: bf16 orders them at random
    assert check(x, W, b.zero_(), 16).all()


def test_one_long_row_widens_the_bound_of_all() -> None:
    x, W, b = problem(2)
    before = check(x, W, b, 16).sum()
    W[7] *= 50
    assert check(x, W, b, 16).sum() > before


def test_latents_of_one_size_and_two_signs_tie_in_a_signed_code() -> None:
    x, W, b = problem(1)
    W, b = torch.cat([W[:1024], -W[:1024]]), torch.cat([b[:1024], -b[:1024]])
    assert check(x, W, b, 16, signed=True).all()
    assert check(x, W, b, 16).float().mean() < 0.2


def test_ties_and_nan_are_left_to_the_plain_path() -> None:
    x, W, b = problem(3)
    x[5] = float("nan")
    x[6] = 0.0
    b = torch.zeros_like(b)
    unproven = check(x, W, b, 16)
    assert unproven[5]
    assert unproven[6]


@pytest.mark.parametrize(("n", "m"), [(30, 7), (30, 30), (513, 256), (1500, 20), (1500, 300), (5000, 200)])
def test_largest_keys(n: int, m: int) -> None:
    g = torch.Generator().manual_seed(n + m)
    values = torch.randn(9, n, generator=g).bfloat16()
    values[0, ::3], values[1], values[2, 5] = -0.0, -torch.rand(n, generator=g), float("inf")
    keys = screen._keys(values)
    assert torch.equal(screen._ordered((keys >> 16).short()).view(torch.bfloat16), values)
    assert torch.equal((keys & 0xFFFF)[0], torch.arange(n))
    found = screen._largest_keys(keys, m)
    expected = screen._keys(values).sort(dim=1, descending=True).values[:, :m]
    assert torch.equal(found.sort(dim=1, descending=True).values, expected)
    assert torch.equal(values.gather(1, (expected & 0xFFFF).long()).float(), values.float().topk(m).values)


def test_products_that_may_overflow_are_left_to_the_plain_path() -> None:
    x, W, b = problem(5)
    x[4] *= 1e37
    assert check(x, W, b, 8)[4]


@pytest.mark.parametrize("signed", [False, True])
def test_the_encoder_with_screening_equals_the_reference(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = problem(4, n=200)
    x[3] = 0.0  # every latent ties but for its bias
    x[4:60] = x[4]
    b_dec = torch.randn(64, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(screen, "pays_off", lambda *_: True)
    used = []
    original = screen.prefiltered_topk
    monkeypatch.setattr(screen, "prefiltered_topk", lambda *args, **kw: used.append(1) or original(*args, **kw))
    values, indices = torch_ops.topk_encode(x, W, b, 24, b_dec, signed=signed)
    assert used
    expected_values, expected_indices = reference.topk_encode(x, W, b, 24, b_dec, signed=signed)
    assert signed == bool((expected_values < 0).any())
    torch.testing.assert_close(values, expected_values, atol=2e-5, rtol=1e-5)
    assert (indices == expected_indices).float().mean() > 0.999
    assert indices.dtype == torch.int32


def test_it_is_used_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "has_fast_bf16", lambda: True)
    x, W, _ = problem(0)
    assert screen.pays_off(x, W, 16)
    assert not screen.pays_off(x[:8], W, 16)
    assert not screen.pays_off(x, W[:512], 16)
    assert not screen.pays_off(x, W, 200)
    assert not screen.pays_off(x, torch.empty(1 << 25, 64, device="meta"), 64)  # 2^16 groups and more
    monkeypatch.setattr(screen, "has_fast_bf16", lambda: False)
    assert not screen.pays_off(x, W, 16)
