"""The documentation's site: it builds without a warning, holds every page and public name, and needs no other host."""

import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT

FACES = ("steersman", "steersman.lm", "steersman.kernels", "steersman.sae", "steersman.train", "steersman.steer")
LOADED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")

pytest.importorskip("zensical", reason="the site is built with the docs extra")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "dev" / "site.py"))


@pytest.fixture(scope="module")
def site(script: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. The build fails on links to pages, anchors and names that are not there."""
    out = tmp_path_factory.mktemp("docs") / "site"
    script["build"](out)
    return out


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not LOADED.findall(page.read_text()), page.name
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", style.read_text()), style.name


@pytest.mark.parametrize("face", FACES)
def test_the_reference_has_every_public_name(site: Path, face: str) -> None:
    page = (site / "reference" / f"{face.rpartition('.')[2]}.html").read_text()
    names = [name for name in importlib.import_module(face).__all__ if not name.startswith("__")]
    assert not [name for name in names if f'id="{face}.{name}"' not in page]


def test_examples_in_docstrings_are_blocks_of_python(site: Path) -> None:
    pages = [page.read_text() for page in (site / "reference").glob("*.html")]
    assert any("language-pycon" in page for page in pages)
    assert not [page for page in pages if re.search(r"<blockquote>\s*<blockquote>", page)]


def test_every_page_is_in_the_navigation() -> None:
    def leaves(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]

    named = leaves(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    files = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")]
    there = {path.with_suffix(".md").as_posix() for path in files}
    assert sorted(named) == sorted(there | {"index.md", "contributing.md", "changelog.md"})


def test_a_notebook_becomes_a_page_with_its_outputs(script: dict[str, Any]) -> None:
    outputs = [
        {"output_type": "stream", "text": ["one\n", "two\n"]},
        {"output_type": "execute_result", "data": {"text/html": ["<table>\n", "\n", "</table>"], "text/plain": "no"}},
        {"output_type": "display_data", "data": {"image/png": "iVBO\n", "text/plain": "<Figure>"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n", "and text"]},
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
    ]
    assert script["notebook_page"]({"cells": cells}) == (
        "# A title\nand text\n\n```python\nprint(1)\n```\n\n```text\none\ntwo\n```\n\n"
        '<div class="output">\n<table>\n</table>\n</div>\n\n<img alt="figure" src="data:image/png;base64,iVBO">\n'
    )


def test_a_broken_link_fails_the_build(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Builds a site of two pages, with the configuration of the real one but for its navigation."""
    config = (ROOT / "zensical.toml").read_text()
    config = re.sub(r"^nav = \[.*?^\]$", 'nav = ["index.md", "other.md"]', config, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "zensical.toml").write_text(config)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[here](other.md#there), [gone](gone.md)\n")
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, check=False)
    assert done.returncode
    said = re.sub(r"\x1b\[[\d;]*m", "", "".join(capfd.readouterr()))
    assert "anchor does not exist" in said
    assert "page does not exist" in said
