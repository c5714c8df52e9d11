"""Files whole or absent, folders there or said not to be, whatever cuts the work short."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from support.power_cut import PowerCut, power_cut_after

from steersman.errors import SteersmanError
from steersman.files import fsync_folder, make_folder, write_bytes, write_json, write_text, write_whole


def test_what_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ä\n")
    write_bytes(tmp_path / "b", b"\0\1")
    write_json(tmp_path / "c.json", {"b": [1, 2.5], "a": None})
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\0\1"
    assert (tmp_path / "c.json").read_text() == '{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": null\n}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b", "c.json"]


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / ".weights.tmp").touch(mode=0o600)  # left by a process that was killed
    write_whole(tmp_path / "weights", lambda path: save_file({"x": torch.zeros(3)}, path))
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "weights")]
    assert modes[0] == modes[1]


def test_a_power_cut_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for n in range(100):
        file.write_text("old")
        try:
            with power_cut_after(n) as made:
                write_text(file, "new")
        except PowerCut:
            assert file.read_text() in ("old", "new")
            write_text(file, "next")
            assert [path.name for path in tmp_path.iterdir()] == ["file"]
            continue
        assert made[-3:] == ["fsync", "replace", "fsync"], "the file, its name, and the folder that holds the name"
        break
    assert file.read_text() == "new"


def test_an_error_leaves_no_temporary_file(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("stop")

    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError, match="stop"):
        write_whole(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SteersmanError, match=r"none/file could not be written: No such file or directory"):
        write_text(tmp_path / "none" / "file", "")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SteersmanError, match=r"file could not be written: No space left on device"):
        write_text(tmp_path / "file", "")
    assert not list(tmp_path.iterdir())


def test_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(str(tmp_path / "a" / "b"))
    fsync_folder(tmp_path / "a")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(SteersmanError, match="file cannot be made: File exists"):
        make_folder(tmp_path / "file")
    with pytest.raises(SteersmanError, match="file/in cannot be made: Not a directory"):
        make_folder(tmp_path / "file" / "in")


def test_what_safetensors_says_is_told(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.raises(SteersmanError, match="file could not be written: .*No space left on device"):
        write_whole(tmp_path / "file", fail)
