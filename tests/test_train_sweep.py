"""Many SAEs from one reading are those of separate runs."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.sharded_jobs import train
from support.training import mixture, weight_bytes

from steersman.errors import PreemptedError, SteersmanError
from steersman.train import ActivationStore, SweepConfig, TrainConfig, Trainer, train_many, train_sae

CONFIG = TrainConfig(d_sae=40, k=3, batch_size=128, tokens=128 * 25, seed=3, device="cpu", checkpoint_every=10)
RUNS = {
    "a": CONFIG,
    "wide": replace(CONFIG, d_sae=80, k=5),
    "long": replace(CONFIG, tokens=128 * 40, architecture="batch_topk"),
    "other-seed": replace(CONFIG, seed=4),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("data") / "acts"
    return ActivationStore.from_tensors(mixture(4000).split(1000), out, "blocks.0.hook_resid_post", dtype="float32")


@pytest.fixture(scope="module")
def separate(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("separate")
    for name, config in RUNS.items():
        train_sae(store, config, out / name)
    return out


def assert_same_files(a: Path, b: Path) -> None:
    for name in RUNS:
        for file in ("sae_weights.safetensors", "cfg.json"):
            assert (a / name / file).read_bytes() == (b / name / file).read_bytes(), (name, file)
        assert_same_statistics(a / name, b / name)


def assert_same_statistics(a: Path, b: Path) -> None:
    """(The order of the header's entries differs from one writing to the next, so not by bytes.)"""
    one, other = load_file(a / "feature_stats.safetensors"), load_file(b / "feature_stats.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def sweep(store: str, out: str) -> list[str]:
    return sweep_of(store, RUNS, out)


def sweep_of(store: str, runs: dict[str, TrainConfig], out: str) -> list[str]:
    return sorted(train_many(ActivationStore.open(store), runs, out))


def test_a_sweep_reads_once_and_gives_what_separate_runs_give(
    store: ActivationStore, separate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    step, reads = Trainer.step, []
    batches = ActivationStore.batches

    def counted(self: ActivationStore, *args: Any, **options: Any) -> Any:
        for batch in batches(self, *args, **options):
            reads.append(options.get("split"))
            yield batch

    def stopping(self: Trainer, x: Any) -> None:
        if self.n_steps_done == 17 and self.cfg.d_sae == 80:
            raise Stop
        step(self, x)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(Stop):
        train_many(store, RUNS, tmp_path)
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(ActivationStore, "batches", counted)
    monkeypatch.setattr("steersman.train.run.run.Run.finish", lambda _: None)
    monkeypatch.setattr("steersman.train.run.run.Run.load", lambda _: None)
    train_many(store, RUNS, tmp_path / "once")
    assert len(reads) == 40 + 25 + len(RUNS)  # one reading of each order, and a first batch of each run
    monkeypatch.undo()
    trained = train_many(store, RUNS, tmp_path)  # goes on from the checkpoints at different steps
    assert sorted(trained) == sorted(RUNS)
    assert_same_files(separate, tmp_path)
    assert sorted(train_many(store, RUNS, tmp_path)) == sorted(RUNS)  # finished: loaded


def test_a_sweep_is_spread_over_ranks(store: ActivationStore, separate: Path, tmp_path: Path) -> None:
    names = run_ranks(2, sweep, str(store.path), str(tmp_path))
    assert names == [["a", "long"], ["other-seed", "wide"]]
    assert_same_files(separate, tmp_path)


def test_runs_of_a_sweep_that_shard_their_latents_are_trained_by_all_ranks_together(
    store: ActivationStore, tmp_path: Path
) -> None:
    runs = {
        "sharded": replace(CONFIG, latent_shards=2),
        "too": replace(CONFIG, latent_shards=2, d_sae=80),
        "one": CONFIG,
    }
    names = run_ranks(2, sweep_of, str(store.path), runs, str(tmp_path / "sweep"))
    assert names == [["one", "sharded", "too"], ["sharded", "too"]]
    for name in ("sharded", "too"):
        run_ranks(2, train, str(store.path), runs[name], str(tmp_path / name))
        assert weight_bytes(tmp_path / "sweep" / name) == weight_bytes(tmp_path / name)
    (checkpoint,) = (tmp_path / "sweep" / "sharded" / "checkpoints").glob("step_00000020")
    assert len(list(checkpoint.glob("state-*-of-00002.safetensors"))) == 2


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGTERM, PreemptedError), (signal.SIGINT, KeyboardInterrupt)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_asked_to_end_a_sweep_saves_all_its_runs(
    number: int, kind: type[BaseException], store: ActivationStore, separate: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    step = Trainer.step

    def asked(self: Trainer, rows: Any) -> None:
        if self.n_steps_done == 27 and self.recipe.n_steps == 40:
            os.kill(os.getpid(), number)
        step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", asked)
        with pytest.raises(kind):
            train_many(store, RUNS, tmp_path)
    newest = {name: max((tmp_path / name / "checkpoints").glob("step_*")).name for name in ("a", "wide", "long")}
    assert newest == {"a": "step_00000025", "wide": "step_00000025", "long": "step_00000028"}
    train_many(store, RUNS, tmp_path)
    assert_same_files(separate, tmp_path)


def test_an_interrupt_from_within_a_step_saves_all_runs_of_a_sweep(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer, rows: Any) -> None:
        if self.n_steps_done == 13 and self.cfg.d_sae == 80:
            raise KeyboardInterrupt
        step(self, rows)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_many(store, {"a": CONFIG, "b": replace(CONFIG, d_sae=80)}, tmp_path)
    assert (tmp_path / "a" / "checkpoints" / "step_00000014").is_dir()
    assert (tmp_path / "b" / "checkpoints" / "step_00000013").is_dir()


def test_a_sweep_refuses_what_its_runs_alone_would_refuse(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="run b: kernels=triton cannot run on meta"):
        train_many(store, {"a": CONFIG, "b": replace(CONFIG, kernels="triton", device="meta")}, tmp_path)
    assert not (tmp_path / "b").exists()
    with pytest.raises(SteersmanError, match="run a: model_ranks is for training straight from a model"):
        train_many(store, {"a": replace(CONFIG, model_ranks=1)}, tmp_path)


def test_a_sweep_is_the_product_of_its_lists_or_a_file(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"store": "acts", "out": "sweep", "k": 4, "tokens": 1000}
    each = SweepConfig(**shared, d_saes=(64, 128), lrs=(0.001, 0.003)).each()
    assert list(each) == [f"d_sae-{d}_lr-{lr}" for d in (64, 128) for lr in (0.001, 0.003)]
    one = each["d_sae-128_lr-0.001"]
    assert (one.config, one.hook) == (TrainConfig(d_sae=128, k=4, lr=0.001, tokens=1000), None)
    assert list(SweepConfig(**shared, d_sae=64).each()) == ["run"]
    hooked = SweepConfig(**shared, d_sae=64, hooks=("blocks.0.hook_resid_post",), seeds=(1,)).each()
    assert {name: run.hook for name, run in hooked.items()} == {
        "hook-blocks.0.hook_resid_post_seed-1": "blocks.0.hook_resid_post"
    }
    file = tmp_path / "runs.yaml"
    file.write_text("runs:\n  small: {d_sae: 32}\n  late: {d_sae: 64, hook: blocks.3.hook_mlp_out, lr: 1e-3}\n")
    late = SweepConfig(**shared, runs=str(file)).each()["late"]
    assert (late.hook, late.config.lr, late.config.tokens) == ("blocks.3.hook_mlp_out", 0.001, 1000)


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ({"d_saes": (64,)}, "runs: {a: {d_sae: 64}}", "either --runs, or hooks, architectures"),
        ({}, "runs: {a: {d_say: 64}}", "run a: unknown key 'd_say'; near it: d_sae"),
        ({}, "runs: {a: {d_sae: 2}}", "run a: k = 4 must lie between 1 and d_sae = 2"),
        ({}, "{a: {d_sae: 64}}", "unknown key 'a'; near it: runs"),
    ],
)
def test_a_mistake_in_a_file_of_runs_is_named(
    options: dict[str, Any], content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "runs.yaml").write_text(content)
    with pytest.raises(SteersmanError, match=message):
        SweepConfig(store="acts", out="sweep", k=4, runs=str(tmp_path / "runs.yaml"), **options).each()


def test_mistakes_name_the_run(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="run big: a batch of 128 rows cannot be split into 200 parts"):
        train_many(store, {"big": replace(CONFIG, grad_accumulation=200)}, tmp_path)
    with pytest.raises(SteersmanError, match="'a/b' cannot name"):
        train_many(store, {"a/b": CONFIG}, tmp_path)
    with pytest.raises(SteersmanError, match="no runs"):
        train_many(store, {}, tmp_path)
