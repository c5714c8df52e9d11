"""Caching on several ranks leaves the bytes of one process, also when ranks are killed and started again."""

import functools
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.power_cut import PowerCut, power_cut_after
from support.ranks import answers, run_ranks, start_ranks
from support.stores import HOOK, digests, word_documents

from steersman.errors import LostRankError, SteersmanError
from steersman.train import ActivationStore, cache_activations
from steersman.train.capture import shared_store
from steersman.train.capture.parallel_cache import SharedStore

DOCUMENTS = word_documents(90, seed=3)
OPTIONS: dict[str, Any] = {"hook": (HOOK, "blocks.0.hook_mlp_out"), "context_length": 16, "batch_size": 4}
OPTIONS |= {"shard_rows": 300, "timeout_seconds": 30.0}
pytestmark = pytest.mark.usefixtures("no_progress")


@functools.cache
def model() -> Any:
    """The tiny model, once a process: reading it changes nothing in it."""
    from support.tiny_models import with_text

    return with_text("llama")


def cache(out: str, options: dict[str, Any], killed_rank: int = -1, after_shards: int = 0) -> str:
    """What each rank does; `killed_rank` kills itself when it starts a shard after so many finished ones."""
    begin, begun = SharedStore.begin_shard, []

    def fatal(self: SharedStore, number: int, rows_before: int) -> Any:
        if self.rank == killed_rank and len(begun) == after_shards:
            writer = begin(self, number, rows_before)
            os.kill(os.getpid(), signal.SIGKILL)
            return writer
        begun.append(number)
        return begin(self, number, rows_before)

    SharedStore.begin_shard = fatal
    return cache_activations(model(), DOCUMENTS, out=out, **options).fingerprint


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "acts"
    cache(str(out), {**OPTIONS, "tokens": 1901})
    return out


@pytest.mark.parametrize("question", ["_is_ours", "only_begun", "_only_begun"])
def test_another_rank_may_begin_while_one_looks(question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just after one of the questions whose folder it is has been answered."""
    stores: list[SharedStore] = []
    place: Any = SharedStore if question == "_only_begun" else shared_store
    begin, answer = SharedStore._open, getattr(place, question)

    def opened(self: SharedStore) -> None:
        stores.append(self)
        begin(self)

    def asked(*args: Any) -> bool:
        found = answer(*args)
        record = tmp_path / "acts" / "parts" / "manifest.json"
        record.write_bytes(replace(stores[0]._described, shards=()).sealed())
        (tmp_path / "acts" / "rows").mkdir(exist_ok=True)
        (tmp_path / "acts" / "rows" / "00000.safetensors").touch()
        return found

    def reached(*_: Any) -> None:
        raise LostRankError("the store is open")

    monkeypatch.setattr(SharedStore, "_open", opened)
    monkeypatch.setattr(place, question, asked)
    monkeypatch.setattr(SharedStore, "begin_shard", reached)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "acts" / "parts").mkdir(parents=True)
    (tmp_path / "acts" / "parts" / "rank-00000").touch()
    with pytest.raises(LostRankError, match="the store is open"):
        cache_activations(model(), DOCUMENTS, out=str(tmp_path / "acts"), **OPTIONS, tokens=1901)


@pytest.mark.parametrize("n", [2, 4])
def test_any_number_of_ranks_writes_the_same_bytes(n: int, alone: Path, tmp_path: Path) -> None:
    fingerprints = run_ranks(n, cache, str(tmp_path / "acts"), {**OPTIONS, "tokens": 1901})
    assert digests(tmp_path / "acts") == digests(alone)
    assert set(fingerprints) == {ActivationStore.open(alone).fingerprint}


@pytest.mark.parametrize("packing", [True, False])
def test_a_text_that_ends_is_cached_whole(packing: bool, tmp_path: Path) -> None:
    options = {**OPTIONS, "tokens": None, "packing": packing, "shard_rows": 450}
    cache(str(tmp_path / "alone"), options)
    run_ranks(3, cache, str(tmp_path / "acts"), options)
    assert digests(tmp_path / "acts") == digests(tmp_path / "alone")


def test_a_killed_rank_is_started_again_alone(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "acts"
    options = {**OPTIONS, "tokens": 1901, "timeout_seconds": 2.0}
    started = time.monotonic()
    found = answers(start_ranks(2, cache, str(out), options, 1, 1))
    assert found[1] == (False, "killed")
    ok, message = found[0]
    assert not ok  # rank 0 ends in bounded time, and says who is missing
    assert "2 of 7 shards are missing" in message  # rank 1 writes 4, 5 and 6
    assert "start rank 1 again" in message
    assert time.monotonic() - started < 30
    with pytest.raises(SteersmanError, match="no activation store here"):
        ActivationStore.open(out)
    kept = {
        name: value for name, value in digests(out).items() if name.endswith(".safetensors") and "parts" not in name
    }
    assert len(kept) == 3 * 5
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SteersmanError, match="start rank 0 again"):  # all shards are there; rank 0 is not
        cache(str(out), {**options, "timeout_seconds": 0.5})
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    cache(str(out), options)  # one process resumes it as well
    assert digests(out) == digests(alone)
    assert before == {name: (out / name).stat().st_mtime_ns for name in kept}, "finished shards were written again"


def test_ranks_resume_what_one_process_left(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steersman.train.store.writer import StoreWriter

    end, ended = StoreWriter._end_shard, []

    def failing(self: StoreWriter) -> None:
        if len(ended) == 2:
            raise RuntimeError("power cut")
        ended.append(end(self))

    monkeypatch.setattr(StoreWriter, "_end_shard", failing)
    options = {**OPTIONS, "tokens": 1901}
    with pytest.raises(RuntimeError, match="power cut"):
        cache(str(tmp_path / "acts"), options)
    monkeypatch.undo()
    run_ranks(2, cache, str(tmp_path / "acts"), options)
    assert digests(tmp_path / "acts") == digests(alone)


def test_a_power_cut_at_any_moment_is_resumed_from(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of two loses its power before a change to the disk, every fifth one; the second works on."""
    options = {**OPTIONS, "tokens": 1901, "timeout_seconds": 0.0}
    monkeypatch.setenv("WORLD_SIZE", "2")

    def rank(number: int) -> bool:
        """Whether the rank sees the whole store in the end."""
        monkeypatch.setenv("RANK", str(number))
        try:
            cache(str(out), options)
        except LostRankError:
            return False
        return True

    n, ended = 2, False
    while not ended:
        out = tmp_path / f"acts{n}"
        with suppress(PowerCut), power_cut_after(n) as changes:
            rank(0)
        rank(1)
        assert rank(0), f"cut after {changes[-1:]}, change {n}"
        assert digests(out) == digests(alone), f"cut after {changes[-1:]}, change {n}"
        ended = len(changes) < n
        n += 5
    assert n > 40


def test_what_several_ranks_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SteersmanError, match="'skip' needs one process"):
        cache(str(tmp_path / "acts"), {**OPTIONS, "on_nonfinite": "skip"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(SteersmanError, match="is not an activation store"):
        cache(str(tmp_path / "other"), OPTIONS)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SteersmanError, match="RANK 2 is not below WORLD_SIZE 2"):
        cache(str(tmp_path / "acts"), OPTIONS)
