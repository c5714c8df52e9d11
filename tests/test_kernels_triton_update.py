"""The fused update in Triton against its definition, step by step, and the same bits from two runs."""

from functools import partial

import pytest
import torch
from support.updates import problem
from support.updates import train as train_on

from steersman.kernels import UpdateRule, UpdateState, triton_backward, triton_update, update
from steersman.kernels.update import RuleName, StateDtype

train = partial(train_on, device="cuda" if torch.cuda.is_available() else "cpu")


def everything(state: UpdateState) -> dict[str, torch.Tensor]:
    weights, rows, _ = state.flatten()
    named = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec", "enc_rows", "dec_rows"), weights + rows))
    return named | state.state()


RULES: list[tuple[RuleName, StateDtype, torch.dtype]] = [
    ("adam", "float32", torch.float32),
    ("adam", "int8", torch.bfloat16),
    ("adam", "bfloat16", torch.float32),
    ("adam_touched", "int8", torch.float32),
    ("signum", "float32", torch.bfloat16),
    ("signum_touched", "bfloat16", torch.float32),
]


@pytest.mark.parametrize(("name", "state_dtype", "operands"), RULES)
@pytest.mark.parametrize(("L", "D", "signed"), [(9, 5, False), (6, 140, False), (9, 5, True)])
def test_steps_equal_the_definition(
    name: RuleName,
    state_dtype: StateDtype,
    operands: torch.dtype,
    L: int,
    D: int,
    signed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every tensor after three steps, one with AuxK; some latents are hot, and there are several programs. In some
    cases latents of two groups learn different residuals."""
    monkeypatch.setattr(triton_backward, "CHUNK", 8)
    for module in (triton_update, update):
        monkeypatch.setattr(module, "PART", 8)
    monkeypatch.setattr(triton_update, "STRETCH", 4)
    p, rule = problem(3, N=30, L=L, D=D), UpdateRule(name=name, state_dtype=state_dtype)
    grouped = name == "adam_touched" and not signed
    got, losses = train(triton_update, p, rule, 3e-3, operands, signed=signed, grouped=grouped)
    want, want_losses = train(update, p, rule, 3e-3, operands, signed=signed, grouped=grouped)
    assert losses == pytest.approx(want_losses, rel=1e-5)
    for key, value in everything(want).items():
        # Sums differ in their last bits, and a stochastic rounding may then fall on the other side.
        off = (everything(got)[key].float() - value.float()).abs() > 1e-5 * (1 + value.float().abs())
        assert float(off.float().mean()) < (
            0.01 if rule.state_dtype == "float32" and operands != torch.bfloat16 else 0.03
        ), key


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_a_row_too_wide_for_registers_moves_as_any_other(
    state_dtype: StateDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, rule = problem(2, N=9, L=6, D=140), UpdateRule(state_dtype=state_dtype)
    held, _ = train(triton_update, p, rule, 3e-3, torch.bfloat16)
    monkeypatch.setattr(triton_update, "WIDEST_HELD", 100)
    assert not triton_update.tile(140)["HELD"]
    written, _ = train(triton_update, p, rule, 3e-3, torch.bfloat16)
    for key, value in everything(held).items():
        assert torch.equal(value, everything(written)[key]), key


@pytest.mark.parametrize("D", [512, 768, 1024, 1536, 2048, 2304, 2560, 3072, 4096, 5120, 8192])
def test_few_threads_are_idle_in_usual_widths(D: int) -> None:
    tile = triton_update.tile(D)
    assert tile["PIECES"] * tile["BLOCK_D"] <= 1.125 * D
    assert tile["BLOCK_D"] == 128 * tile["num_warps"]


def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backward, "CHUNK", 8)
    p, rule = problem(2, L=8), UpdateRule(state_dtype="int8")
    first, second = (train(triton_update, p, rule, 0.01, torch.bfloat16)[0] for _ in range(2))
    for key, value in everything(first).items():
        assert torch.equal(value, everything(second)[key]), key


@pytest.mark.parametrize(("operands", "steps"), [(torch.float32, 40), (torch.bfloat16, 40)])
def test_training_converges_like_the_reference(operands: torch.dtype, steps: int) -> None:
    """The loss of every step, and the weights after all of them, from one seed."""
    p = problem(steps, N=8, L=3, D=4, k=2)
    got, losses = train(triton_update, p, UpdateRule(), 1e-2, operands)
    want, want_losses = train(update, p, UpdateRule(), 1e-2, operands)
    tolerance = 1e-4 if operands == torch.float32 else 2e-2
    torch.testing.assert_close(losses, want_losses, rtol=tolerance, atol=0)
    for a, b in ((got.W_enc, want.W_enc), (got.W_dec, want.W_dec), (got.b_enc, want.b_enc), (got.b_dec, want.b_dec)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.skipif(torch.cuda.is_available(), reason="records the interpreter's launches")
def test_a_new_number_of_tokens_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two batch sizes every launch has the same constants and numbers, but for one that kernels are not
    specialised on (`test_kernels_compiled` looks at that)."""
    from triton.runtime.interpreter import InterpretedFunction

    run, launches = InterpretedFunction.run, []

    def recording(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        names = dict(zip(self.arg_names, args)) | kwargs
        numbers = {key: value for key, value in names.items() if not isinstance(value, torch.Tensor) and key != "grid"}
        launches[-1].append((self.fn.__name__, numbers))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recording)
    for N in (16, 37):
        launches.append([])
        train(triton_update, problem(1, N=N, L=3), UpdateRule(), 0.01)
    first, second = launches
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, a), (_, b) in zip(first, second):
        differing = {key for key in a if a[key] != b[key]}
        assert differing <= {"n_pairs", "n_halvings", "N", "scale"}, name  # fp32 numbers are never specialised on
