"""What commands write to is tried before the work: each odd place is one line, before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import fails

from steersman.cli import COMMANDS
from steersman.errors import SteersmanError
from steersman.files import check_place

NEEDS = {
    "cache": ["--model", "m", "--text", "t.txt", "--hook", "h"],
    "train": ["--store", "s", "--d-sae", "8", "--k", "2"],
    "sweep": ["--store", "s", "--d-sae", "8", "--k", "2"],
    "eval": ["--sae", "a", "--store", "s"],
    "crosscoder": ["a"],
    "features": ["--sae", "a", "--store", "s", "--model", "m"],
    "compare": ["a", "b"],
    "label": ["--sae", "a", "--model", "m"],
    "steer": ["--model", "m", "--sae", "a", "--feature", "1"],
    "convert": ["a", "--to", "saelens"],
    "vector make": ["--sae", "a", "--feature", "1"],
    "vector calibrate": ["--vector", "v", "--model", "m", "--target-kl", "1"],
    "vector sweep": ["--data", "d", "--model", "m"],
    "vector convert": ["--vector", "v"],
    "bake": ["--model", "m", "--vector", "v"],
    "probe": ["--model", "m", "--sae", "a", "--data", "d.jsonl"],
    "scores": ["--model", "m", "--sae", "a", "--score", "contrast"],
    "evaluate": ["--model", "m", "--vector", "v", "--prompts", "p"],
    "effects": ["--model", "m", "--sae", "a", "--text", "t.txt"],
    "target": ["--effects", "e", "--feature", "1"],
    "decompose": ["--vector", "v", "--sae", "a"],
}
"""What else each command must be given; none of it is there, so a command that looked at it first would say so."""
WRITES = {name: command.writes for name, command in COMMANDS.items() if command.writes}


def odd_places(folder: Path, kind: str) -> dict[str, str]:
    """Places of one kind that nothing can be written to."""
    (folder / "file").write_text("mine")
    (folder / "dir").mkdir(exist_ok=True)
    places = {
        "no name": "",
        "a long name": str(folder / ("n" * 300)),
        "below a file": str(folder / "file" / "x"),
        "/proc": "/proc/nothing/here",
        "a NUL": str(folder / "a\0b"),
        "of the other kind": str(folder / ("file" if kind == "folder" else "dir")),
    }
    return places if kind == "folder" else {**places, "a device": os.devnull}


@pytest.mark.parametrize("name", WRITES)
def test_odd_places_are_one_line_before_anything_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for field, kind in WRITES[name].items():
        for place in odd_places(tmp_path, kind).values():
            given = [place] if name == "convert" else [f"--{field}", place]
            needs = NEEDS.get(name, [])
            line = (
                fails(capsys, *name.split(), *needs[:1], *given, *needs[1:])
                if name == "convert"
                else fails(
                    capsys, *name.split(), *needs, *given, *(["--out", "o"] if field in ("plot", "vector") else [])
                )
            )
            assert any(words in line for words in ("cannot be written", "name a", "no regular", "has no name")), line
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir", "file"], "something was left"


def test_every_command_that_writes_is_tried() -> None:
    named = {name for name, command in COMMANDS.items() if not command.writes}
    assert named == {
        "activations",
        "completion",
        "find",
        "inspect",
        "methods",
        "neighbours",
        "plan",
        "ui",
        "vector show",
    }


def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b", "folder")
    check_place(tmp_path / "a" / "b.json", "file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("x")
    check_place(tmp_path / "a", "folder")
    check_place(tmp_path / "a" / "mine", "file")
    assert (tmp_path / "a" / "mine").read_text() == "x"
    check_place(tmp_path / "kept" / "file", "file", keep=True)
    assert list(tmp_path.rglob("kept/*")) == []
    assert (tmp_path / "kept").is_dir()


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(SteersmanError, match="Permission denied"):
        check_place(tmp_path / "new" / "x", "folder")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_libraries_load_is_one_line() -> None:
    """The interrupt comes while PyTorch is being imported, from a module that is found in its place."""
    program = (
        "import sys, os, signal, types\n"
        "from steersman import cli\n"
        "def load(self):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)\n"
        "    except BaseException: raise ImportError('buried')\n"
        "cli.Command.load = load\n"
        "cli.main(['plan'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "steersman: interrupted\n"
