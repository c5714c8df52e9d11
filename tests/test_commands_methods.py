"""`steersman methods`: everything that the registries hold, and all that is known of a preset."""

import json

import pytest
from support.commands import fails

from steersman.cli import main
from steersman.steer import METHODS, PRESETS
from steersman.steer.decompose.base import METHODS as DECOMPOSITIONS
from steersman.steer.scores.base import SCORES, Score
from steersman.steer.training.edit_method import EDIT_METHODS


def test_everything_is_listed_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "--json"])
    entries = json.loads(capsys.readouterr().out)
    for kind, names in {
        "vector": METHODS,
        "edit": EDIT_METHODS,
        "preset": PRESETS,
        "score": SCORES,
        "decomposition": DECOMPOSITIONS,
    }.items():
        assert [entry["name"] for entry in entries if entry["kind"] == kind] == list(names)
    for entry in entries:
        assert entry["source"], entry
        assert entry["needs"], entry
        assert entry["certainty"], entry
    main(["methods"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in (*METHODS, *PRESETS))
    main(["methods", "--kind", "score"])
    assert "published systems" not in capsys.readouterr().out


def test_a_preset_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "--name", "corrsteer"])
    shown = capsys.readouterr().out
    one = PRESETS["corrsteer"]
    assert all(
        text in shown for text in (one.title, one.source, *one.traps, *(need.how for need in one.needs.values()))
    )
    main(["methods", "--name", "corrsteer", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["values"]["samples"] == 4000
    assert "unknown preset 'corstir'" in fails(capsys, "methods", "--name", "corstir")
    assert "near it: preset" in fails(capsys, "methods", "--kind", "presets")


def test_a_part_from_outside_that_says_nothing_of_itself_is_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SCORES, "_parts", dict(SCORES))

    class Silent(Score):
        name = "silent"

    main(["methods", "--kind", "score", "--json"])
    [entry] = [one for one in json.loads(capsys.readouterr().out) if one["name"] == "silent"]
    assert (entry["what"], entry["source"]) == ("Silent", "says no source")
    assert entry["certainty"] == f"from outside: {Silent.__module__}"
