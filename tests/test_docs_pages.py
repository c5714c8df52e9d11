"""Pages whose files and commands run as they stand: each in a folder of its own, top to bottom, in this process."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from steersman.cli import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|bash)(?: title=\"([\w./-]+)\")?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = ["affine.md"]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_progress: None) -> None:
    monkeypatch.chdir(tmp_path)
    found = BLOCK.findall((ROOT / "docs" / page).read_text())
    assert found
    for language, name, text in found:
        if language == "python":
            assert name, "a file of a page has a name"
            (tmp_path / name).write_text(text)
            runpy.run_path(str(tmp_path / name))
            continue
        for line in filter(None, text.splitlines()):
            program, *arguments = shlex.split(line, comments=True)
            assert program == "steersman"
            main(arguments)
