"""A store's folder: nothing of its owner's is touched, nothing is mixed in, and what was computed is kept."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stores import HOOK, digests, word_documents

from steersman.errors import SteersmanError
from steersman.folders import FolderLock
from steersman.lm import LanguageModel
from steersman.train import ActivationStore, cache_activations
from steersman.train.capture.capture import Capture
from steersman.train.capture.shared_store import SharedStore

DOCUMENTS = word_documents(60)
OPTIONS: dict[str, Any] = {"hook": HOOK, "context_length": 16, "batch_size": 4, "tokens": 900, "shard_rows": 300}
pytestmark = pytest.mark.usefixtures("no_progress")


def cached(lm: LanguageModel, out: Path, texts: Any = None, **options: Any) -> ActivationStore:
    return cache_activations(lm, DOCUMENTS if texts is None else texts, out=str(out), **{**OPTIONS, **options})


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has this process get a signal when the model has run so many times."""

    def after(passes: int, number: int = signal.SIGINT) -> None:
        run, calls = Capture.run, []

        def counted(self: Capture, batch: Any) -> Any:
            calls.append(None)
            if len(calls) == passes:
                os.kill(os.getpid(), number)
            return run(self, batch)

        monkeypatch.setattr(Capture, "run", counted)

    return after


def stop(lm: LanguageModel, out: Path, interrupted: Any, texts: Any = None, passes: int = 7, **options: Any) -> None:
    interrupted(passes)
    with pytest.raises(KeyboardInterrupt):
        cached(lm, out, texts, **options)


# The owner's files


def test_a_folder_with_a_part_called_parts_is_refused_untouched(lm: LanguageModel, tmp_path: Path) -> None:
    for name in ("parts/chapter1.tex", "rows/table.csv", f"{HOOK}/00000.safetensors", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(SteersmanError, match="is not an activation store"):
        cached(lm, tmp_path)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("n_ranks", ["1", "2"])
def test_the_owners_files_beside_an_unfinished_store_stay(
    lm: LanguageModel, tmp_path: Path, interrupted: Any, monkeypatch: pytest.MonkeyPatch, n_ranks: str
) -> None:
    whole = cached(lm, tmp_path / "whole")
    out = tmp_path / "acts"
    stop(lm, out, interrupted)
    theirs = ["notes.txt", "rows/table.csv", f"{HOOK}/.gitkeep", "parts/chapter1.tex", "parts/00007.json"]
    for name in theirs:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    monkeypatch.undo()
    if n_ranks == "2":  # needs the folder called parts
        monkeypatch.setenv("WORLD_SIZE", n_ranks)
        with pytest.raises(SteersmanError, match="files that Steersman did not write"):
            cached(lm, out)
        monkeypatch.undo()
    cached(lm, out)
    found = digests(out)
    assert {name: (out / name).read_text() for name in theirs} == dict.fromkeys(theirs, "mine")
    assert {name: found[name] for name in found if name not in theirs} == digests(whole.path)


def test_a_failed_first_try_removes_what_it_made_alone(lm: LanguageModel, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w5 w6"}\n{"text": 5}\n')
    out = tmp_path / "acts"
    with pytest.raises(SteersmanError, match="not text"):
        cached(lm, out, str(bad))
    assert not out.exists()
    out.mkdir()
    with pytest.raises(SteersmanError, match="not text"):
        cached(lm, out, str(bad))
    assert out.is_dir()
    from steersman.train.store.manifest import Manifest

    Manifest(model_name="", dtype="float32", hooks={"a": 2}, config={}).save(out)  # left by a kill
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SteersmanError, match="not text"):
        cached(lm, out, str(bad))
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


# The same text, the same model


def test_rows_of_two_texts_are_not_mixed(lm: LanguageModel, tmp_path: Path, interrupted: Any) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "moved" / "other name.txt"
    text.write_text("\n".join(DOCUMENTS))
    whole = cached(lm, tmp_path / "whole", str(text))
    stop(lm, tmp_path / "acts", interrupted, str(text))
    text.write_text("\n".join([" ".join(reversed(DOCUMENTS[0].split())), *DOCUMENTS[1:]]))
    assert text.stat().st_size == len("\n".join(DOCUMENTS))
    for out in ("acts", "whole"):  # an unfinished one and a finished one
        with pytest.raises(SteersmanError, match="the text changed: .*other documents"):
            cached(lm, tmp_path / out, str(text))
    text.write_text("\n".join(DOCUMENTS[:3]))
    with pytest.raises(SteersmanError, match="the text changed: .*has 3 documents"):
        cached(lm, tmp_path / "whole", str(text))
    other.parent.mkdir()
    other.write_text("\n".join([*DOCUMENTS, "w5 w6"]))  # elsewhere, renamed, and longer
    assert digests(cached(lm, tmp_path / "acts", str(other)).path) == digests(whole.path)
    assert cached(lm, tmp_path / "whole", DOCUMENTS).fingerprint == whole.fingerprint


def test_rows_of_two_models_are_not_mixed(lm: LanguageModel, tmp_path: Path, interrupted: Any) -> None:
    whole = cached(lm, tmp_path / "whole")
    stop(lm, tmp_path / "acts", interrupted)
    weight = lm.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[5, 3] += 1
        try:
            with pytest.raises(SteersmanError, match="the model changed"):
                cached(lm, tmp_path / "acts")
        finally:
            weight[5, 3] -= 1
    renamed = LanguageModel(lm.model, lm.tokenizer, name="another name")
    assert digests(cached(renamed, tmp_path / "acts").path) == digests(whole.path)


# What was computed is kept


@pytest.mark.parametrize("packing", [True, False])
def test_an_interrupted_run_keeps_every_row_and_resumes_to_the_same_bytes(
    lm: LanguageModel, tmp_path: Path, interrupted: Any, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    whole = cached(lm, tmp_path / "whole", packing=packing)
    rows = []
    for passes in (2, 3, 1, 4):
        interrupted(passes)
        with pytest.raises(KeyboardInterrupt, match=r"[\d,]+ rows are stored in .*resumes"):
            cached(lm, tmp_path / "acts", packing=packing)
        monkeypatch.undo()
        monkeypatch.setenv("STEERSMAN_PROGRESS", "0")
        partial = ActivationStore.open(tmp_path / "acts", allow_partial=True, verify=True)
        rows.append(partial.n_rows)
        n = torch.arange(partial.n_rows)
        assert torch.equal(partial.activations(n), whole.activations(n))
        assert partial.stats().n_rows == partial.n_rows
    assert rows == sorted(rows)
    assert rows[0] > 0
    assert rows[-1] % 300
    again = cached(lm, tmp_path / "acts", packing=packing)
    assert digests(again.path) == digests(whole.path)


def test_a_process_that_is_asked_to_end_keeps_its_rows_too(lm: LanguageModel, tmp_path: Path, interrupted: Any) -> None:
    interrupted(3, signal.SIGTERM)
    with pytest.raises(SteersmanError, match="rows are stored"):
        cached(lm, tmp_path / "acts")
    assert ActivationStore.open(tmp_path / "acts", allow_partial=True).n_rows > 0


# Growing


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_store_grows_to_the_bytes_of_one_cached_at_once(
    lm: LanguageModel, tmp_path: Path, interrupted: Any, monkeypatch: pytest.MonkeyPatch, n_ranks: int
) -> None:
    whole = cached(lm, tmp_path / "whole", tokens=1000)
    cached(lm, tmp_path / "acts", tokens=250)
    for wrong, message in (({}, "tokens was 250, now 1000"), ({"extend": True, "batch_size": 8}, "batch_size was")):
        with pytest.raises(SteersmanError, match=message):
            cached(lm, tmp_path / "acts", **{"tokens": 1000, **wrong})
    assert cached(lm, tmp_path / "acts", tokens=610, extend=True).n_rows == 610
    with pytest.raises(SteersmanError, match="holds 610 tokens already"):
        cached(lm, tmp_path / "acts", tokens=600, extend=True)
    if n_ranks == 1:
        stop(lm, tmp_path / "acts", interrupted, tokens=1000, extend=True, passes=3)
        monkeypatch.undo()
        cached(lm, tmp_path / "acts", tokens=1000)  # an extension that was begun is resumed by either command
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SteersmanError, match="shards are missing"):
            cached(lm, tmp_path / "acts", tokens=1000, extend=True, timeout_seconds=0.0)
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SteersmanError, match="start rank 0 again"):
            cached(lm, tmp_path / "acts", tokens=1000, extend=True, timeout_seconds=0.0)
        monkeypatch.setenv("RANK", "0")
        cached(lm, tmp_path / "acts", tokens=1000, extend=True, timeout_seconds=0.0)
    assert digests(tmp_path / "acts") == digests(whole.path)


def test_a_store_whose_text_has_ended_grows_with_the_text(
    lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = cached(lm, tmp_path / "whole", DOCUMENTS, tokens=None)
    part = cached(lm, tmp_path / "acts", DOCUMENTS[:20], tokens=None)
    assert cached(lm, tmp_path / "acts", DOCUMENTS[:20], tokens=None, extend=True).n_rows == part.n_rows
    found = digests(cached(lm, tmp_path / "acts", DOCUMENTS, tokens=None, extend=True).path)
    assert {n: d for n, d in found.items() if n != "manifest.json"} == {
        n: d for n, d in digests(whole.path).items() if n != "manifest.json"
    }  # which says of which text it was begun


# Several at one folder


def test_a_finished_store_is_asked_for_by_many_at_once(lm: LanguageModel, tmp_path: Path) -> None:
    rows = cached(lm, tmp_path / "acts").n_rows
    with FolderLock(tmp_path / "acts", "this", shared=True):  # as another that looks whether the store is its own
        assert cached(lm, tmp_path / "acts").n_rows == rows
    with FolderLock(tmp_path / "acts", "this"), pytest.raises(SteersmanError, match="another process is writing"):
        cached(lm, tmp_path / "acts")


def test_one_writes_a_folder_at_a_time(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "acts"
    out.mkdir()
    with FolderLock(out, "this"), pytest.raises(SteersmanError, match="another process is writing"):
        cached(lm, out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    (out / "parts").mkdir()
    (out / "parts" / "rank-00001").touch()
    with FolderLock(out / "parts" / "rank-00001", "this"), pytest.raises(SteersmanError, match="the part of rank 1"):
        cached(lm, out)


def test_after_a_failure_a_rank_leaves_no_gap(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cached(lm, tmp_path / "whole")
    begin, failures = SharedStore.begin_shard, []

    def failing(self: SharedStore, number: int, rows_before: int) -> Any:
        if number == 1 and not failures:
            failures.append(number)
            raise SteersmanError("no space left on the disk, once")
        return begin(self, number, rows_before)

    monkeypatch.setattr(SharedStore, "begin_shard", failing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # each ends with an error: some shards are not there
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SteersmanError, match="once|shards are missing"):
            cached(lm, tmp_path / "acts", timeout_seconds=0.0)
    assert failures
    cached(lm, tmp_path / "acts", timeout_seconds=0.0)
    assert digests(tmp_path / "acts") == digests(whole.path)


def test_a_rank_that_finds_the_store_complete_is_done(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = SharedStore.alive

    def slow(self: SharedStore) -> None:
        """While rank 1 is at work, rank 0 comes, writes all and ends."""
        if self.rank == 1:
            self.leave()
            monkeypatch.setattr(SharedStore, "alive", alive)
            monkeypatch.delenv("WORLD_SIZE")
            monkeypatch.setenv("RANK", "0")
            cached(lm, tmp_path / "acts")

    monkeypatch.setattr(SharedStore, "alive", slow)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cached(lm, tmp_path / "acts", timeout_seconds=5.0).n_rows == 900
    assert not (tmp_path / "acts" / "parts").exists()


# Damage


@pytest.mark.parametrize("name", ["statistics.safetensors", "manifest.json"])
def test_a_flipped_bit_is_noticed(lm: LanguageModel, tmp_path: Path, name: str) -> None:
    store = cached(lm, tmp_path / "acts")
    content = bytearray((store.path / name).read_bytes())
    place = content.index(b'"mean_norm": ') + 15 if name == "manifest.json" else len(content) - 5
    content[place] ^= 1
    (store.path / name).write_bytes(content)
    with pytest.raises(SteersmanError, match=rf"{name}.*checksum"):
        ActivationStore.open(store.path).stats()


def test_damaged_shards_are_not_built_upon(lm: LanguageModel, tmp_path: Path, interrupted: Any) -> None:
    stop(lm, tmp_path / "acts", interrupted)
    file = tmp_path / "acts" / HOOK / "00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(SteersmanError, match="00000.safetensors.*checksum"):
        cached(lm, tmp_path / "acts")
