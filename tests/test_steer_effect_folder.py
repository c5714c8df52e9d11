"""Folders of effects: whose they are, what identifies them, and damage of every kind, told in one line."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.effect_toys import TEXTS, measure_in_a_job, quick, toy
from support.ranks import run_ranks
from support.stores import digests
from support.tiny_models import D

from steersman.errors import PreemptedError, SteersmanError
from steersman.folders import FolderLock
from steersman.sealed import seal
from steersman.steer.effects import collect as module
from steersman.steer.effects.collect import collect_effects
from steersman.steer.effects.folder import Effects
from steersman.tensor_files import save_tensors, write_tensors

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of effects that was measured with `quick()`; copied before anything is done to it."""
    out = tmp_path_factory.mktemp("measured") / "e"
    lm, sae = toy()
    collect_effects(lm, sae, config=quick(out=str(out)))
    return out


@pytest.fixture
def folder(measured: Path, tmp_path: Path) -> Path:
    shutil.copytree(measured, tmp_path / "e")
    return tmp_path / "e"


def read_all(folder: Path) -> dict[str, Any]:
    effects = Effects.open(folder)
    shards = list(effects.iterate())
    return {"manifest": effects.manifest.to_dict(), "effect": torch.cat([shard.effect for shard in shards]).tolist()}


def again(folder: Path) -> None:
    lm, sae = toy()
    collect_effects(lm, sae, config=quick(out=str(folder)))


def rewrite_manifest(folder: Path, change: Change, *, sealed: bool = True) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    data.pop("crc32", None)
    (folder / "manifest.json").write_text(json.dumps(seal(data) if sealed else data))


# Damage


def test_every_flipped_bit_is_noticed_by_reading_and_by_resuming(folder: Path) -> None:
    whole, rng = read_all(folder), random.Random(0)
    for name in ("00000.safetensors", "00002.safetensors", "baseline.safetensors", "manifest.json"):
        content = (folder / name).read_bytes()
        for turn in range(12):
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(damaged)
            found: dict[str, Any] | str | None
            try:
                if turn == 0:
                    again(folder)
                found = read_all(folder)
            except SteersmanError as error:
                found = str(error)
            if not (isinstance(found, str) and name in found):
                assert name == "manifest.json"  # a space between its entries, or the name of its checksum
                assert found == whole
        (folder / name).write_bytes(content)
    assert read_all(folder) == whole


def test_damage_is_found_before_anything_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "00002.safetensors").unlink()
    shard = folder / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    monkeypatch.setattr(module, "_shard", lambda *_: pytest.fail("measured"))
    with pytest.raises(SteersmanError, match=r"00001.safetensors.*delete this file and run the same command"):
        again(folder)
    monkeypatch.undo()
    shard.unlink()
    again(folder)
    assert len(Effects.open(folder)) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["settings"].update(shard_vectors=0), "settings.shard_vectors"),
        (lambda data: data["settings"].update(shard_vectors="3"), "settings.shard_vectors"),
        (lambda data: data.update(settings=None), "settings"),
        (lambda data: data.update(n_vectors=10**30), "n_vectors"),
        (lambda data: data["sae"].update(d_sae=True), "sae.d_sae"),
        (lambda data: data.update(model_digest=None), "model_digest"),
        (lambda data: data.update(more=1), "more"),
        (lambda data: data.update(version=9), "version 9"),
        (lambda data: data.update(version=[]), "version"),
        (lambda data: data.pop("format"), "no manifest of effects"),
        (lambda data: data.update(n_vectors=10**9), "shards are not measured yet"),
        (lambda data: data["settings"].update(seed=5), "other settings than its manifest"),
        (lambda data: data["sae"].update(d_sae=7), "other settings than its manifest"),
    ],
)
def test_a_manifest_that_cannot_be(change: Change, said: str, folder: Path) -> None:
    rewrite_manifest(folder, change)
    with pytest.raises(SteersmanError, match=said):
        read_all(folder)


@pytest.mark.parametrize("content", [b"\xe9", b"[" * 100_000, b"[1]", b"{", b"9" * 5000, b'{"a": 1}'])
def test_a_manifest_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    for use in (read_all, again):
        with pytest.raises(SteersmanError, match=r"manifest\.json"):
            use(folder)


def test_a_changed_manifest_is_noticed_where_its_entries_could_be(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 5'))
    with pytest.raises(SteersmanError, match="was changed or is damaged"):
        Effects.open(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vectors", torch.ones(3)),
        ("vectors", torch.ones(3, D + 1)),
        ("effect", torch.ones(2, 40)),
        ("effect", torch.full((3, 40), float("nan"))),
        ("reached", torch.ones(3)),
        ("positions", torch.ones(3, 1, dtype=torch.long)),
    ],
)
def test_a_shard_of_other_shapes(name: str, value: torch.Tensor, folder: Path) -> None:
    path, fingerprint = folder / "00001.safetensors", Effects.open(folder).manifest.fingerprint
    save_tensors(path, {**load_file(path), name: value}, {"steersman.effects": fingerprint})
    with pytest.raises(SteersmanError, match=r"00001\.safetensors.*(asks for|not finite)"):
        read_all(folder)
    with pytest.raises(SteersmanError, match=r"00001\.safetensors.*(asks for|not finite)"):
        again(folder)


@pytest.mark.parametrize("name", ["manifest.json", "00001.safetensors", "baseline.safetensors"])
def test_only_regular_files_are_opened(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(SteersmanError, match="no regular file"):
        read_all(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(SteersmanError, match="is a folder"):
        read_all(folder)


# Whose a folder is


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "draft.tmp").write_text("mine")
    with pytest.raises(SteersmanError, match="holds no effects"):
        again(tmp_path / "theirs")
    assert [(file.name, file.read_text()) for file in (tmp_path / "theirs").iterdir()] == [("draft.tmp", "mine")]


def test_what_else_lies_in_the_folder_stays(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "00007.safetensors").write_text("mine too")
    (folder / "00002.safetensors").unlink()
    again(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "00007.safetensors").read_text() == "mine too"
    assert len(Effects.open(folder).column("scale")) == 7


def test_a_second_job_at_the_folder_is_refused(folder: Path) -> None:
    (folder / "00002.safetensors").unlink()
    with FolderLock(folder, "these effects"):
        with pytest.raises(SteersmanError, match="another process is writing these effects"):
            again(folder)
        found = run_ranks(2, measure_in_a_job, str(folder))
        assert [how for how, _, _ in found] == ["SteersmanError"] * 2
        assert all("another process is writing" in message for _, _, message in found)
    again(folder)


# What it is of


def test_another_model_of_the_same_name_is_told(folder: Path) -> None:
    (folder / "00002.safetensors").unlink()
    lm, sae = toy()
    with torch.no_grad():
        lm.model.lm_head.weight[3, 4] += 0.5
    with pytest.raises(SteersmanError, match=r"model_digest was .*other weights"):
        collect_effects(lm, sae, config=quick(out=str(folder)))


def test_vectors_are_identified_by_what_they_are_made_from(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another CPU may round norms otherwise: the same work, not another."""
    (folder / "00002.safetensors").unlink()
    make = module.make_vectors
    monkeypatch.setattr(module, "make_vectors", lambda *args: make(*args) * (1 + 2**-22))
    again(folder)
    monkeypatch.setattr(module, "make_vectors", lambda *args: make(*args) * -1)
    (folder / "00002.safetensors").unlink()
    with pytest.raises(SteersmanError, match="shard 0 was measured on other vectors"):
        again(folder)
    monkeypatch.undo()
    lm, sae = toy()
    given = torch.randn(7, D)
    collect_effects(lm, sae, vectors=given, config=quick(out=str(tmp_path / "given")))
    with pytest.raises(SteersmanError, match="vectors_hash"):
        collect_effects(lm, sae, vectors=given * 1.5, config=quick(out=str(tmp_path / "given")))


def test_texts_are_identified_by_their_content(tmp_path: Path) -> None:
    lm, sae = toy()
    config = quick(out=str(tmp_path / "e"), scale_rule="kl", scale_target=0.05, n_vectors=2)
    collect_effects(lm, sae, TEXTS, config)
    with pytest.raises(SteersmanError, match="texts_hash"):
        collect_effects(lm, sae, [TEXTS[0].replace("w5", "w6"), *TEXTS[1:]], config)


# Being asked to end


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, PreemptedError)])
def test_what_is_kept_is_said(
    number: int, kind: type[BaseException], measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, sae = toy()
    shard, done = module._shard, []

    def signalled(*args: Any) -> Any:
        if done:
            os.kill(os.getpid(), number)
        done.append(1)
        return shard(*args)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "_shard", signalled)
    with pytest.raises(kind, match="1 of 3 shards are finished and kept in .*e; the same command resumes"):
        collect_effects(lm, sae, config=quick(out=str(tmp_path / "e")))
    done.clear()
    with pytest.raises(kind, match="nothing is kept, as no folder was named"):
        collect_effects(lm, sae, config=quick())
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    collect_effects(lm, sae, config=quick(out=str(tmp_path / "e")))
    assert digests(tmp_path / "e") == digests(measured)


def test_a_mistake_of_any_rank_is_told_by_all(tmp_path: Path) -> None:
    found = run_ranks(2, measure_in_a_job, str(tmp_path / "e"), "mistake", 1)
    assert [how for how, _, _ in found] == ["SteersmanError"] * 2
    assert all("the second rank's own" in message for _, _, message in found)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sae = toy()
    written = []

    def full(path: Path, *args: Any) -> None:
        written.append(path)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        write_tensors(path, *args)

    monkeypatch.setattr("steersman.tensor_files.write_tensors", full)
    with pytest.raises(SteersmanError, match="No space left on device; 1 of 3 shards are finished and kept"):
        collect_effects(lm, sae, config=quick(out=str(tmp_path / "e")))
    monkeypatch.undo()
    collect_effects(lm, sae, config=quick(out=str(tmp_path / "e")))
