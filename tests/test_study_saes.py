"""The study's SAEs: rows of one command, resumed by it, and the page that says what they are."""

import json
from pathlib import Path

import pytest
import torch

from steersman import SteersmanError
from steersman.train import ActivationStore
from study import saes
from study.peers import PEERS, PeerConfig, ordinary, train_peer
from study.report import markdown


def test_rows_are_trained_measured_resumed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = saes.Config(
        small=True, work=tmp_path, tokens=3000, d_sae=64, k=4, architectures=("topk",), more_active=8, wider=96,
        peers=("absent",), model_tokens=300, rounds=1, probed=2, probe_texts=8,
    )  # fmt: skip
    saes.main(config)
    assert "absent not installed, their rows stay open" in capsys.readouterr().out
    path = tmp_path / "results" / "saes.json"
    first = json.loads(path.read_text())
    open_rows = {name for name in first["planned"] if name not in first["rows"]}
    assert open_rows
    assert all("absent" in name or name.startswith(("speed", "memory")) for name in open_rows)
    found = first["rows"]["layer2 topk 64 4 seed0"]
    assert (found["l0_asked"], found["n_steps"] * found["batch_size"]) == (4, found["training_rows"] // 512 * 512)
    assert found["fvu_ordinary"] < first["rows"]["frozen decoder"]["fvu_ordinary"]
    assert set(first["rows"]["loss, baselines"]) == {"layer2 topk 64 4 seed1", *saes.BASELINES}

    first["rows"].pop("loss, first")
    path.write_text(json.dumps(first))
    saes.main(config)
    assert capsys.readouterr().out.count("saes: ") == 2  # what is not installed, and the row that was missing
    again = json.loads(path.read_text())
    assert again["rows"]["loss, first"]["layer2 topk 64 4 seed0"]["ce_recovered"] > 0.3

    text = markdown(saes.page(again), again)
    assert "| 2 | 64 |" in text
    assert "| frozen encoder |" in text
    assert "Not run: `speed 1`" in text


def test_large_rows_are_replaced_by_others_of_the_batch() -> None:
    x = torch.tensor([[1.0, 0], [90, 0], [2, 0], [0, 80]])
    assert torch.equal(ordinary(x, 10), torch.tensor([[1.0, 0], [1, 0], [2, 0], [2, 0]]))
    assert torch.equal(ordinary(x, 100), x)


@pytest.mark.parametrize("library", PEERS)
def test_other_trainers_learn_the_rows_and_leave_an_sae_of_ours(library: str, tmp_path: Path) -> None:
    rows = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)) @ torch.eye(4, 16) + 1
    store = ActivationStore.from_tensors([rows], tmp_path / "acts", "blocks.1.hook_resid_post", dtype="float32")
    config = PeerConfig(library=library, d_sae=32, k=4, lr=0.01, batch_size=128, n_steps=60)
    pytest.importorskip(PEERS[library].module)
    sae = train_peer(store, config, tmp_path / "sae")
    assert sae.cfg.hook_name == "blocks.1.hook_resid_post"
    assert float((sae(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()) < 0.5
    assert torch.equal(train_peer(store, config, tmp_path / "sae").W_dec, sae.W_dec)


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("study.peers.installed", lambda: [])
    store = ActivationStore.from_tensors([torch.randn(100, 4)], tmp_path / "acts", "blocks.1.hook_resid_post")
    config = PeerConfig(library="sae-lens", d_sae=8, k=2, lr=0.01, batch_size=8, n_steps=1)
    with pytest.raises(SteersmanError, match="sae-lens is not installed"):
        train_peer(store, config, tmp_path / "sae")
