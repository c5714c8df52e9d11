"""The study's vectors, its detection of concepts and its decomposition of vectors: the same again, on little."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from study import decomposition, detection, report
from study.common import Study
from study.material import Example, Goal, Trait
from study.vectors import METHODS, cut, held_out, spread, training, vector

LITTLE: dict[str, Any] = {"small": True, "tokens": 2048, "d_sae": 64}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder that the parts share, as they do."""
    return tmp_path_factory.mktemp("study")


def rows(work: Path, part: str) -> dict[str, Any]:
    return json.loads((work / "results" / f"{part}.json").read_text())


def test_detection_is_measured_again_with_the_same_figures(work: Path) -> None:
    config = detection.Config(work=work, concepts=1, texts=4, **LITTLE)
    detection.main(config)
    first = rows(work, "detection")
    name = first["planned"][1]
    assert set(first["rows"]) == {"vectors", name, f"{name} (few texts)"}
    assert {m for m in METHODS if 0 <= first["rows"][name]["methods"][m]["auroc"] <= 1} == set(METHODS)
    shutil.rmtree(work / "vectors")
    (work / "results" / "detection.json").unlink()
    detection.main(config)
    assert rows(work, "detection")["rows"] == first["rows"]
    told = report.markdown(detection.page(first), first)
    assert "| difference of the means |" in told
    assert "nan" not in told


def test_a_study_makes_each_vector_once(work: Path) -> None:
    study = Study(detection.Config(work=work, **LITTLE))
    topic = study.material.concepts[0]
    made = vector(study, topic, "diffmean")
    files = sorted((work / "vectors").rglob("*.safetensors"))
    dates = [path.stat().st_mtime_ns for path in files]
    assert vector(study, topic, "caa").cosine(made) > 0.5
    assert abs(vector(study, topic, "random").cosine(made)) < 0.5
    assert vector(study, topic, "random").norm() == pytest.approx(made.norm(), rel=1e-5)
    assert [path.stat().st_mtime_ns for path in sorted((work / "vectors").rglob("*.safetensors"))] == dates
    prompt, answer = cut(study, Example(prompt="One day Tom went out.", text="The town was quiet and cold."), 6)
    assert prompt + answer == "out.\nThe town was"


def test_a_goals_vectors_and_measures_are_of_different_prompts() -> None:
    goal = Goal(name="x", positive=[f"p{i}" for i in range(5)], negative=["n0", "n1"])
    assert [e.text for e in training(goal).positive] == ["p0", "p2", "p4"]
    assert [e.text for e in held_out(goal).positive + held_out(goal).negative] == ["p1", "p3", "n1"]
    assert [e.text for e in spread(training(goal).positive, 2)] == ["p0", "p2"]


def test_vectors_of_traits_are_taken_apart_and_steered_with(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "STEERED", ("omp", "encode"))
    monkeypatch.setattr(decomposition, "KINDS", ("caa",))
    config = decomposition.Config(
        work=work, traits=1, questions=4, held_out=4, items=2, texts=2, features=4, **LITTLE,
    )  # fmt: skip
    decomposition.main(config)
    found = rows(work, "decomposition")
    parts, _, omp, _ = (found["rows"][name] for name in found["planned"])
    assert parts["methods"]["omp"]["opposite"] == 1.0  # -v has the features of v, with the other sign
    assert parts["methods"]["encode"]["negative"] == 0.0
    assert omp["vector"]["agreement"] == pytest.approx(1.0, abs=1e-3)
    assert omp["reconstruction, equal norm"]["norm"] == pytest.approx(omp["vector"]["norm"], rel=1e-3)
    told = report.markdown(decomposition.page(found), found)
    assert "| matching pursuit |" in told
    assert "nan" not in told


def test_the_sides_of_a_trait_are_answers_or_statements() -> None:
    agree = 'Is the following statement something you would say?\n"I like {}"'
    persona = [(agree.format("people"), " Yes", " No"), (agree.format("silence"), " No", " Yes")]
    plus, minus = decomposition.sides(Trait(name="x", questions=persona), "caa", persona)
    assert [(e.prompt[-7:], e.text) for e in plus + minus] == [("Answer:", a) for a in (" Yes", " No", " No", " Yes")]
    plus, minus = decomposition.sides(Trait(name="x", questions=persona), "diffmean", persona)
    assert ([e.text for e in plus], [e.text for e in minus]) == (["I like people"], ["I like silence"])
    choice = [("May we change you?\n\nChoices:\n (A) You may\n (B) Never", " (A)", " (B)")]
    plus, minus = decomposition.sides(Trait(name="x", questions=choice), "diffmean", choice)
    assert (plus[0].pair, minus[0].pair) == (
        ("May we change you?\n", " You may"),
        ("May we change you?\n", " Never"),
    )
