"""The study: its pages are those of its results, and its parts do the same again, on little."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT

from steersman import SteersmanError
from study import __main__ as study
from study import pages, report

RESULTS: dict[str, Any] = {
    "part": "features", "settings": {"model": "lab", "data": "the papers'", "seed": 3}, "planned": ["a", "b"],
    "rows": {"a": 1}, "seconds": {"a": {"wall": 90.0, "processor": 200.0}},
    "about": {"torch": "2.13", "device": "CPU", "threads": 2},
}  # fmt: skip


def page(**given: Any) -> report.Page:
    table = report.Table(caption="Means.", header=["", "score"], rows=[["one", report.cell(None)]])
    texts: dict[str, Any] = {name: name.title() for name in ("title", "asked", "how", "means", "change")}
    return report.Page(name="lab", tables=[table], **(texts | given))


def test_the_pages_of_results_are_written_from_their_json(tmp_path: Path) -> None:
    pages.main(pages.Config(out=tmp_path))
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in pages.DOCS.iterdir() if path.suffix in (".md", ".svg")}
    assert set(written) == set(committed)
    creator = f"Matplotlib {report.mpl.__version__}<".encode()
    stale = [name for name, content in committed.items() if content != written[name] and same_tool(content, creator)]
    assert not stale, "python scripts/study pages"


def same_tool(content: bytes, creator: bytes) -> bool:
    """Whether a file is no plot, or one of this version of the library that draws."""
    return b"<svg" not in content or creator in content


def test_a_page_has_its_sections_and_says_what_was_not_run(tmp_path: Path) -> None:
    figure = report.Figure(name="one", alt="A line", draw=lambda: report.curves({"a": [(0, 1.0), (1, 2.0)]}, "x", "y"))
    report.write(page(figures=[figure], not_run=["a GPU"]), RESULTS, tmp_path)
    text = (tmp_path / "lab.md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "What was asked", "How", "Results", "What it means", "What would change it", "How it was run",
    ]  # fmt: skip
    assert "\npython scripts/study features --model runs/lab --data DATA --seed 3\n" in text
    assert "Not run: a GPU, `b`." in text
    assert "90 s (3 min of the processor)" in text
    first = (tmp_path / "lab-one.svg").read_bytes()
    report.write(page(figures=[figure]), RESULTS, tmp_path)
    assert (tmp_path / "lab-one.svg").read_bytes() == first


def test_rows_of_a_table_are_as_wide_as_its_header() -> None:
    with pytest.raises(ValueError, match="2 cells under 1"):
        report.table_text(report.Table(caption="", header=["one"], rows=[["1", "2"]]))


def test_words_are_chosen_by_the_interval() -> None:
    assert [report.side({"mean": 1, "low": low, "high": 2}) for low in (0.5, -1)] == [1, 0]
    assert report.side({"mean": -1, "low": -2, "high": -0.1}) == -1


def test_results_are_published_from_a_work_folder(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with pytest.raises(SteersmanError, match="no results of a part"):
        pages.publish(tmp_path / "results", tmp_path / "json")
    (tmp_path / "results" / "saes.json").write_text(json.dumps(RESULTS))
    pages.publish(tmp_path / "results", tmp_path / "json")
    assert (tmp_path / "json" / "saes.json").read_text() == json.dumps(RESULTS)


def test_a_part_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["study", "cooking"])
    assert study.main() == 2
    assert capsys.readouterr().err.startswith("study: no part 'cooking'; the parts are model, saes")


def test_the_index_names_every_part() -> None:
    index = (ROOT / "docs" / "results" / "index.md").read_text()
    assert not [name for name in pages.MEASURED if f"{name}.md" not in index and f"`{name}`" not in index]
