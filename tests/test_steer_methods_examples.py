"""Examples from lists and files."""

import json
from pathlib import Path

import pytest

from steersman.errors import SteersmanError
from steersman.steer.methods import Example, as_examples, read_examples


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def test_kinds_of_entries() -> None:
    given = ["a b", ("a", " b"), {"text": "a b"}, {"prompt": "a", "answer": " b"}, Example(text="a b", prompt="a")]
    found = as_examples(given, "positive")
    assert {e.text for e in found} == {"a b"}
    assert [e.prompt for e in found] == ["", "a", "", "a", "a"]
    assert as_examples("alone", "positive") == [Example(text="alone")]
    assert len(as_examples((t for t in "abc"), "positive")) == 3


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path / "e.jsonl",
        {"positive": "good", "negative": "bad"},
        "",
        {"prompt": "Is it?", "positive": " Yes", "negative": " No"},
        {"text": "alone", "label": "negative"},
        {"text": "other", "label": True},
    )
    found = read_examples(path)
    assert [e.text for e in found.positive] == ["good", "Is it? Yes", "other"]
    assert [e.text for e in found.negative] == ["bad", "Is it? No", "alone"]
    assert found.negative[1].prompt == "Is it?"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not readable as JSON"),
        ("[1]", "line 2 is list, not an object"),
        ({"positive": "x"}, r"line 2 has \['positive'\]; it needs"),
        ({"positive": "x", "negative": " "}, "line 2, negative: is empty"),
        ({"text": "x", "label": "maybe"}, "line 2: the label must be positive or negative, got 'maybe'"),
        ({"prompt": "x", "positive": "", "negative": "y"}, "line 2, positive: has an empty answer"),
    ],
)
def test_wrong_lines(tmp_path: Path, record: object, message: str) -> None:
    path = write(tmp_path / "e.jsonl", {"positive": "good", "negative": "bad"}, record)
    with pytest.raises(SteersmanError, match=message):
        read_examples(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
