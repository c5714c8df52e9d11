"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

from steersman.cli import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert (tmp_path / "runs" / "demo" / "cfg.json").is_file()


def test_commands_and_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from steersman.cli import main

    lines = [line.split() for line in re.findall(r"^steersman (.*)$", README, flags=re.MULTILINE)]
    shown = [(" ".join(w[:2]) if " ".join(w[:2]) in COMMANDS else w[0], " ".join(w)) for w in lines]
    assert {name for name, _ in shown} >= {"cache", "train", "eval", "features", "steer"}
    for name, flags in shown:
        assert name in COMMANDS
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        known = capsys.readouterr().out
        for flag in re.findall(r"--[\w-]+", flags):
            assert flag in known, f"steersman {name} has no {flag}"


def test_files_named_are_there() -> None:
    for name in re.findall(r"`([\w./-]+\.(?:py|sh))`", README):
        assert (Path(__file__).parents[1] / name).is_file(), name
