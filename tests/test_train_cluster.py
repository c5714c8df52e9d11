"""Whole runs on several ranks: the same SAE as one process, whatever happens on the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ranks import answers, run_ranks, start_ranks
from support.sharded_jobs import train
from support.training import assert_same_sae, mixture

from steersman.cli import main
from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.sae.metrics import measure_reconstruction
from steersman.train import ActivationStore, TrainConfig, train_sae
from steersman.train.run.checkpoints import checkpoint_to_sae

CONFIG = TrainConfig(
    d_sae=64, k=4, batch_size=128, tokens=128 * 60, seed=3, device="cpu", checkpoint_every=20, timeout_seconds=20
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of a mixture, one in a hundred of them of huge norm."""
    out = tmp_path_factory.mktemp("data") / "acts"
    rows = mixture(9000)
    rows[::100] *= 300
    ActivationStore.from_tensors(rows.split(1000), out, "blocks.0.hook_resid_post", dtype="float32")
    return str(out)


@pytest.fixture(scope="module")
def alone(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    train_sae(ActivationStore.open(store), CONFIG, out)
    return out


@pytest.mark.parametrize(("n", "latent"), [(2, None), (4, 2)])
def test_a_run_on_several_ranks_gives_the_sae_of_one_process(
    n: int, latent: int | None, store: str, alone: Path, tmp_path: Path
) -> None:
    found = run_ranks(n, train, store, replace(CONFIG, latent_shards=latent), str(tmp_path / "run"))
    assert [ended for ended, _, _ in found] == ["done"] * n
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    assert_same_sae(alone, tmp_path / "run")
    left_out = [SAE.load(run).cfg.metadata["rows_left_out"] for run in (alone, tmp_path / "run")]
    assert left_out[0] == left_out[1] == pytest.approx(0.01 * 128 * 60, rel=0.3)
    one, many = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (alone, tmp_path / "run")
    )
    for a, b in zip(one, many, strict=True):
        assert {**b, "tokens_per_second": 0} == pytest.approx({**a, "tokens_per_second": 0}, rel=1e-3, abs=1e-6)
    assert train_sae(ActivationStore.open(store), CONFIG, tmp_path / "run").cfg.d_sae == 64  # finished: it is loaded


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_a_run_is_resumed_by_another_number_of_ranks(architecture: str, store: str, tmp_path: Path) -> None:
    config = replace(CONFIG, architecture=architecture, ema=0.9, dead_after=512)
    train_sae(ActivationStore.open(store), config, tmp_path / "whole")
    out = str(tmp_path / "run")
    for n, latent, step in ((2, 1, 25), (4, 2, 41)):
        found = run_ranks(n, train, store, replace(config, latent_shards=latent), out, "preempt", step, n - 1)
        assert [ended for ended, _, _ in found] == ["PreemptedError"] * n, found
        # Saved at once, by all ranks in the same step, and not only at the next multiple of checkpoint_every.
        newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
        assert step < int(newest.name[5:]) <= step + 3
        assert len(list(newest.glob("state-*-of-*.safetensors"))) == n
    train_sae(ActivationStore.open(store), config, out)
    assert_same_sae(tmp_path / "whole", tmp_path / "run", tolerance=1e-2)


def test_a_killed_rank_ends_the_job_and_the_next_one_ends_with_the_same_bytes(store: str, tmp_path: Path) -> None:
    run_ranks(2, train, store, CONFIG, str(tmp_path / "whole"))
    found = answers(start_ranks(2, train, store, CONFIG, str(tmp_path / "cut"), "kill", 33, 1))
    assert found[1] == (False, "killed")
    ok, (ended, seconds, message) = found[0]
    assert ok
    assert ended == "LostRankError"
    assert "rank 0 of 2: the connection to another rank was lost" in message
    assert seconds < 10
    run_ranks(2, train, store, CONFIG, str(tmp_path / "cut"))
    name = "sae_weights.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_rank_that_hangs_ends_the_job_in_bounded_time(store: str, tmp_path: Path) -> None:
    config = replace(CONFIG, timeout_seconds=2.0)
    started = start_ranks(2, train, store, config, str(tmp_path / "run"), "hang", 7, 1)
    ok, answer = answers(started[:1])[0]
    started[1][0].kill()
    assert ok, answer
    ended, seconds, message = answer
    assert ended == "LostRankError"
    assert "did not answer in time" in message
    assert seconds < 8


def test_a_mistake_is_told_by_every_rank_and_nobody_waits(store: str, tmp_path: Path) -> None:
    found = answers(start_ranks(2, train, store, replace(CONFIG, d_sae=63), str(tmp_path / "run")))
    assert all(not ok and "d_sae = 63 cannot be split over 2 ranks" in text for ok, text in found)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cfg.json").write_text("{}")
    found = answers(start_ranks(2, train, store, CONFIG, str(tmp_path / "other")))
    assert all(not ok and "already holds an SAE" in text for ok, text in found)


def test_a_checkpoint_becomes_an_sae(store: str, tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint_every=30, tokens=128 * 31, decay=0.0)
    run_ranks(2, train, store, config, str(tmp_path / "run"))
    sae, trained = checkpoint_to_sae(tmp_path / "run"), SAE.load(tmp_path / "run")
    assert sae.cfg.hook_name == trained.cfg.hook_name
    x = mixture(500, seed=2)
    one_step_before, now = (measure_reconstruction(each, [x]).fvu for each in (sae, trained))
    assert one_step_before == pytest.approx(now, rel=0.05)
    (tmp_path / "run" / "cfg.json").unlink()  # as if the run had been interrupted
    main(["convert", str(tmp_path / "run"), str(tmp_path / "plain"), "--to", "saelens"])
    assert torch.equal(SAE.load(tmp_path / "plain").W_dec, sae.W_dec)
    with pytest.raises(SteersmanError, match="holds no checkpoint"):
        checkpoint_to_sae(tmp_path / "plain")
