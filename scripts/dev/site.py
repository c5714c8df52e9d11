"""Build the documentation's site: pages of docs/, the README as the first page, notebooks, the API from docstrings.

python scripts/dev/site.py --out site

The build fails on a link to a page, an anchor or a name that is not there, and asks nothing of the network. The pages
open from disk and from any web server.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Build the documentation's site."""

    out: Path = Path("site")
    """Folder to write; what it holds is replaced."""
    external: bool = False
    """List the links to other sites instead, by page."""


def build(out: Path) -> None:
    """The site, written to `out`. Ends with what is wrong where a link leads nowhere."""
    with tempfile.TemporaryDirectory() as made:
        stage = Path(made)
        gather(stage / "docs")
        (stage / "scripts").symlink_to(ROOT / "scripts")
        shutil.copy(ROOT / "zensical.toml", stage)
        done = subprocess.run(
            [sys.executable, "-m", "zensical", "build", "--strict"],
            cwd=stage,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)  # its colours
            raise SystemExit(said.partition("Traceback")[0])
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(stage / "site", out)


def gather(docs: Path) -> None:
    """The pages of the site as Markdown, in the folder `docs`."""
    shutil.copytree(ROOT / "docs", docs)
    for file, name in (
        ("README.md", "index.md"),
        ("CONTRIBUTING.md", "contributing.md"),
        ("CHANGELOG.md", "changelog.md"),
    ):
        (docs / name).write_text(LINK.sub(below_docs, (ROOT / file).read_text()))
    for notebook in sorted(docs.rglob("*.ipynb")):
        notebook.with_suffix(".md").write_text(notebook_page(json.loads(notebook.read_text())))
        notebook.unlink()


def below_docs(link: re.Match[str]) -> str:
    """A link of a file at the root as one from docs/."""
    names = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
    target = link[1].removeprefix("docs/")
    return f"]({names.get(target, target)})"


def notebook_page(notebook: dict[str, Any]) -> str:
    """The cells of a notebook with the outputs it holds."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"```python\n{source}\n```")
            parts += map(output_block, cell["outputs"])
    return "\n\n".join(part for part in parts if part) + "\n"


def output_block(output: dict[str, Any]) -> str:
    """One output of a cell: a picture or HTML if it has one, else its text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        html = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))  # an empty line would end it for Markdown
        return f'<div class="output">\n{html}\n</div>'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def external_links() -> str:
    """Each link to another site, behind the page that has it."""
    pages = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    links = [(p.relative_to(ROOT), url) for p in pages for url in re.findall(r"https?://[^\s)>`\"]+", p.read_text())]
    return "\n".join(f"{page}: {url}" for page, url in dict.fromkeys(links))


def main(settings: Settings) -> None:
    if settings.external:
        print(external_links())
        return
    build(settings.out)
    print(f"{settings.out / 'index.html'}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
