"""Optimiser state in fewer bits: what is kept, that it is right on average, and what happens at the edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steersman.kernels import rounding


def bits(n_rows: int, n_columns: int, seed: int = 0) -> Tensor:
    rows = torch.arange(n_rows, dtype=torch.int32)
    return rounding.random_bits(rows, n_columns, torch.tensor([seed], dtype=torch.int32))


def test_random_bits_are_fair_and_differ_by_row_column_and_seed() -> None:
    random = bits(64, 300)
    ones = torch.stack([(random >> i) & 1 for i in range(32)]).float().mean(dim=(1, 2))
    assert float((ones - 0.5).abs().max()) < 0.02
    assert len(random.unique()) > 0.999 * random.numel()
    assert not (bits(64, 300, seed=1) == random).any(dim=1).all()
    torch.testing.assert_close(bits(64, 300)[10:20], bits(64, 300)[10:20])


def test_the_hash_is_the_published_one() -> None:
    def by_hand(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 0x7FFFFFFF, 123456789]
    got = rounding.mix(torch.tensor(numbers, dtype=torch.int32))
    assert [int(value) % 2**32 for value in got] == [by_hand(number) for number in numbers]


def test_bfloat16_is_right_on_average_and_exact_where_it_can_be() -> None:
    x = torch.full((1000, 100), 1 + 2**-10)  # between the neighbours 1 and 1 + 2^-7
    rounded = rounding.to_bfloat16(x, bits(1000, 100)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(1 + 2**-10, abs=2e-5)
    exact = torch.tensor([[0.0, -2.5, 1e30, float("inf"), float("-inf"), float("nan")]])
    torch.testing.assert_close(
        rounding.to_bfloat16(exact, bits(1, 6)).float(), exact.bfloat16().float(), equal_nan=True
    )


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_are_right_on_average(signed: bool) -> None:
    x = torch.linspace(0.01, 1, 200).repeat(3000, 1)
    if signed:
        x = x * torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    codes, exponents = rounding.to_blocks(x, bits(3000, 200), signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert exponents.shape == (3000, 2)
    back = rounding.from_blocks(codes, exponents)
    assert float((back / x - 1).abs().max()) < 2**-3
    torch.testing.assert_close(back.mean(dim=0), x[0], rtol=4e-3, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=140),
    seed=st.integers(0, 1000),
    signed=st.booleans(),
)
def test_blocks_keep_every_value_within_a_step(values: list[float], seed: int, signed: bool) -> None:
    x = torch.tensor([values])
    x = torch.where(x < 1e-30, torch.zeros_like(x), x)
    x = x * torch.where(torch.arange(len(values)) % 3 == 1, -1.0, 1.0) if signed else x
    back = rounding.from_blocks(*rounding.to_blocks(x, bits(1, len(values), seed), signed))
    largest = torch.cat(
        [block.abs().amax(dim=1, keepdim=True).expand_as(block) for block in x.split(128, dim=1)], dim=1
    )
    kept = x.abs() > largest * 2.0 ** -(rounding.SIGNED_RANGE if signed else rounding.UNSIGNED_RANGE)
    torch.testing.assert_close(back[kept], x[kept], rtol=2**-3, atol=0)
    assert bool((back[x == 0] == 0).all())
    assert bool((back * x >= 0).all())


def test_small_second_moments_never_become_zero_and_small_first_moments_do() -> None:
    x = torch.tensor([[1.0, 1e-15, 0.0]])
    second = rounding.from_blocks(*rounding.to_blocks(x, bits(1, 3), signed=False))
    assert 0 < float(second[0, 1]) < 1e-8
    assert float(second[0, 2]) == 0
    first = rounding.from_blocks(*rounding.to_blocks(-x, bits(1, 3), signed=True))
    assert first.tolist() == [[-1.0, 0.0, 0.0]]
    zeros = torch.zeros(2, 200)
    assert not rounding.from_blocks(*rounding.to_blocks(zeros, bits(2, 200), signed=True)).any()
