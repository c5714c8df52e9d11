"""Which implementation of the kernels runs where: the choice, one signature for all, and what is refused."""

import inspect
import sys
from pathlib import Path

import pytest
import torch

from steersman import kernels
from steersman.commands import eval as eval_command
from steersman.commands import steer as steer_command
from steersman.errors import SteersmanError
from steersman.kernels import choose, dispatch, ops, reference, torch_ops, update, using
from steersman.sae import SAE, SAEConfig

CPU = torch.device("cpu")


def test_the_cpu_runs_pytorch_unless_told_otherwise() -> None:
    assert choose(CPU) is choose(CPU, "auto") is choose(CPU, "torch") is torch_ops
    with pytest.raises(SteersmanError, match="no kernels named 'cuda'; have auto, triton, torch"):
        choose(CPU, "cuda")


@pytest.mark.parametrize(
    "name",
    ["topk_encode", "batch_topk_encode", "threshold_encode", "threshold_select", "centre", "sparse_decode",
     "decode_and_dots", "value_gradient"],
)  # fmt: skip
def test_every_implementation_has_the_functions_of_the_reference_and_their_signatures(name: str) -> None:
    pytest.importorskip("triton")
    from steersman.kernels import triton_ops

    expected = inspect.signature(getattr(reference, name))
    for implementation in (torch_ops, triton_ops):
        assert inspect.signature(getattr(implementation, name)) == expected, implementation.__name__


@pytest.mark.parametrize(("old", "new"), [("Fused", kernels.UpdateState), ("Rule", kernels.UpdateRule)])
def test_old_names_warn(old: str, new: type) -> None:
    with pytest.warns(DeprecationWarning, match=f"kernels.{old} is"):
        assert getattr(kernels, old) is new


def test_operators_and_autograd_take_the_arguments_of_the_reference() -> None:
    for name in ("topk_encode", "centre", "decode_and_dots"):
        expected = inspect.signature(getattr(reference, name)).parameters
        operator = getattr(torch.ops.steersman, name).default._schema.arguments
        assert [argument.name for argument in operator] == list(expected)
    assert inspect.signature(kernels.topk_encode).parameters == inspect.signature(reference.topk_encode).parameters
    assert inspect.signature(ops.decode_and_dots) == inspect.signature(reference.decode_and_dots)


def test_the_update_has_one_signature_and_sorts_have_the_same_methods() -> None:
    pytest.importorskip("triton")
    from steersman.kernels import triton_ops

    for function in (ops.backward_update, triton_ops.backward_update):
        assert inspect.signature(function) == inspect.signature(update.backward_update)
    for name in ("scatter_rows", "scatter", "value_gradient", "of", "shapes"):
        expected = list(inspect.signature(getattr(torch_ops.LatentOrder, name)).parameters)
        assert list(inspect.signature(getattr(triton_ops.LatentOrder, name)).parameters) == expected


def test_triton_on_the_cpu_is_an_error_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(
        SteersmanError, match="kernels=triton cannot run on cpu: they run on NVIDIA GPUs; use kernels=torch"
    ):
        choose(CPU, "triton")
    with pytest.raises(SteersmanError, match="cannot run on cpu"), using("triton", CPU):
        pass
    assert choose(CPU) is torch_ops


def test_commands_and_training_refuse_what_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("triton").knobs.runtime, "interpret", False)
    nothing, device = str(tmp_path / "none"), "cpu"
    for run, config in (
        (eval_command.run, eval_command.EvalCommand(sae=nothing, store=nothing, device=device, kernels="triton")),
        (
            steer_command.run,
            steer_command.SteerCommand(model=nothing, sae=nothing, feature=("1=2",), device=device, kernels="triton"),
        ),
    ):
        with pytest.raises(SteersmanError, match="kernels=triton cannot run on cpu"):
            run(config)


def test_using_is_undone_at_the_end() -> None:
    with pytest.raises(SteersmanError, match="no kernels named"), using("fast"):
        pass
    with pytest.raises(RuntimeError, match="inside"), using("torch", CPU):
        raise RuntimeError("inside")
    assert dispatch._state["requested"] == "auto"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SteersmanError, match="Triton is not installed"):
        choose(CPU, "triton")
    assert choose(CPU) is torch_ops


@pytest.mark.skipif(not Path(dispatch.__file__).with_name("triton_ops.py").exists(), reason="no Triton kernels")
def test_an_sae_runs_on_triton_with_no_change_of_call() -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter's check")
    knobs = pytest.importorskip("triton").knobs
    assert knobs.runtime.interpret
    sae = SAE(SAEConfig(d_in=8, d_sae=40, k=4), torch.Generator().manual_seed(0))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected, dense = sae.encode_sparse(x), sae.encode(x)
    with using("triton", CPU):
        code, reconstruction = sae.encode_sparse(x), sae(x)
    assert (code.values - expected.values).abs().max() < 0.03 * expected.values.max()
    torch.testing.assert_close(reconstruction, sae.decode_sparse(code.values, code.indices))
    assert reconstruction.shape == x.shape
    assert dense.shape == (3, 40)


@pytest.mark.parametrize(
    ("capability", "version", "obstacle"),
    [
        ((7, 5), "3.9.0", "they need 8.0"),
        ((8, 0), "3.6.0", None),
        ((9, 0), "3.6.0", None),
        ((10, 0), "3.9.0", None),
        ((12, 0), "3.10.1", None),
        ((10, 0), "3.7.1", "needs Triton 3.9, and this is 3.7.1"),
    ],
)
def test_which_gpus_the_kernels_run_on(
    capability: tuple[int, int], version: str, obstacle: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    found = dispatch._obstacle_of(*capability)
    assert found is None if obstacle is None else obstacle in str(found)
