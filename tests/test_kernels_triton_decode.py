"""The Triton decoder against its reference. Without a GPU it runs under Triton's interpreter (see conftest.py)."""

import pytest
import torch

pytest.importorskip("triton")

from steersman.kernels import reference, torch_ops, triton_centre, triton_decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def code(N: int, L: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(N * L + k)
    indices = torch.stack([torch.randperm(L, generator=generator)[:k] for _ in range(N)]) if N else torch.zeros(0, k)
    values = torch.randn(N, k, generator=generator).relu()
    return values.to(DEVICE), indices.int().to(DEVICE)


SHAPES = [(1, 5, 3, 1), (3, 50, 300, 9), (2, 40, 770, 8), (4, 9, 16, 9), (0, 9, 16, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "L", "D", "k"), SHAPES)
def test_equals_the_reference(N: int, L: int, D: int, k: int, dtype: torch.dtype) -> None:
    values, indices = code(N, L, k)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(L, D, generator=generator).to(DEVICE, dtype)
    b = torch.randn(D, generator=generator).to(DEVICE)
    expected = reference.sparse_decode(values, indices, W, b)
    torch.testing.assert_close(triton_decode.sparse_decode(values, indices, W, b), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(triton_decode.sparse_decode(values, indices, W), expected - b, rtol=1e-5, atol=1e-5)
    spread = torch.stack([b, torch.zeros_like(b)], dim=1)[:, 0]  # a bias may be a column of something wider
    torch.testing.assert_close(triton_decode.sparse_decode(values, indices, W, spread), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("N", "L", "D", "k"), [*SHAPES, (2, 200, 40, 150)])
def test_residual_and_dots_equal_the_reference(
    N: int, L: int, D: int, k: int, signed: bool, dtype: torch.dtype
) -> None:
    """More entries than are held at once, too, and inputs in a range of the columns of something wider."""
    values, indices = code(N, L, k)
    if signed:
        values = torch.where(indices % 3 == 0, -values, values)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(L, D, generator=generator).to(DEVICE, dtype)
    b, x = torch.randn(D, generator=generator).to(DEVICE), torch.randn(N, D + 3, generator=generator).to(DEVICE, dtype)
    for bias, rows, scale in ((b, x[:, 3:], 0.7), (None, x[:, :D], 1.0)):
        expected = reference.decode_and_dots(values, indices, W, bias, rows, scale, dtype)
        for implementation in (triton_decode, torch_ops):
            found = implementation.decode_and_dots(values, indices, W, bias, rows, scale, dtype)
            # A residual that is summed in another order may round to the other side.
            off = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found[0], expected[0], rtol=off, atol=off)
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("k", [4, 150])
def test_dots_are_those_of_the_residual_before_it_is_rounded_and_the_same_twice(k: int) -> None:
    values, indices = code(3, 200, k)
    generator = torch.Generator().manual_seed(1)
    W, x = (torch.randn(n, 40, generator=generator).to(DEVICE, torch.bfloat16) for n in (200, 3))
    exact = triton_decode.decode_and_dots(values, indices, W, None, x, 1.0, torch.float32)
    rounded = triton_decode.decode_and_dots(values, indices, W, None, x, 1.0, torch.bfloat16)
    assert torch.equal(rounded[0], exact[0].bfloat16())
    assert torch.equal(rounded[1], exact[1])
    assert torch.equal(rounded[2], exact[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D"), [(1, 3), (7, 40), (5, 1100), (0, 8)])
def test_rows_are_scaled_centred_and_rounded_once(N: int, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D + 3, generator=generator).to(DEVICE, dtype)[:, 3:]
    b = torch.randn(D, generator=generator).to(DEVICE)
    for bias in (b, None):
        for out in (torch.float32, torch.bfloat16):
            want = reference.centre(x, 0.7, bias, out)
            for implementation in (triton_centre, torch_ops):
                got = implementation.centre(x, 0.7, bias, out)
                assert got.dtype == out
                assert got.is_contiguous()
                torch.testing.assert_close(got, want)


def test_entries_of_value_zero_read_nothing() -> None:
    values, indices = torch.tensor([[2.0, 0.0]]).to(DEVICE), torch.tensor([[0, 1]], dtype=torch.int32).to(DEVICE)
    W = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]).to(DEVICE)
    assert triton_decode.sparse_decode(values, indices, W).tolist() == [[2.0, 4.0]]
    x = torch.tensor([[3.0, 3.0]], device=DEVICE)
    residual, squares, dots = triton_decode.decode_and_dots(values, indices, W, None, x, 1.0, torch.float32)
    assert (residual.tolist(), squares.tolist(), dots.tolist()) == ([[1.0, -1.0]], [2.0], [[-1.0, 0.0]])


def test_a_nan_in_the_code_is_a_nan_in_the_result() -> None:
    values, indices = code(3, 20, 4)
    values[1, 2] = torch.nan
    out = triton_decode.sparse_decode(values, indices, torch.ones(20, 24, device=DEVICE))
    assert out.isnan().all(dim=1).tolist() == [False, True, False]


def test_indices_of_both_widths_and_views() -> None:
    values, indices = code(4, 30, 6)
    W = torch.randn(12, 30, generator=torch.Generator().manual_seed(2)).to(DEVICE).T
    out = triton_decode.sparse_decode(values[::2], indices[::2], W)
    assert torch.equal(out, triton_decode.sparse_decode(values[::2], indices[::2].long(), W))
    torch.testing.assert_close(out, reference.sparse_decode(values[::2], indices[::2], W), rtol=1e-5, atol=1e-5)
