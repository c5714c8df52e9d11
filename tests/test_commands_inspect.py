"""`steersman inspect`: what each kind of thing holds, for people and for programs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import fails

from steersman.cli import main
from steersman.demo import MODEL_PATH
from steersman.sae import SAE, SAEConfig
from steersman.steer import Effects, SteeringVector
from steersman.train import ActivationStore, TrainConfig, train_sae

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a finished and an unfinished run, a vector in two formats and an effect map."""
    folder = tmp_path_factory.mktemp("things")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 16, generator=generator)
    store = ActivationStore.from_tensors([x], folder / "acts", HOOK, model_name="m", dtype="float32")
    config = TrainConfig(d_sae=32, k=4, batch_size=64, checkpoint_every=3, log_every=2, device="cpu")
    sae = train_sae(store, config, folder / "run")
    shutil.copytree(folder / "run", folder / "unfinished")
    for name in ("cfg.json", "sae_weights.safetensors", "feature_stats.safetensors"):
        (folder / "unfinished" / name).unlink()
    vector = SteeringVector(directions={HOOK: torch.ones(16)}, model_name="m", method="by \x1b[2J hand")
    vector.save(folder / "v.safetensors")
    SteeringVector(directions={HOOK: torch.ones(16)}, metadata={"model_type": "llama"}).save(folder / "v.gguf")
    vectors = torch.nn.functional.normalize(torch.randn(64, 16, generator=generator), dim=1)
    effects = Effects.from_tensors(vectors, vectors @ torch.randn(16, 32, generator=generator), sae=sae)
    effects.fit(ridge=0.1).save(folder / "map.safetensors")
    return folder


def look(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["inspect", str(path), "--json", *flags])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acts", {"kind": "store", "complete": True, "rows": 600, "model": "m"}),
        ("run", {"kind": "run", "finished": True, "steps": 8, "checkpoints": [3, 6], "last step logged": 8}),
        ("unfinished", {"kind": "run", "finished": False, "steps": 8, "checkpoints": [3, 6]}),
        ("v.safetensors", {"kind": "vector", "model": "m"}),
        ("v.gguf", {"kind": "vector"}),
        ("map.safetensors", {"kind": "effect map", "width": 16, "features": 32}),
    ],
)
def test_each_kind(things: Path, capsys: pytest.CaptureFixture[str], name: str, expected: dict[str, Any]) -> None:
    found = look(capsys, things / name, "--verify")
    assert {key: found[key] for key in expected} == expected
    main(["inspect", str(things / name)])
    printed = capsys.readouterr().out
    assert found["kind"] in printed or "architecture" in printed
    assert "\x1b" not in printed


def test_rows_of_huge_norm_in_a_store_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(100, 4)
    ActivationStore.from_tensors([x], tmp_path / "plain", HOOK, dtype="float32")
    x[::50] *= 1000
    ActivationStore.from_tensors([x], tmp_path / "sinks", HOOK, dtype="float32")
    told = "2 rows (2 %) have norms above 10 x the median and hold 100 % of the squared norm"
    assert look(capsys, tmp_path / "sinks")["hook points"][HOOK]["large rows"] == told
    assert look(capsys, tmp_path / "plain")["hook points"][HOOK]["large rows"] == "none"
    main(["inspect", str(tmp_path / "sinks")])
    assert told in capsys.readouterr().out


def test_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = look(capsys, MODEL_PATH, "--verify")
    assert found["kind"] == "model"
    assert (found["layers"], found["width"], found["vocabulary"], found["context length"]) == (4, 128, 1728, 256)
    assert found["tokenizer adds BOS"] is True
    assert found["chat template"] is False
    assert "blocks.{0..3}.hook_resid_mid" in found["hook points"]
    laid_out = look(capsys, MODEL_PATH)["hook points by its layout (--verify tries them)"]
    assert sorted(laid_out) == sorted(found["hook points"])


def test_what_is_damaged_is_one_line(things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(things / "acts", tmp_path / "acts")
    shard = max((tmp_path / "acts").rglob("00000.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert shard.name in fails(capsys, "inspect", str(tmp_path / "acts"), "--verify")
    shutil.copytree(things / "unfinished", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"training"')
    assert "config.json" in fails(capsys, "inspect", str(tmp_path / "run"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "none"}')
    assert "model" in fails(capsys, "inspect", str(tmp_path / "model"))
    assert "none" in fails(capsys, "inspect", str(tmp_path / "none.safetensors"))


def test_an_sae_without_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SAE(SAEConfig(d_in=4, d_sae=8, k=2)).save(tmp_path / "sae")
    found = look(capsys, tmp_path / "sae")
    assert found["kind"] == "SAE"
    assert found["cfg"]["d_sae"] == 8
    assert "text" not in found
