"""The Triton encoder against its reference. Without a GPU it runs under Triton's interpreter (see conftest.py)."""

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import PRECISIONS, integers
from torch import Tensor

pytest.importorskip("triton")

from steersman.errors import SteersmanError
from steersman.kernels import operands, reference, tiles, triton_encode, triton_ops, triton_select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = triton_encode.plan


@pytest.fixture(autouse=True, params=PRECISIONS)
def _small_waves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers of 128 slots, so that a few hundred latents make several waves; no path of its own for a few tokens."""
    monkeypatch.setattr(triton_encode, "SMALL_BATCH", 0)
    monkeypatch.setattr(triton_encode, "plan", functools.partial(PLAN, smallest=128, largest=128))
    with operands.precision(request.param):
        yield


def check(x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False) -> int:
    """Encode and compare with the reference bit by bit; returns how many rows were recomputed."""
    expected_values, expected_indices = reference.topk_encode(x, W, b, k, b_dec, signed=signed)
    b_dec = None if b_dec is None else b_dec.to(DEVICE)
    got = triton_encode.topk_encode_counted(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), k, b_dec, signed=signed)
    values, indices, n_failed = (t.cpu() for t in got)
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int32
    wrong = (indices != expected_indices).nonzero()[:5]
    assert len(wrong) == 0, f"first wrong indices at {wrong.tolist()}"
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    return int(n_failed)


@pytest.mark.parametrize(
    ("N", "L", "D", "k"),
    [(1, 7, 3, 7), (1, 65, 5, 1), (3, 129, 8, 2), (17, 300, 33, 5), (5, 700, 40, 31), (2, 131, 1, 64), (9, 64, 7, 3)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_equals_the_reference(N: int, L: int, D: int, k: int, signed: bool) -> None:
    x, W, b, b_dec = integers(N, D, seed=1), integers(L, D, seed=2), integers(L, seed=3), integers(D, seed=4)
    n_failed = check(x, W, b, k, b_dec, signed=signed)
    assert n_failed == 0 or 16 * k > 128  # such a buffer is as small as the fixture makes it, and may overflow


@pytest.mark.parametrize("few", [1, 16])
@pytest.mark.parametrize("L", [40, 2100])
@pytest.mark.parametrize("signed", [False, True])
def test_few_tokens(few: int, L: int, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_encode, "SMALL_BATCH", 64)
    x, W, b, b_dec = integers(few, 9, seed=1), integers(L, 9, seed=2), integers(L, seed=3), integers(9, seed=4)
    assert check(x, W, b, 9, b_dec, signed=signed) == 0
    x[0, 3] = torch.nan
    check(x, W, b, 9, b_dec, signed=signed)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 260), st.integers(1, 20), st.integers(1, 40), st.integers(0, 99), st.booleans()
)
def test_any_shape(N: int, L: int, D: int, k: int, seed: int, signed: bool) -> None:
    x, W, b = integers(N, D, seed=seed), integers(L, D, seed=seed + 1), integers(L, seed=seed + 2)
    check(x, W, b, min(k, L), signed=signed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True])
def test_weights_of_the_products_dtype_are_used_as_they_are(dtype: torch.dtype, signed: bool) -> None:
    x, W, b = integers(4, 16, seed=1), integers(200, 16, seed=2), integers(200, seed=3)
    expected, _ = reference.topk_encode(x, W, b, 6, signed=signed)
    values, _ = triton_encode.topk_encode(x.to(DEVICE, dtype), W.to(DEVICE, dtype), b.to(DEVICE), 6, signed=signed)
    assert torch.equal(values.cpu(), expected)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp32", 1e-5)])
def test_products_of_fp32_weights(precision: operands.Precision, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 48, generator=generator) for n in (6, 400))
    b = torch.zeros(400)
    Z = reference.pre_activations(x.double(), W, b)
    with operands.precision(precision):
        values, indices = triton_encode.topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 8)
    assert (values.cpu() - Z.gather(1, indices.cpu().long())).abs().max() < tolerance * Z.abs().max()
    assert (values[:, :-1] >= values[:, 1:]).all()
    expected, _ = reference.topk_encode(x, W, b, 8)
    assert (values.cpu() - expected).abs().max() < tolerance * Z.abs().max()


def adversarial(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [6, 8], W [500, 8] and b [500] whose rows a selection finds hard."""
    x, W, b = integers(6, 8, seed=1), integers(500, 8, seed=2), torch.zeros(500)
    if name == "all equal":
        W.zero_()
        b.fill_(2.0)
    elif name == "all zero":
        W.zero_()
    elif name == "all negative":
        b.fill_(-1000.0)
    elif name == "few positive":
        b.fill_(-1000.0)
        b[[3, 250, 499]] = 1000.0
    elif name == "rising":  # every latent is above all before it: more candidates than a buffer holds
        b = 100.0 * torch.arange(500.0)
    elif name == "one hot tile":
        b[320:384] = 500.0
    elif name == "two blocks of ties":
        W.zero_()
        b[100:400] = 1.0
    elif name == "infinite":
        b[[5, 130, 131, 499]] = torch.inf
        b[200:300] = -torch.inf
    elif name == "nan token":
        x[2, 4] = torch.nan
    elif name == "nan latent":
        W[333, 0] = torch.nan
    elif name == "nan bias":
        b[[10, 140, 470]] = torch.nan
    elif name == "infinite token":
        x[1, 1], x[3, 2] = torch.inf, -torch.inf
    elif name == "minus zero":
        W.zero_()
        b[::2] = -0.0
    return x, W, b


SLOW = {"rising": 6, "nan token": 1}
"""Rows of each case that have to take the exact slow path; the others must not."""


@pytest.mark.parametrize(
    "name",
    ["all equal", "all zero", "all negative", "few positive", "rising", "one hot tile", "two blocks of ties",
     "infinite", "nan token", "nan latent", "nan bias", "minus zero"],
)  # fmt: skip
@pytest.mark.parametrize("signed", [False, True])
def test_adversarial_rows(name: str, signed: bool) -> None:
    x, W, b = adversarial(name)
    # Infinities of both signs are the largest of a signed code: more of them than a buffer holds, in some rows.
    n_slow = 5 if signed and name == "infinite" else SLOW.get(name, 0)
    assert check(x, W, b, 10, signed=signed) == n_slow


@pytest.mark.parametrize(
    "name", ["falling", "both signs of one size", "two blocks of opposite ties", "zero but for few"]
)
def test_adversarial_rows_of_a_signed_code(name: str) -> None:
    x, W, b = adversarial("all zero")
    if name == "falling":  # every latent is below all before it, and larger
        b = -100.0 * torch.arange(500.0)
    elif name == "both signs of one size":
        b = torch.tensor([2.0, -2.0]).repeat(250)
    elif name == "two blocks of opposite ties":
        b[100:300], b[300:450] = -1.0, 1.0
    else:  # the last wave's tile reaches past the latents, and most sizes are 0
        b[[130, 499]] = torch.tensor([3.0, -4.0])
    assert check(x, W, b, 10, signed=True) == (6 if name == "falling" else 0)


def test_infinite_tokens_make_nan_or_infinity() -> None:
    x, W, b = adversarial("infinite token")
    values, _ = triton_encode.topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 10)
    assert not values[[1, 3]].isfinite().any()
    assert values[[0, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize(("dead", "n_slow"), [(range(125), 3), (range(0, 500, 4), 0)])
def test_dead_latents_are_slow_only_where_they_fill_the_first_wave(dead: range, n_slow: int) -> None:
    """Fewer than k live latents among the first 128 give a bound that all later ones exceed."""
    x, W, b = integers(3, 4, seed=1), integers(500, 4, seed=2), integers(500, seed=3)
    b[list(dead)] = -1e4
    assert check(x, W, b, 10) == n_slow


@pytest.mark.parametrize("programs", [1, 5])
def test_rescued_rows_of_several_blocks(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of rows, whose keys lie in their own buffers or, with programs enough, in slots of each program's."""
    monkeypatch.setattr(tiles, "processors", lambda _: programs)
    W, b = integers(270, 4, seed=2), 50.0 * torch.arange(270.0)
    x = integers(19, 4, seed=1)
    x[17, 0] = torch.nan
    assert check(x, W, b, 12) == 19


def test_one_failing_row_takes_every_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "processors", lambda _: 4)
    x, W, b = integers(3, 4, seed=1), integers(500, 4, seed=2), integers(500, seed=3)
    x[:, 0], W[:, 0] = torch.tensor([0.0, 1.0, 0.0]), 50.0 * torch.arange(500.0)
    assert check(x, W, b, 12) == 1


def test_nothing_to_encode_and_wrong_k() -> None:
    W, b = torch.zeros(6, 4, device=DEVICE), torch.zeros(6, device=DEVICE)
    values, indices = triton_encode.topk_encode(torch.zeros(0, 4, device=DEVICE), W, b, 3)
    assert values.shape == indices.shape == (0, 3)
    for k in (0, 7):
        with pytest.raises(SteersmanError, match="between 1 and the 6 latents"):
            triton_ops.topk_encode(torch.zeros(2, 4, device=DEVICE), W, b, k)


def test_k_beyond_the_kernels_is_computed_all_the_same() -> None:
    x, W, b = integers(2, 4, seed=1), integers(600, 4, seed=2), integers(600, seed=3)
    values, indices = triton_ops.topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 520)
    expected = reference.topk_encode(x, W, b, 520)
    assert torch.equal(values.cpu(), expected[0])
    assert torch.equal(indices.cpu(), expected[1])


def test_latents_that_signed_keys_cannot_number_are_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_encode, "MOST_SIGNED", 50)
    x, W, b = integers(2, 4, seed=1), integers(60, 4, seed=2), integers(60, seed=3)
    got = triton_ops.topk_encode(x.to(DEVICE), W.to(DEVICE), b.to(DEVICE), 5, signed=True)
    for a, expected in zip(got, reference.topk_encode(x, W, b, 5, signed=True)):
        assert torch.equal(a.cpu(), expected)


@pytest.mark.parametrize("signed", [False, True])
def test_keys_order_values_and_give_them_back(signed: bool) -> None:
    values = torch.tensor([[0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, torch.nan, -3e-39, 2e38, -2e38]])
    values = values.repeat(1, 4)
    keys = triton_select.reduce(values.to(DEVICE), 40, 64, signed=signed)
    out, latents = torch.empty(1, 40, device=DEVICE), torch.empty(1, 40, dtype=torch.int32, device=DEVICE)
    triton_select.finish(keys, None, 40, out, latents, signed=signed)
    size = values.abs() if signed else values
    expected = torch.sort(size, dim=1, descending=True, stable=True).indices
    assert torch.equal(latents.cpu().long(), expected)
    want = values.gather(1, expected)
    torch.testing.assert_close(out.cpu(), want if signed else want.relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("L", "k"), itertools.product([1, 100, 4096, 65536, 131072, 1_048_576, 1_000_003], [1, 32, 512])
)
def test_waves_cover_every_latent_once(L: int, k: int) -> None:
    k = min(k, L)
    plan = PLAN(L, k)
    assert plan.waves[0][0] == 0
    assert plan.waves[-1][1] == L
    assert all(a[1] == b[0] for a, b in itertools.pairwise(plan.waves))
    assert min(plan.slots, L) == plan.waves[0][1]
    assert plan.slots >= k
    assert all(last <= 4.6 * max(first, plan.slots) for first, last in plan.waves)
    assert plan.slots * 8 <= 0.1 * 2 * L or L < 65536 or k == 512


class TestOperands:
    def test_a_copy_is_kept_until_the_weights_change(self) -> None:
        W = torch.randn(6, 10, requires_grad=True)
        first = operands.weights(W.T, torch.bfloat16)
        assert first.shape == (10, 8)
        assert torch.equal(first[:, :6], W.T.bfloat16())
        assert not first[:, 6:].any()
        assert operands.weights(W.T, torch.bfloat16) is first
        with torch.no_grad():
            W.mul_(2.0)
        second = operands.weights(W.T, torch.bfloat16)
        assert torch.equal(second[:, :6], W.T.bfloat16())

    def test_rows_of_a_changed_shape_or_dtype_are_copied_anew(self) -> None:
        W = torch.randn(16, 8)
        assert operands.weights(W, torch.float32).data_ptr() == W.data_ptr()
        assert operands.weights(W, torch.bfloat16).shape == (16, 8)
        assert operands.weights(W[:5], torch.bfloat16).shape == (5, 8)
        assert operands.weights(W, torch.float16).dtype == torch.float16

    @pytest.mark.parametrize("few", [0, 64])
    def test_one_row_with_any_stride(self, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_encode, "SMALL_BATCH", few)
        W, b = integers(30, 8, seed=2), integers(30, seed=3)
        for x in (integers(5, 9, seed=1)[3:4, :8], integers(8, 1, seed=1).T, integers(3, 9, seed=1)[1:2, 1:]):
            assert len({x.stride(0), x.shape[1]}) == 2
            check(x, W, b, 4)
            check(W, x, b[:1], 1)  # a dictionary of one latent

    def test_tensors_of_inference_mode(self) -> None:
        with torch.inference_mode():
            W = torch.randn(16, 8)
            assert torch.equal(operands.weights(W, torch.bfloat16), W.bfloat16())

    def test_an_unknown_precision(self) -> None:
        with pytest.raises(SteersmanError, match="no precision 'fp8'"), operands.precision("fp8"):  # pyright: ignore[reportArgumentType]
            pass
