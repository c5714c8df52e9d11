"""Documents from every kind of source, and contexts that can be taken up anywhere."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import SteersmanError
from steersman.text import open_text, read_texts
from steersman.train.capture.contexts import ContextBatch, context_batches

TEXTS = ["One fish.", "Zwei Fische — äöü.", "", "Trois\tpoissons.", "4 {fish}"]
BOS, PAD = 1, 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate(TEXTS)) + "\n")
    pq.write_table(pa.table({"text": TEXTS, "id": list(range(5))}), tmp_path / "b.parquet")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_bytes("\ufeffline one\r\nline two\n\n \nline three".encode())
    (tmp_path / "ignored.md").write_text("not text to read")
    return tmp_path


def test_every_kind_of_source_gives_its_documents(folder: Path) -> None:
    lines = ["line one", "line two", "line three"]
    assert list(open_text(TEXTS).documents()) == TEXTS
    assert list(open_text(folder / "a.jsonl").documents()) == TEXTS
    assert list(open_text(str(folder / "b.parquet")).documents()) == TEXTS
    assert list(open_text(folder / "c" / "d.txt").documents()) == lines
    assert list(open_text(folder / "c" / "d.txt", txt_documents="paragraph").documents()) == [
        "line one\nline two",
        "line three",
    ]
    assert list(open_text(folder / "c" / "d.txt", txt_documents="file").documents()) == [
        "line one\r\nline two\n\n \nline three"
    ]
    assert list(open_text(folder).documents()) == TEXTS + TEXTS + lines


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 10, 12, 13, 40])
def test_a_folder_restarts_at_any_document(folder: Path, start: int) -> None:
    everything = list(open_text(folder).documents())
    assert list(open_text(folder).documents(start)) == everything[start:]


def test_text_made_on_demand_is_endless_and_restarts() -> None:
    text = open_text(lambda number: f"document {number}")
    documents = text.documents(1_000_000)
    assert [next(documents), next(documents)] == ["document 1000000", "document 1000001"]
    assert text.n_characters() is None
    assert open_text(text) is text


def test_a_hub_dataset_is_loaded_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> datasets.Dataset:
        asked.append((path, name, split, streaming))
        return datasets.Dataset.from_dict({"body": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_text("someone/corpus:en:test[:9]", text_column="body").documents(3)) == TEXTS[3:]
    assert list(open_text("corpus", text_column="body", streaming=False).documents()) == TEXTS
    assert asked == [("someone/corpus", "en", "test[:9]", True), ("corpus", None, "train", False)]
    with pytest.raises(SteersmanError, match=r"no 'text'; it has \['body'\]"):
        list(open_text("corpus").documents())


def test_the_identity_changes_with_the_documents(folder: Path) -> None:
    assert open_text(TEXTS).identity() == open_text(tuple(TEXTS)).identity()
    assert open_text(["ab", "c"]).identity() != open_text(["a", "bc"]).identity()
    before = open_text(folder).identity()
    (folder / "a.jsonl").write_text('{"text": "other"}\n')
    assert open_text(folder).identity() != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of texts is empty"),
        ("", "no text given"),
        ("/nowhere/file.jsonl", "no such file"),
        ("a.jsnl.jsonl", "no such file"),
        ("One fish, two fish.", r"pass \[text\]"),
        (17, "not int"),
    ],
)
def test_a_source_that_is_none_is_refused(source: object, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        open_text(source)


def test_a_missing_file_names_near_ones(folder: Path) -> None:
    with pytest.raises(SteersmanError, match=r"near it: a\.jsonl"):
        open_text(folder / "aa.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "good"}\n{"text": \n', "line 2 is not JSON"),
        ("x.jsonl", b'{"body": "good"}\n', r"no 'text'; it has \['body'\]"),
        ("x.jsonl", b'{"text": 5}\n', "is int, not text"),
        ("x.jsonl", b"[1, 2]\n", "no 'text'"),
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.parquet", b"PAR1nothing", "not a readable parquet"),
        ("x.txt", b"", "empty"),
        ("x.csv", b"text\n", "not .csv"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SteersmanError, match=message):
        list(open_text(tmp_path / name).documents())


def test_a_document_that_is_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="document 1 is NoneType"):
        list(open_text(["good", None]).documents())
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(SteersmanError, match=r"no column 'text'; it has \['body'\]"):
        list(open_text(tmp_path / "x.parquet").documents())


# Contexts. The "tokenizer" reads numbers: a document is a list of token ids as text.


def numbers(texts: list[str]) -> list[list[int]]:
    return [[int(word) for word in text.split()] for text in texts]


def contexts(texts: list[str], cursor: dict[str, int] | None = None, **options: object) -> list[ContextBatch]:
    settings = {"context_length": 8, "batch_size": 2, "packing": True, "bos_id": BOS, "pad_id": PAD, **options}
    return list(context_batches(open_text(texts), numbers, cursor=cursor, **settings))  # pyright: ignore[reportArgumentType]


def test_packed_contexts_by_hand() -> None:
    first, second = contexts(["10 11 12", "", "20 21 22 23 24 25 26 27 28", "30"])
    assert first.input_ids.tolist() == [[1, 10, 11, 12, 1, 20, 21, 22], [1, 23, 24, 25, 26, 27, 28, 1]]
    assert first.doc_ids.tolist() == [[0, 0, 0, 0, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2, 2, 3]]
    assert first.full
    assert first.cursor == {"document": 0, "token": 0}
    assert second.input_ids.tolist() == [[1, 30]]
    assert second.cursor == {"document": 3, "token": 0}


def test_one_document_a_row_by_hand() -> None:
    first, second = contexts(["10 11 12", "", "20 21 22 23 24 25 26 27 28", "30"], packing=False)
    assert first.input_ids.tolist() == [[1, 10, 11, 12, 0, 0, 0, 0], [1, 20, 21, 22, 23, 24, 25, 26]]
    assert first.doc_ids.tolist() == [[0, 0, 0, 0, -1, -1, -1, -1], [2] * 8]
    assert first.attention_mask().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8]
    assert second.input_ids.tolist() == [[1, 30]]
    assert second.cursor == {"document": 3, "token": 0}


def test_without_bos_and_with_a_bos_in_the_text() -> None:
    (batch,) = contexts(["10 11", "1 20"], bos_id=None)
    assert batch.input_ids.tolist() == [[10, 11, 1, 20]]
    (batch,) = contexts(["1 10 11"])
    assert batch.input_ids.tolist() == [[1, 10, 11]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    context_length=st.integers(2, 9),
    batch_size=st.integers(1, 4),
    packing=st.booleans(),
    bos=st.booleans(),
)
def test_contexts_keep_every_token_and_restart_at_every_batch(
    lengths: list[int], context_length: int, batch_size: int, packing: bool, bos: bool
) -> None:
    ids = iter(range(10, 10_000))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    texts = [" ".join(map(str, document)) for document in documents]
    options = {
        "context_length": context_length, "batch_size": batch_size, "packing": packing, "bos_id": BOS if bos else None,
    }  # fmt: skip
    batches = contexts(texts, **options)
    kept = [
        (int(doc), int(token))
        for batch in batches
        for token, doc in zip(batch.input_ids.flat, batch.doc_ids.flat)
        if doc >= 0 and token != BOS
    ]
    room = None if packing else context_length - bos
    assert kept == [(number, token) for number, document in enumerate(documents) for token in document[:room]]
    assert all(batch.full for batch in batches[:-1]) or not packing
    if bos:
        assert all((batch.input_ids[:, 0] == BOS).all() for batch in batches)
    for number, batch in enumerate(batches):
        again = contexts(texts, dict(batch.cursor), **options)
        assert len(again) == len(batches) - number
        for one, other in zip(batches[number:], again):
            np.testing.assert_array_equal(one.input_ids, other.input_ids)
            np.testing.assert_array_equal(one.doc_ids, other.doc_ids)
            assert one.cursor == other.cursor


@pytest.mark.parametrize("packing", [True, False])
def test_a_long_document_is_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    texts = ["10 11", " ".join(map(str, range(100, 190))), "", "12", " ".join(map(str, range(200, 240)))]
    whole = contexts(texts, packing=packing)
    monkeypatch.setattr("steersman.train.capture.contexts.PIECE_CHARACTERS", 30)
    seen: list[int] = []

    def counted(group: list[str]) -> list[list[int]]:
        seen.extend(map(len, group))
        return numbers(group)

    settings = {"context_length": 8, "batch_size": 2, "packing": packing, "bos_id": BOS, "pad_id": PAD}
    for cursor in [None, *(batch.cursor for batch in whole)]:
        found = list(context_batches(open_text(texts), counted, cursor=cursor, **settings))  # pyright: ignore[reportArgumentType]
        for one, other in zip(whole[len(whole) - len(found) :], found, strict=True):
            np.testing.assert_array_equal(one.input_ids, other.input_ids)
            np.testing.assert_array_equal(one.doc_ids, other.doc_ids)
            assert one.cursor == other.cursor
    assert max(seen) <= 30


def test_documents_that_are_none_are_named_or_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        '{"text": "good"}',
        '{"text": "half \\ud83d"}',
        '{"text": "a", "more": ' + "[" * 100_000,
        "",
        "{",
        '{"text": 5}',
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join([*lines, '{"text": "end"}']).encode() + b'\n{"text": "\xff"}\n')
    source = tmp_path / "a.jsonl"
    for start, message in enumerate(
        [
            "line 2: 'text' holds half of a surrogate pair",
            "line 3 is nested too deeply",
            "line 5 is not JSON",
            "line 6: 'text' is",
        ],
        1,
    ):
        with pytest.raises(SteersmanError, match=message):
            next(iter(open_text(source).documents(start)))
    found = open_text(source, on_bad_text="skip")
    assert list(found.documents()) == ["good", "", "", "", "", "end", ""]
    assert list(found.documents(4)) == ["", "end", ""]
    assert "line 5 is not JSON" in caplog.text
    with pytest.raises(SteersmanError, match="document 1 holds half of a surrogate pair"):
        list(open_text(["a", "\ud83d"]).documents())
    with pytest.raises(SteersmanError, match="on_bad_text 'ignore' is none of error, skip"):
        open_text(["a"], on_bad_text="ignore")  # pyright: ignore[reportArgumentType]


def test_only_files_are_read_as_text(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(SteersmanError, match="no regular file"):
        open_text(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("texts", [[""], ["", "", ""]])
def test_text_without_any_token_is_refused(texts: list[str]) -> None:
    with pytest.raises(SteersmanError, match="no document has any text"):
        contexts(texts)


def test_read_texts_is_what_is_not_blank(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": " "}\n')
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    assert read_texts(tmp_path / "b.jsonl") == ["three"]
    assert read_texts(tmp_path) == ["one", "two", "three"]
    assert read_texts(str(tmp_path), limit=2) == ["one", "two"]
    assert read_texts(lambda number: f"text {number}", 2) == ["text 0", "text 1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"content": "one"}', "line 1 has no 'text'; it has \\['content'\\]"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n", "blank.txt holds no text"),
        ("bytes.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("t.md", b"one", "text is read from .txt, .jsonl, .parquet files, not .md"),
    ],
)
def test_read_texts_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SteersmanError, match=message):
        read_texts(tmp_path / name)
    with pytest.raises(SteersmanError, match="none.txt: no such file or folder"):
        read_texts(tmp_path / "none.txt")
