"""Updaters: the fused one equals the ordinary one, resumes exactly where it stopped, and refuses what it cannot do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import architectures  # noqa: F401 - registers them
from support.stopping import stopped_before
from support.training import mixture, trainer_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steersman.errors import SteersmanError
from steersman.kernels import UpdateRule, dispatch
from steersman.parallel import Mesh
from steersman.train import ActivationStore, TrainConfig, Trainer, train_sae
from steersman.train.run import dead_latents
from steersman.train.run.optim import AutogradUpdater, FusedUpdater, RuleUpdater, check_ranks, make_updater
from steersman.train.run.recipe import adam_eps

D = 16
CONFIG = TrainConfig(d_sae=64, k=3, batch_size=128, seed=3, device="cpu", tokens=12_800, dead_after=128 * 4)


def train(config: TrainConfig, steps: int = 100) -> tuple[Trainer, list[float]]:
    """The trainer after some steps, and each step's squared error."""
    trainer, errors, x = trainer_of(config), [], mixture(128 * steps, seed=1)
    trainer.fit_encoder_scale(x[:128])
    for part in x.split(128):
        before = float(trainer.sums[0])
        trainer.step(part)
        errors.append(float(trainer.sums[0]) - before)
    return trainer, errors


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
@pytest.mark.parametrize("optimizer", ["adam", "adam_touched", "signum"])
def test_a_hundred_fused_steps_equal_the_ordinary_ones(architecture: Any, optimizer: Any) -> None:
    """AuxK is on from the fifth step. Signs and selections flip on rounding, so later errors are compared loosely."""
    config = replace(CONFIG, architecture=architecture, optimizer=optimizer)
    fused, errors = train(replace(config, fused_update=True))
    ordinary, want = train(config)
    assert isinstance(fused.updater, FusedUpdater)
    assert isinstance(ordinary.updater, AutogradUpdater if optimizer == "adam" else RuleUpdater)
    assert float(ordinary.sums[1]) > 0, "the AuxK loss was never on"
    assert errors[:20] == pytest.approx(want[:20], rel=1e-3)
    assert errors == pytest.approx(want, rel=0.02)
    assert float(fused.sums[1]) == pytest.approx(float(ordinary.sums[1]), rel=0.02)
    assert errors[-1] < 0.7 * errors[0]
    torch.testing.assert_close(fused.sae.W_dec.norm(dim=1), torch.ones(64))


def test_auxk_reaches_the_encoder_of_silent_features_in_the_fused_update() -> None:
    moved = {}
    for coefficient in (0.0, 0.25):
        config = replace(CONFIG, fused_update=True, optimizer="adam_touched", aux_coefficient=coefficient)
        trainer = trainer_of(config)
        with torch.no_grad():
            trainer.sae.b_enc[:10] = -1.0
        *first, last = mixture(128 * 5, seed=1).split(128)
        for part in first:
            trainer.step(part)
        before = trainer.sae.W_enc[:, :10].detach().clone()
        trainer.step(last)
        silent = trainer.dead_latents.silent_steps[:10] == 5
        assert silent.any()
        moved[coefficient] = ((trainer.sae.W_enc[:, :10] - before) != 0).any(dim=0)[silent]
    assert not moved[0.0].any()
    assert moved[0.25].any()


@pytest.mark.parametrize("optimizer", ["adam", "adam_touched"])
def test_thresholds_learn_beside_the_fused_pass(optimizer: Any) -> None:
    config = replace(CONFIG, k=0, architecture="jumprelu", target_l0=3.0, optimizer=optimizer)
    fused, errors = train(replace(config, fused_update=True), 40)
    ordinary, want = train(config, 40)
    assert float(ordinary.sums[1]) > 0, "the AuxK loss was never on"
    assert errors[:20] == pytest.approx(want[:20], rel=1e-3)
    assert errors == pytest.approx(want, rel=0.02)
    penalty = fused.summed.index("l0_penalty")
    assert float(fused.sums[penalty]) == pytest.approx(float(ordinary.sums[penalty]), rel=0.02)
    thresholds = fused.sae.get_parameter("threshold").detach()
    assert float((thresholds.max() - thresholds.min()) / thresholds.mean()) > 0.05, "they learned nothing of their own"
    torch.testing.assert_close(thresholds, ordinary.sae.get_parameter("threshold"), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adam_touched", "signum"])
def test_further_parameters_are_moved_beside_the_fused_pass(optimizer: Any) -> None:
    """By the gradients that the architecture says, as autograd would move them; and their state goes on elsewhere."""
    config = replace(CONFIG, architecture="counting_topk", optimizer=optimizer)
    fused, errors = train(replace(config, fused_update=True), 20)
    ordinary, want = train(config, 20)
    assert errors == pytest.approx(want, rel=1e-3)
    level = fused.sae.get_parameter("level")
    assert (level > 0.1).any()
    torch.testing.assert_close(level, ordinary.sae.get_parameter("level"), rtol=1e-3, atol=1e-4)
    state = fused.updater.state()
    assert ("rule.level.v" in state) == (optimizer != "signum")
    ordinary.updater.restore(state)
    fused.updater.restore(ordinary.updater.state())
    for name, value in fused.updater.state().items():
        assert torch.equal(value, state[name]), name


@pytest.fixture(scope="module")
def full_state_errors() -> list[float]:
    """Each step's squared error with a state of fp32."""
    return train(CONFIG)[1]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_small_state_trains_as_well(state_dtype: Any, fused: bool, full_state_errors: list[float]) -> None:
    _, errors = train(replace(CONFIG, state_dtype=state_dtype, fused_update=fused))
    assert sum(errors[-10:]) < 1.05 * sum(full_state_errors[-10:])


@pytest.mark.parametrize("fused", [False, True])
def test_golden_losses(fused: bool) -> None:
    """Squared error a number after 1, 10 and 50 steps: a change of the arithmetic must be meant."""
    golden = [0.476989, 0.382610, 0.236227]
    _, errors = train(replace(CONFIG, fused_update=fused), 50)
    assert [errors[i] / (128 * D) for i in (0, 9, 49)] == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"fused_update": True},
        {"fused_update": True, "state_dtype": "int8", "ema": 0.9},
        {"fused_update": True, "state_dtype": "bfloat16", "optimizer": "signum", "architecture": "batch_topk"},
        {"fused_update": False, "state_dtype": "int8", "optimizer": "adam_touched", "grad_clip": 0.05},
    ],
    ids=["fused", "fused int8 ema", "fused signum batch_topk", "ordinary int8"],
)
def test_resuming_gives_the_same_bits(options: dict, tmp_path: Path) -> None:
    store = ActivationStore.from_tensors(mixture(20_000).split(5000), tmp_path / "acts", "h", dtype="float32")
    config = replace(CONFIG, tokens=128 * 40, checkpoint_every=15, **options)
    whole = train_sae(store, config, tmp_path / "whole")
    with stopped_before(22):
        train_sae(store, config, tmp_path / "cut")
    cut = train_sae(store, config, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name


@pytest.mark.parametrize("fused_first", [True, False])
def test_a_run_left_free_in_its_updater_resumes_where_another_one_is_chosen(
    fused_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it moves between a GPU, where there are kernels for the fused update, and a CPU or several ranks."""
    store = ActivationStore.from_tensors(mixture(20_000).split(5000), tmp_path / "acts", "h", dtype="float32")
    config = replace(CONFIG, tokens=128 * 40, checkpoint_every=15)
    kinds = []

    def choose_updater(sae: Any, config: TrainConfig, *args: Any) -> Any:
        fused = fused_first == (not kinds)
        kinds.append(fused)
        return make_updater(sae, replace(config, fused_update=fused), *args)

    monkeypatch.setattr("steersman.train.run.trainer.make_updater", choose_updater)
    with stopped_before(22):
        train_sae(store, config, tmp_path / "moved")
    moved = train_sae(store, config, tmp_path / "moved")
    assert kinds == [fused_first, not fused_first]
    monkeypatch.undo()
    stayed = train_sae(store, config, tmp_path / "stayed")
    for name, value in stayed.state_dict().items():
        torch.testing.assert_close(moved.state_dict()[name], value, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused_update": True, "grad_clip": 1.0}, "cannot clip its norm: use fused_update=False"),
        ({"fused_update": True, "grad_accumulation": 2}, "cannot add up parts of a batch"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', it should be one of adam, adam_touched, signum, signum_touched"),
        ({"state_dtype": "float16"}, "state_dtype is 'float16', it should be one of float32, bfloat16, int8"),
    ],
)
def test_what_cannot_be_right_is_refused(options: dict, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        replace(CONFIG, **options)


def test_what_several_ranks_cannot_do_is_refused() -> None:
    latents, replicas = Mesh(latent=2), Mesh(data=2, latent=2)
    for mesh in (latents, replicas):
        check_ranks(CONFIG, mesh)
        with pytest.raises(SteersmanError, match="use cuda_graph=False"):
            check_ranks(replace(CONFIG, cuda_graph=True), mesh)
    for options in ({"fused_update": True}, {"optimizer": "signum"}, {"state_dtype": "int8"}):
        config = replace(CONFIG, **options)
        check_ranks(config, latents)
        with pytest.raises(SteersmanError, match=r"2 replicas: let all ranks share the latents \(latent_shards=4\)"):
            check_ranks(config, replicas)


def test_left_open_the_fused_update_runs_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = trainer_of(CONFIG).sae
    assert type(make_updater(sae, CONFIG, 0.1)) is AutogradUpdater
    with dispatch.using("triton"):
        assert type(make_updater(sae, CONFIG, 0.1)) is FusedUpdater
        assert type(make_updater(sae, replace(CONFIG, grad_clip=1.0), 0.1)) is AutogradUpdater
        assert type(make_updater(sae, replace(CONFIG, grad_accumulation=2), 0.1)) is AutogradUpdater


def test_weights_changed_from_outside_are_read_again() -> None:
    trainer = trainer_of(replace(CONFIG, fused_update=True))
    assert isinstance(trainer.updater, FusedUpdater)
    trainer.step(mixture(128))
    assert not trainer.updater._weights_changed()
    with torch.no_grad():
        trainer.sae.W_enc.mul_(2)
    assert trainer.updater._weights_changed()


class NoWaiting(TorchDispatchMode):
    """Fails on operations that make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal")
        assert not any(func.name().startswith(f"aten::{name}") for name in waits), func
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            came = [a.device.type for a in args if isinstance(a, Tensor) and a.dim()]
            assert not (out.device.type == "cpu" and "meta" in came), f"{func} copies to the host"
        return out


@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": "int8", "optimizer": "adam_touched", "ema": 0.9}, {"architecture": "matryoshka_topk"}],
    ids=str,
)
def test_a_step_on_a_gpu_never_waits(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors, which have no numbers to read: everything from the batch to the new weights is queued."""
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device: None)
    with dispatch.using("triton"):
        dead = [0]
        monkeypatch.setattr(dead_latents, "read_later", lambda counts: lambda: dead)
        trainer = trainer_of(replace(CONFIG, device="meta", k_aux=10, **options))
        assert isinstance(trainer.updater, FusedUpdater)
        assert trainer.updater.operands == torch.bfloat16
        x = torch.empty(128, D, device="meta")
        for dead[0] in (0, 3, 64):  # without AuxK, with all of the candidates, with some of them
            with NoWaiting():
                trainer.step(x)
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), NoWaiting():
            trainer.read_metrics()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_eps_follows_from_the_numbers_of_a_batch(fused: bool, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused or not, by one rule, of which small batches notice nothing."""
    assert adam_eps(128 * D) == UpdateRule().eps == 1e-8
    assert adam_eps(8 << 20) == pytest.approx(1e-8 / 8)
    monkeypatch.setattr("steersman.train.run.trainer.adam_eps", lambda n_values: n_values * 1e-12)
    updater: Any = trainer_of(replace(CONFIG, fused_update=fused, optimizer=optimizer)).updater
    dense = isinstance(updater, AutogradUpdater)
    assert (updater.optimizer.param_groups[0]["eps"] if dense else updater.rule.eps) == 128 * D * 1e-12
