"""Rows of huge norm: left out of training, said, and kept out of what ordinary rows are measured by."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stores import HOOK, store_of

from steersman.errors import SteersmanError
from steersman.parallel import RankGroup
from steersman.sae import SAE
from steersman.sae.metrics import measure_reconstruction
from steersman.train import TrainConfig, train_sae
from steersman.train.run.large_rows import LargeRows
from steersman.train.store.store import ActivationStore

D, N = 16, 4096


def planted(n: int, seed: int) -> torch.Tensor:
    """Rows [n, D] of 64 directions, three at a time."""
    atoms = torch.nn.functional.normalize(torch.randn(64, D, generator=torch.Generator().manual_seed(0)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    code = torch.rand(n, 64, generator=generator)
    code = torch.where(code >= code.topk(3, dim=1).values[:, -1:], code, 0)
    return code @ atoms


@pytest.fixture(scope="module")
def sinks(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    x = planted(N, 1)
    x[::100] = 300 * torch.nn.functional.normalize(torch.ones(D), dim=0) + 0.1 * x[::100]
    return store_of(x, tmp_path_factory.mktemp("sinks") / "acts", dtype="float32")


CONFIG: dict[str, Any] = {"d_sae": 64, "k": 3, "batch_size": 256, "tokens": 12_000, "device": "cpu"}


@pytest.fixture(scope="module")
def trained(sinks: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[SAE, Path]:
    out = tmp_path_factory.mktemp("trained") / "run"
    return train_sae(sinks, TrainConfig(**CONFIG, checkpoint_every=20), out), out


def test_other_rows_of_the_batch_stand_in() -> None:
    rows = torch.arange(1.0, 9.0)[:, None].repeat(1, 2)
    rows[[0, 3]] *= 1000
    large = LargeRows([(2, 100.0)], RankGroup(), torch.device("cpu"))
    assert large.replaced(rows)[:, 0].tolist() == [2, 2, 3, 3, 5, 6, 7, 8]
    assert large.total() == 2
    ordinary = rows[[1, 2, 4, 5]]
    assert torch.equal(large.replaced(ordinary), ordinary)


def test_replicas_stand_in_for_one_another_as_one_process_would() -> None:
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    rows[[0, 1, 7]] *= 1000
    whole = LargeRows([(3, 50.0)], RankGroup(), torch.device("cpu")).replaced(rows)
    parts = rows.split(6)
    flags = torch.stack([part.norm(dim=1) > 50 for part in parts]).to(torch.uint8)

    class Replica(RankGroup):
        """One of two, whose sum over both is made of what each of them gives."""

        given: list[torch.Tensor]

        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            return flags

        def all_reduce_sum_(self, x: torch.Tensor) -> torch.Tensor:
            self.given.append(x.clone())
            return x.copy_(torch.stack(self.given).sum(0))

    first, second = Replica(2, 0), Replica(2, 1)
    first.given = second.given = []
    found = [LargeRows([(3, 50.0)], one, torch.device("cpu")) for one in (first, second)]
    found[0].replaced(parts[0])  # what the first gives; what it gets needs the other's
    got_second = found[1].replaced(parts[1])
    first.given = [second.given[1]]
    got_first = found[0].replaced(parts[0])
    assert torch.equal(torch.cat([got_first, got_second]), whole)


def test_ordinary_rows_are_rebuilt_as_without_the_others(trained: tuple[SAE, Path], sinks: ActivationStore) -> None:
    sae, out = trained
    fvu = measure_reconstruction(sae, [planted(1000, 2)]).fvu
    alone = train_sae(store_of(planted(N, 1), out.parent / "acts", dtype="float32"), out=out.parent / "a", **CONFIG)
    assert fvu < 1.1 * measure_reconstruction(alone, [planted(1000, 2)]).fvu
    heldout = sae.cfg.metadata["heldout"]
    assert heldout["n_large"] > 0
    assert heldout["fvu_ordinary"] == pytest.approx(fvu, rel=0.2)
    assert (
        sae.cfg.metadata["rows_left_out"]
        == json.loads((out / "metrics.jsonl").read_text().split("\n")[-2])["rows_left_out"]
    )
    assert sae.cfg.metadata["rows_left_out"] == pytest.approx(0.01 * 46 * 256, rel=0.3)
    assert sae.feature_stats is not None
    assert float(sae.feature_stats.max_act.max()) < 10


def test_a_resumed_run_gives_the_same_bits(
    trained: tuple[SAE, Path], sinks: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steersman.train.run import run as module

    steps = iter(range(1000))
    step = module.Run.step

    def stopping(self: module.Run, rows: torch.Tensor) -> None:
        if next(steps) == 30:
            raise RuntimeError("stopped")
        step(self, rows)

    config = TrainConfig(**CONFIG, checkpoint_every=20)
    with monkeypatch.context() as patched:
        patched.setattr(module.Run, "step", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            train_sae(sinks, config, tmp_path / "run")
    again = train_sae(sinks, config, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), trained[0].state_dict().values()))
    assert again.cfg.metadata["rows_left_out"] == trained[0].cfg.metadata["rows_left_out"]


def test_all_rows_when_asked_and_in_runs_that_began_so(sinks: ActivationStore, tmp_path: Path) -> None:
    config = TrainConfig(**dict(CONFIG, tokens=1024), max_norm_ratio=None)
    plain = train_sae(sinks, config, tmp_path / "run")
    assert "rows_left_out" not in plain.cfg.metadata
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    del record["training"]["max_norm_ratio"], record["crc32"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))  # as an earlier version wrote it
    (tmp_path / "run" / "cfg.json").unlink()
    again = train_sae(sinks, TrainConfig(**dict(CONFIG, tokens=1024)), tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), plain.state_dict().values()))
    with pytest.raises(SteersmanError, match="max_norm_ratio"):
        train_sae(sinks, TrainConfig(**dict(CONFIG, tokens=1024), max_norm_ratio=5), tmp_path / "run")


def test_the_ratio_is_above_one_and_the_hook_point_is_named(
    sinks: ActivationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SteersmanError, match=r"max_norm_ratio = 0\.5 must be above 1"):
        TrainConfig(d_sae=4, k=2, max_norm_ratio=0.5)
    train_sae(sinks, out=tmp_path / "run", **dict(CONFIG, tokens=512))
    assert f"{HOOK}: 41 rows (1 %) have norms above 10 x the median" in caplog.text
