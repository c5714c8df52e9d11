"""Many SAEs from one reading are those of separate runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.sharded_jobs import mixture

from steersman.errors import SteersmanError
from steersman.train import ActivationStore, TrainConfig, Trainer, train_sae
from steersman.train.run.sweep import train_many

CONFIG = TrainConfig(d_sae=40, k=3, batch_size=128, tokens=128 * 25, seed=3, device="cpu", checkpoint_every=10)
RUNS = {
    "a": CONFIG,
    "wide": replace(CONFIG, d_sae=80, k=5),
    "long": replace(CONFIG, tokens=128 * 40, activation="batch_topk"),
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
    return sorted(train_many(ActivationStore.open(store), RUNS, out))


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
    monkeypatch.setattr("steersman.train.run.sweep.finish_run", lambda *_: None)
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


def test_mistakes_name_the_run(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="run big: a batch of 128 rows cannot be split into 200 parts"):
        train_many(store, {"big": replace(CONFIG, grad_accumulation=200)}, tmp_path)
    with pytest.raises(SteersmanError, match="'a/b' cannot name"):
        train_many(store, {"a/b": CONFIG}, tmp_path)
    with pytest.raises(SteersmanError, match="no runs"):
        train_many(store, {}, tmp_path)
