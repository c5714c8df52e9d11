"""Layers in place of hook points, several of both, and flags that were called otherwise."""

import json
import logging
from pathlib import Path

import pytest
import torch
from support.commands import fails

from steersman.cli import main
from steersman.commands.effects import EffectsCommand, _openings
from steersman.commands.options import as_json, hook_point, hook_points
from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.flags import parse
from steersman.train import ActivationStore

MODEL = str(MODEL_PATH)


def test_layers_are_hook_points() -> None:
    assert hook_points(["embed"], [0, -1], MODEL) == ("embed", "blocks.0.hook_resid_post", "blocks.3.hook_resid_post")
    assert hook_point(None, None, MODEL) is None
    assert hook_point("logits", None, None) == "logits"
    for layer, model, message in ((-5, MODEL, "has 4 layers"), (-1, None, "count from 0"), (-1, "./none", "no model")):
        with pytest.raises(SteersmanError, match=message):
            hook_point(None, layer, model)


@pytest.mark.parametrize("how", ["flags", "yaml"])
def test_all_hook_points_that_are_named_are_stored(how: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(texts(20, seed=1)))
    flags = ["--model", MODEL, "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "acts"), "--tokens", "0.2k"]
    a, b = "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"
    if how == "flags":
        main(["cache", *flags, "--hook", a, "--hook", b, "--layer", "-1"])
        expected = [a, b, "blocks.3.hook_resid_post"]
    else:
        (tmp_path / "c.yaml").write_text(f"hook: [{a}, {b}]\nlayer: [1]\n")
        main(["cache", *flags, "--config", str(tmp_path / "c.yaml")])
        expected = [a, b, "blocks.1.hook_resid_post"]
    store = ActivationStore.open(tmp_path / "acts")
    assert sorted(store.hook_names) == sorted(expected)
    assert store.n_rows == 200
    assert all(store.activations(torch.tensor([0]), hook=hook).abs().sum() > 0 for hook in expected)


def test_nothing_to_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails(capsys, "cache", "--model", MODEL, "--text", "t.txt", "--out", str(tmp_path / "acts"))
    assert "give --model, --text and --hook or --layer" in line
    assert not (tmp_path / "acts").exists()


def test_prompts_are_a_file_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "openings.txt").write_text("One day\nThen\n")
    with caplog.at_level(logging.WARNING):
        assert _openings(str(tmp_path / "openings.txt")) == ["One day", "Then"]
        assert not caplog.messages
        assert _openings("She") == ["She"]
    assert caplog.messages == ["--prompts is a file of openings now; give one itself as --prompt 'She'"]
    flags = ["--out", "o", "--model", "m", "--sae", "s", "--vector-files", "a.gguf", "--vector", "b.gguf"]
    assert parse(EffectsCommand, flags, "x").vector == ("a.gguf", "b.gguf")


def test_json_that_every_parser_reads() -> None:
    record = {"a": torch.tensor([1.0, float("nan")]), 2: (float("inf"), None, True, Path("x"))}
    assert json.loads(as_json(record)) == {"a": [1.0, None], "2": [None, None, True, "x"]}
