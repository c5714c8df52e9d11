"""Training: it learns, it resumes exactly, and it refuses what cannot work."""

import json
import os
import signal
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.power_cut import PowerCut, power_cut_after
from support.stopping import stopped_before
from support.stores import store_of
from support.training import HOOK, assert_equal_weights, dictionary, logged, mixture, trainer_of, weight_bytes
from torch import Tensor

from steersman.commands.options import heldout_line
from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.sae.metrics import measure_reconstruction
from steersman.train import ActivationStore, TrainConfig, Trainer, evaluate_sae, train_sae
from steersman.train.reports.plots import plot_density, plot_loss
from steersman.train.run.checkpoints import Checkpoints
from steersman.train.run.optim import AutogradUpdater


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    rows = mixture(60_000)
    out = tmp_path_factory.mktemp("data") / "acts"
    return ActivationStore.from_tensors(rows.split(5000), out, HOOK, dtype="float32")


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest part by far of runs this short: drawn by one test alone."""
    if request.node.originalname != "test_the_run_folder_holds_what_it_says":
        monkeypatch.setattr("steersman.train.run.run.plot_run", lambda *_: None)


CONFIG = TrainConfig(d_sae=40, k=3, batch_size=256, seed=3, device="cpu", checkpoint_every=40, tokens=25_600)


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `CONFIG` that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steersman.train.run.run.plot_run", lambda *_: None)
        train_sae(store, CONFIG, out)
    return out


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_training_recovers_a_planted_dictionary(architecture: str, store: ActivationStore, tmp_path: Path) -> None:
    config = replace(CONFIG, architecture=architecture, tokens=400_000, d_sae=64)
    sae = train_sae(store, config, tmp_path / "run")
    best = (dictionary() @ sae.W_dec.detach().T).max(dim=1).values
    assert float(best.mean()) > 0.95
    result = measure_reconstruction(sae, [mixture(5000, seed=1)])
    assert result.fvu < 0.15
    assert result.l0 == pytest.approx(3, abs=0.3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert sae.feature_stats is not None
    assert sae.feature_stats.n_tokens == store.split_rows("train")[1]


def test_the_run_folder_holds_what_it_says(store: ActivationStore, tmp_path: Path) -> None:
    sae = train_sae(store, CONFIG, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.json", "cfg.json", "sae_weights.safetensors", "feature_stats.safetensors",
        "metrics.jsonl", "checkpoints", "loss.png", "density.png",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 101, 10))
    assert {"loss", "fvu", "l0", "dead_share", "lr", "tokens", "tokens_per_second"} <= lines[0].keys()
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    # The last one, and the one before the learning rate began to fall.
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step_00000075", "step_00000080"]
    loaded = SAE.load(tmp_path / "run")
    assert_equal_weights(loaded, sae)
    assert loaded.cfg.hook_name == "blocks.0.hook_resid_post"
    assert loaded.cfg.metadata["heldout"]["fvu"] > 0
    assert loaded.feature_stats is not None
    fvu, dead = plot_loss(lines).axes
    assert np.asarray(fvu.lines[0].get_ydata()).tolist() == [line["fvu"] for line in lines]
    assert dead.get_ylabel() == "dead features (%)"
    alive = int((loaded.feature_stats.density > 0).sum())
    assert plot_density(loaded.feature_stats).axes[0].get_title().startswith(f"{alive} of 40 features")


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, architecture="batch_topk"),
        replace(CONFIG, ema=0.9, grad_clip=0.05, grad_accumulation=2, tokens=100_000, log_every=7, dead_after=512),
    ],
    ids=["topk", "batch_topk", "ema, clipping, several epochs"],
)
def test_resuming_equals_an_uninterrupted_run(config: TrainConfig, store: ActivationStore, tmp_path: Path) -> None:
    whole = train_sae(store, config, tmp_path / "whole")
    for stop_at in (41, 95):
        run = tmp_path / f"cut at {stop_at}"
        with stopped_before(stop_at):
            train_sae(store, config, run)
        torch.manual_seed(99)  # whatever else happened in the process
        assert_equal_weights(whole, train_sae(store, config, run))
        assert logged(tmp_path / "whole") == logged(run)
        assert weight_bytes(tmp_path / "whole") == weight_bytes(run)


def test_a_power_cut_at_any_moment_loses_at_most_a_checkpoint(store: ActivationStore, tmp_path: Path) -> None:
    """Every fifth change to the disk: while checkpoints are written and deleted, and while the SAE is saved."""
    config = replace(CONFIG, tokens=64 * 20, batch_size=64, checkpoint_every=4, statistics_tokens=640)
    train_sae(store, config, tmp_path / "whole")
    whole = (tmp_path / "whole" / "sae_weights.safetensors").read_bytes()
    n, ended = 0, False
    while not ended:
        with suppress(PowerCut), power_cut_after(n) as changes:
            train_sae(store, config, tmp_path / f"run{n}")
        train_sae(store, config, tmp_path / f"run{n}")
        again = (tmp_path / f"run{n}" / "sae_weights.safetensors").read_bytes()
        assert again == whole, f"cut after {changes[-1:]}, change {n}"
        ended = len(changes) < n
        n += 5
    assert n > 30


def test_an_interrupt_saves_a_checkpoint(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted_step(self: Trainer, x: Tensor) -> None:
        if self.n_steps_done == 13:
            raise KeyboardInterrupt
        step(self, x)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt, match="interrupted; the same command resumes .*run from step 13"):
        train_sae(store, CONFIG, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_00000013" / "state.safetensors").is_file()


def test_ctrl_c_ends_a_run_between_two_steps(
    store: ActivationStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far a step is when it comes, what is saved is what an uninterrupted run has there."""
    add = Trainer._add

    def interrupted(self: Trainer, *args: Any) -> None:
        add(self, *args)
        if self.n_steps_done == 13:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_add", interrupted)
        with pytest.raises(KeyboardInterrupt, match="resumes .*cut from step 14"):
            train_sae(store, CONFIG, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_00000014"]
    train_sae(store, CONFIG, tmp_path / "cut")
    assert weight_bytes(tmp_path / "cut") == weight_bytes(whole)


def test_a_second_ctrl_c_ends_a_run_at_once_and_saves_nothing_half_done(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before the first checkpoint of .*run; the same command begins again"):
        train_sae(store, CONFIG, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def fresh_trainer(config: TrainConfig, rows: Tensor) -> Trainer:
    trainer = trainer_of(config)
    trainer.fit_encoder_scale(rows)
    return trainer


def test_two_half_batches_equal_one_batch() -> None:
    rows = mixture(256, seed=5)
    states = []
    for parts in (1, 2, 4):
        # A dead_after this short turns the AuxK loss on, so that it is compared as well.
        config = replace(CONFIG, grad_accumulation=parts, dead_after=256, d_sae=256)
        trainer = fresh_trainer(config, rows)
        for _ in range(4):
            trainer.step(rows)
        states.append(trainer)
    assert float(states[0].sums[1]) > 0, "the AuxK loss was never on"
    for other in states[1:]:
        assert torch.equal(states[0].dead_latents.silent_steps, other.dead_latents.silent_steps)
        for a, b in zip(states[0].updater.parameters.values(), other.updater.parameters.values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_gradient_of_the_decoder_has_no_part_along_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = mixture(256)
    trainer = fresh_trainer(CONFIG, rows)
    seen = []

    def look(*_args: object, **_kwargs: object) -> None:
        grad = trainer.sae.W_dec.grad
        assert grad is not None
        seen.append((grad * trainer.sae.W_dec).sum(1).abs().max() / grad.abs().max())

    assert isinstance(trainer.updater, AutogradUpdater)
    monkeypatch.setattr(trainer.updater.optimizer, "step", look)
    trainer.step(rows)
    assert float(seen[0]) < 1e-5


def test_clipping_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mixture(256)
    trainer = fresh_trainer(replace(CONFIG, grad_clip=1e-3), rows)
    norms = []

    def look(*_args: object, **_kwargs: object) -> None:
        grads = [p.grad for p in trainer.updater.parameters.values() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    assert isinstance(trainer.updater, AutogradUpdater)
    monkeypatch.setattr(trainer.updater.optimizer, "step", look)
    trainer.step(rows)
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_dead_features_are_counted_and_trained_on_the_residual() -> None:
    rows = mixture(2000)
    moved = {}
    for coefficient in (0.0, 0.25):
        trainer = fresh_trainer(replace(CONFIG, aux_coefficient=coefficient, dead_after=1024), rows)
        with torch.no_grad():
            trainer.sae.b_enc[:10] = -1.5  # too low for a place among the k largest, still positive on some tokens
        before = trainer.sae.W_enc[:, :10].detach().clone()
        for i in range(4):
            trainer.step(rows[i * 256 :][:256])
        silent = trainer.dead_latents.silent_steps[:10] == 4
        assert int(silent.sum()) > 3
        assert torch.equal(trainer.sae.W_enc[:, :10][:, silent], before[:, silent]), "no gradient before they are dead"
        trainer.step(rows[:256])
        change = (trainer.sae.W_enc[:, :10] - before).abs().sum(dim=0)[silent]
        moved[coefficient] = int((change > 0).sum())
        metrics = trainer.read_metrics()
        assert metrics["dead_share"] > 0
        assert (metrics["aux"] > 0) == (coefficient > 0)
    assert moved[0.0] == 0
    assert moved[0.25] > 0


def test_saved_average_differs_from_the_last_weights(store: ActivationStore, tmp_path: Path) -> None:
    plain = train_sae(store, CONFIG, tmp_path / "plain")
    averaged = train_sae(store, replace(CONFIG, ema=0.9), tmp_path / "ema")
    assert not torch.equal(plain.W_dec, averaged.W_dec)
    torch.testing.assert_close(averaged.W_dec.norm(dim=1), torch.ones(40))


def test_a_folder_of_another_configuration_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    train_sae(store, CONFIG, tmp_path / "run")
    before = (tmp_path / "run" / "sae_weights.safetensors").stat().st_mtime_ns
    train_sae(store, CONFIG, tmp_path / "run")  # finished: loaded, not trained again
    assert (tmp_path / "run" / "sae_weights.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SteersmanError, match="another configuration .*training.k was 3, now 4"):
        train_sae(store, replace(CONFIG, k=4), tmp_path / "run")


@pytest.mark.parametrize(
    "changed",
    [
        {"keep_checkpoints": 1},
        {"log_every": 7},
        {"kernels": "torch"},
        {"device": "auto"},
        {"statistics_tokens": 2000},
        {"checkpoint_every": 25},
        {"timeout_seconds": 5.0, "latent_shards": 1},
    ],
    ids=str,
)
def test_what_says_only_how_a_run_is_computed_may_change_when_it_is_resumed(
    changed: dict[str, Any], store: ActivationStore, whole: Path, tmp_path: Path
) -> None:
    with stopped_before(58):
        train_sae(store, CONFIG, tmp_path / "cut")
    recorded = (tmp_path / "cut" / "config.json").read_bytes()
    train_sae(store, replace(CONFIG, **changed), tmp_path / "cut")
    assert weight_bytes(tmp_path / "cut") == weight_bytes(whole)
    assert (tmp_path / "cut" / "config.json").read_bytes() == recorded


def test_the_log_is_right_after_its_interval_was_changed_again_and_again(
    store: ActivationStore, tmp_path: Path
) -> None:
    """Each line is the mean over the steps since the one before it, wherever the checkpoints lie."""
    config = replace(CONFIG, checkpoint_every=4, tokens=60 * 256)
    every_step = train_sae(store, replace(config, log_every=1), tmp_path / "whole") and logged(tmp_path / "whole")
    for stop_at, log_every in ((23, 10), (29, 7), (35, 9), (None, 50)):
        with stopped_before(stop_at) if stop_at else nullcontext():
            train_sae(store, replace(config, log_every=log_every), tmp_path / "cut")
    lines, before = logged(tmp_path / "cut"), 0
    assert [line["step"] for line in lines] == [10, 20, 21, 28, 50, 60]
    for line in lines:
        since = [one["fvu"] for one in every_step[before : line["step"]]]
        assert line["fvu"] == pytest.approx(sum(since) / len(since), rel=1e-6)
        before = line["step"]


def test_a_run_folder_names_its_settings_as_it_always_did(store: ActivationStore, tmp_path: Path) -> None:
    """Read by other versions, so the names on disk stay whatever the fields are called."""
    train_sae(store, replace(CONFIG, tokens=2560, latent_shards=1), tmp_path / "run")
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert list(training)[:3] == ["d_sae", "k", "activation"]
    assert not training.keys() & {"architecture", "options", "latent_shards", "model_ranks", "timeout_seconds"}
    with pytest.warns(DeprecationWarning, match="architecture"):
        config = TrainConfig(d_sae=8, k=2, activation="batch_topk")  # pyright: ignore[reportCallIssue]
    assert config.architecture == "batch_topk"


def test_activations_that_do_not_vary(tmp_path: Path) -> None:
    flat = ActivationStore.from_tensors([torch.ones(4000, 16)], tmp_path / "acts", "h", dtype="float32")
    with pytest.raises(SteersmanError, match="do not vary"):
        train_sae(flat, CONFIG, tmp_path / "run")


def test_held_out_rows_that_do_not_vary_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [torch.randn(600, 16), torch.ones(40, 16)]
    store = ActivationStore.from_tensors(rows, tmp_path / "acts", "h", dtype="float32")
    sae = train_sae(store, CONFIG, tmp_path / "run", tokens=600)
    assert "rows measured on do not vary" in caplog.text
    heldout = sae.cfg.metadata["heldout"]
    assert (heldout["fvu"], heldout["fvu_ordinary"], heldout["explained_variance"]) == (None, None, None)
    assert "NaN" not in (tmp_path / "run" / "cfg.json").read_text()
    assert heldout_line(sae).startswith("FVU not defined, L0")
    assert sae.feature_stats is not None
    assert heldout["dead_share"] > float((sae.feature_stats.density == 0).float().mean())
    assert f"on {sae.feature_stats.n_tokens:,} training rows)" in heldout_line(sae)
    assert "fvu                 not defined" in (text := evaluate_sae(sae, store).to_text())
    assert text.endswith("no share of their variance is defined")


def test_one_held_out_row_is_refused_before_training(tmp_path: Path) -> None:
    store = ActivationStore.from_tensors([torch.randn(19, 16)], tmp_path / "acts", "h", dtype="float32")
    with pytest.raises(SteersmanError, match="1 held-out row is too few .* a heldout_fraction above 0.05"):
        train_sae(store, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_loss_that_explodes_names_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mixture(256)
    trainer = fresh_trainer(CONFIG, rows)
    trainer.step(rows * float("inf"))
    with pytest.raises(SteersmanError, match="not finite at step 1; try a lower --lr"):
        trainer.read_metrics()


def test_weights_and_biases_offline(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be asked for when a run is resumed, and from then on both folders that it logs to are of one id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = replace(CONFIG, wandb_project="steersman", tokens=2560, checkpoint_every=4)
    with stopped_before(3):
        train_sae(store, replace(config, wandb_project=None), tmp_path / "run")
    with stopped_before(6):
        train_sae(store, config, tmp_path / "run")
    train_sae(store, config, tmp_path / "run")
    logs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    known = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert known["project"] == "steersman"
    assert {file.name for file in logs} == {f"run-{known['id']}.wandb"}
    assert len(logs) == 2


def test_unknown_device(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="device 'tpu9' cannot be used"):
        train_sae(store, replace(CONFIG, device="tpu9"), tmp_path / "run")


def test_settings_by_name_and_a_stores_folder(tmp_path: Path) -> None:
    rows = torch.randn(3000, 16, generator=torch.Generator().manual_seed(1))
    ActivationStore.from_tensors([rows], str(tmp_path / "acts"), "blocks.0.hook_resid_post", dtype="float32")
    base = TrainConfig(d_sae=32, k=2, device="cpu")
    sae = train_sae(str(tmp_path / "acts"), base, tmp_path / "a", k=4)
    assert sae.cfg.k == 4
    again = train_sae(tmp_path / "acts", d_sae=32, k=4, device="cpu", out=tmp_path / "b")
    assert again.W_dec.equal(sae.W_dec)
    with pytest.raises(SteersmanError, match="unknown setting 'kk'"):
        train_sae(tmp_path / "acts", base, tmp_path / "c", kk=4)
    with pytest.raises(SteersmanError, match="needs out="):
        train_sae(tmp_path / "acts", base)


def test_a_run_starts_from_its_seed_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    rows = mixture(2000)
    store = store_of(rows, tmp_path / "store")
    config = TrainConfig(d_sae=64, k=4, batch_size=256, tokens=1024, checkpoint_every=4, device="cpu", seed=3)
    states = []
    for name in ("one", "two"):
        torch.rand(7 if name == "two" else 1)  # what a program drew before is no part of the run
        before = torch.get_rng_state()
        train_sae(store, config, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(next((tmp_path / name / "checkpoints").glob("*/state.safetensors")).read_bytes())
    assert states[0] == states[1]


def test_a_checkpoint_whose_state_is_no_file_is_told_and_not_passed_over(tmp_path: Path) -> None:
    for step in (4, 8):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "state.safetensors").touch()
    (tmp_path / "step_00000004" / "state.json").touch()
    (tmp_path / "step_00000008" / "state.json").symlink_to("nowhere")
    (tmp_path / "step_00000012").mkdir()  # with nothing of a checkpoint in it
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.steps() == [4, 8]
    with pytest.raises(SteersmanError, match="step_00000008"):
        checkpoints.load(lambda _: (0, 1))
