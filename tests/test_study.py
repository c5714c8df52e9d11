"""The study: its pages are those of its results, and its parts do the same again, on little.

The parts that make an SAE of their own or read one share the work folder of `work`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT

from steersman import SteersmanError
from study import __main__ as study
from study import common, features, pages, protein, report

SHARED = ROOT.parent / "shared"
LITTLE: dict[str, Any] = {"small": True, "tokens": 4000, "d_sae": 64, "k": 8, "looked_at": 6, "change_texts": 1}
RESULTS: dict[str, Any] = {
    "part": "features", "settings": {"model": "lab", "data": "the papers'", "seed": 3}, "planned": ["a", "b"],
    "rows": {"a": 1}, "seconds": {"a": {"wall": 90.0, "processor": 200.0}},
    "about": [{"torch": "2.13", "device": "CPU", "threads": 2}],
}  # fmt: skip


def page(**given: Any) -> report.Page:
    table = report.Table(caption="Means.", header=["", "score"], rows=[["one", report.cell(None)]])
    texts: dict[str, Any] = {name: name.title() for name in ("title", "asked", "how", "means", "change")}
    return report.Page(name="lab", tables=[table], **(texts | given))


def test_the_pages_of_results_are_written_from_their_json(tmp_path: Path) -> None:
    (tmp_path / "README").write_text(pages.README.read_text())
    pages.main(pages.Config(out=tmp_path / "out", readme=tmp_path / "README"))
    assert (tmp_path / "README").read_text() == pages.README.read_text(), "python scripts/study pages"
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
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
    assert "seed 3; CPU, 2 threads, torch 2.13." in text
    first = (tmp_path / "lab-one.svg").read_bytes()
    report.write(page(figures=[figure]), RESULTS, tmp_path)
    assert (tmp_path / "lab-one.svg").read_bytes() == first


def test_rows_are_of_the_machine_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = common.StudyConfig(work=tmp_path)
    for device in ("one", "two"):
        monkeypatch.setattr(common, "about", lambda _device, name=device: {"device": name, "threads": 1, "torch": "2"})
        found = common.Results(config, "lab")
        for row in ("a", device):
            found.row(row, lambda: 1)
    results = results_of(tmp_path, "lab")
    assert report.places(results) == "2 rows on one, 1 thread, torch 2; 1 row on two, 1 thread, torch 2"


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


def test_the_index_names_every_part() -> None:
    index = (ROOT / "docs" / "results" / "index.md").read_text()
    assert not [name for name in pages.MEASURED if f"{name}.md" not in index and f"`{name}`" not in index]


# Parts, on little


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A work folder with the features of the bundled model, whose making was stopped before the last row."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STEERSMAN_PROGRESS", "0")
        patched.setattr(features, "browse", stopped)
        with pytest.raises(KeyboardInterrupt):
            features.main(features.Config(work=folder, **LITTLE))
        patched.undo()
        patched.setenv("STEERSMAN_PROGRESS", "0")
        assert set(results_of(folder, "features")["rows"]) == {"sae", "random"}
        features.main(features.Config(work=folder, **LITTLE))
        yield folder


def stopped(*_: Any) -> Any:
    raise KeyboardInterrupt


def results_of(work: Path, part: str) -> dict[str, Any]:
    return json.loads((work / "results" / f"{part}.json").read_text())


def rendered(part: Any, results: dict[str, Any], out: Path) -> str:
    """The page of a part as text, written with its figures."""
    page = part.page(results)
    report.write(page, results, out)
    assert report.answer(page)
    return (out / f"{page.name}.md").read_text()


def test_features_are_the_same_twice_and_resumed(work: Path, tmp_path: Path) -> None:
    resumed = results_of(work, "features")
    features.main(features.Config(work=tmp_path, **LITTLE))
    at_once = results_of(tmp_path, "features")
    assert at_once["rows"] == resumed["rows"]
    assert at_once["settings"] == resumed["settings"]
    found = resumed["rows"]["sae"]["features"]
    assert [one["id"] for one in found] == [0, 10, 20, 30, 40, 50]
    assert all(one["strongest"] >= one["null"] for one in found if one["kind"] == "one label")
    text = rendered(features, resumed, tmp_path / "out")
    linked = set(re.findall(r"\]\(features/(features/\d+\.html)\)", text))
    assert len(linked) == 6
    assert all((work / "results" / "features" / name).is_file() for name in linked)


def test_what_fires_on_one_token_is_one_label() -> None:
    values, tokens = features.torch.ones(200), features.torch.full((200,), 5)
    odd = features.torch.arange(200) % 2 == 1
    fired = features.Fired(values, tokens, odd)
    label = features.label_tokens(fired)
    assert label.tolist() == [5]
    occurs = features.torch.zeros(9, dtype=features.torch.int64)
    occurs[5] = 125
    found = features.measures(fired, label, features.torch.tensor([3]), occurs, n=10_000)
    assert found.pop("kind") == "one label"
    assert found == pytest.approx(
        {"density": 0.02, "fired": 200, "effective": 1, "recall": 1, "strongest": 1, "null": 0, "precision": 0.8}
    )
    mixed = features.Fired(values, features.torch.arange(200) % 9, odd)
    assert features.measures(mixed, label, label, occurs, n=10_000)["kind"] == "spread"
    assert features.measures(mixed, label, label, occurs, n=1000)["kind"] == "dense"


def test_the_browsers_pages_are_published_with_the_results(work: Path, tmp_path: Path) -> None:
    pages.main(pages.Config(work=work, results=tmp_path / "results" / "json", out=tmp_path / "results"))
    assert (tmp_path / "results" / "features" / "features" / "10.html").is_file()
    assert "](features/features/10.html)" in (tmp_path / "results" / "features.md").read_text()


def test_a_protein_model_goes_through_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_progress: None
) -> None:
    monkeypatch.setattr(protein, "METHODS", ("diffmean",))
    little: dict[str, Any] = {"tokens": 3000, "d_sae": 64, "sequences": 2, "looked_at": 4, "budgets": (0.05,)}
    protein.main(protein.Config(work=tmp_path, small=True, **little))
    results = results_of(tmp_path, "protein")
    (one,) = results["rows"]["diffmean"]["budgets"].values()
    assert one["reached"] == pytest.approx(0.05, rel=0.1)
    assert results["rows"]["model"]["parameters"] == 7_512_474
    assert "its weights are random" in rendered(protein, results, tmp_path)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the papers' data are not here")
@pytest.mark.skipif(not (SHARED / "models" / "stories260k").is_dir(), reason="stories260k is not here")
def test_features_of_another_model_on_the_papers_data(tmp_path: Path, no_progress: None) -> None:
    model = str(SHARED / "models" / "stories260k")
    little: dict[str, Any] = LITTLE | {"tokens": 12_000}  # of several documents
    features.main(features.Config(model=model, data=SHARED / "data", work=tmp_path, **little))
    results = results_of(tmp_path, "features")
    assert results["settings"]["data"] == "the papers'"
    assert "--model runs/stories260k --data DATA" in rendered(features, results, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["cooking"], "no part 'cooking'; the parts are model, saes"),
        (["features", "--data", "nowhere"], "nowhere lacks wikitext2.jsonl"),
        (["features", "--small", "--seed", "5", "--work", "WORK"], "holds results of other settings ("),
        (["pages", "--work", "nowhere"], "nowhere/results holds no results of a part"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], wrong: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["study", *(str(work) if word == "WORK" else word for word in arguments)])
    assert study.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("study: ")
    assert wrong in said
    assert said.count("\n") == 1
