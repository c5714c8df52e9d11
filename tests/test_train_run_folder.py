"""The folder of a run: what is damaged is named, what is the user's stays, one process writes it, and it can go on to
more tokens."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stopping import stopped_before
from support.training import HOOK, logged, mixture, weight_bytes
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.folders import FolderLock
from steersman.sae import SAE
from steersman.train import ActivationStore, SweepRun, TrainConfig, Trainer, train_many, train_sae
from steersman.train.run.checkpoints import checkpoint_to_sae
from steersman.train.run.run_folder import RunFolder

CONFIG = TrainConfig(
    d_sae=40, k=3, batch_size=64, tokens=64 * 20, seed=3, device="cpu", checkpoint_every=5, log_every=3,
    statistics_tokens=640, lr=0.01, dead_after=640,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("data") / "acts"
    return ActivationStore.from_tensors(mixture(6000).split(1000), out, HOOK, dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def no_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steersman.train.run.run.plot_run", lambda *_: None)  # the slowest part by far
        yield


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train_sae(store, CONFIG, out)
    return out


@pytest.fixture(scope="module")
def cut(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped before step 12, with checkpoints at 5 and 10."""
    out = tmp_path_factory.mktemp("cut") / "run"
    with stopped_before(12):
        train_sae(store, CONFIG, out)
    return out


NEWEST = "checkpoints/step_00000010"


def edited(name: str, edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        path = run / name
        value = json.loads(path.read_text())
        value.pop("crc32", None)  # as an earlier version wrote it
        edit(value)
        path.write_text(json.dumps(value))

    return change


def without_tensor(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        file = run / NEWEST / "state.safetensors"
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file)
        edited(f"{NEWEST}/state.json", lambda state: state["files"][0].update(bytes=file.stat().st_size))(run)

    return change


def of_other_shape(run: Path) -> None:
    file = run / NEWEST / "state.safetensors"
    save_file({**load_file(file), "sae.b_dec": torch.zeros(3)}, file)
    edited(f"{NEWEST}/state.json", lambda state: state["files"][0].update(bytes=file.stat().st_size))(run)


def bytes_of(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


PART, STATE = f"{NEWEST}/state.safetensors", f"{NEWEST}/state.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bytes_of("config.json", b'{"training"'), "config.json: not readable as JSON"),
        (bytes_of("config.json", b"[" * 100_000), "config.json: .*nested too deeply"),
        (edited("config.json", lambda record: record.pop("recipe")), "not the record of a run: it has no recipe"),
        (bytes_of("metrics.jsonl", b'{"step": 3, "x": "\xff"}\n{}\n'), "metrics.jsonl, line 1: .*delete this line"),
        (bytes_of("metrics.jsonl", b'[3]\n{"step": 3}\n'), "metrics.jsonl, line 1: no line of a log"),
        (lambda run: (run / PART).unlink(), "no such file; delete .*0010 to resume from step 5"),
        (lambda run: os.truncate(run / PART, 9000), "is damaged.*; delete .*0010 to resume from step 5"),
        (bytes_of(STATE, b"{"), "state.json: not readable as JSON.*delete .*0010 to resume from step 5"),
        (bytes_of(STATE, b"[]"), "a JSON object is expected.*to resume from step 5"),
        (edited(STATE, lambda state: state.pop("axes")), "not the state of a checkpoint.*to resume from step 5"),
        (edited(STATE, lambda state: state.update(step="10")), "not the state of a checkpoint"),
        (edited(STATE, lambda state: state["files"][0].update(name="../../x.safetensors")), "not the state of a"),
        (edited(STATE, lambda state: state["files"][0].update(latents=[1])), "not the state of a checkpoint"),
        (without_tensor("sae.b_enc"), "step_00000010 cannot be read: it lacks 'sae.b_enc'; delete"),
        (without_tensor("rng"), "step_00000010 cannot be read: it lacks 'rng'; delete"),
        (of_other_shape, "step_00000010 cannot be read: .*delete"),
    ],
)  # fmt: skip
def test_damage_is_one_line(
    damage: Callable[[Path], object], message: str, store: ActivationStore, cut: Path, tmp_path: Path
) -> None:
    shutil.copytree(cut, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(SteersmanError, match=message):
        train_sae(store, CONFIG, tmp_path / "run")


def flipped(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_flipped_bit_of_a_checkpoint_is_noticed_and_the_one_before_it_resumes(
    name: str, store: ActivationStore, cut: Path, whole: Path, tmp_path: Path
) -> None:
    for place in (0.002, 0.3, 0.6, 0.9):
        run = tmp_path / f"{place}"
        shutil.copytree(cut, run)
        flipped(run / NEWEST / name, place)
        with pytest.raises(SteersmanError, match=r"step_00000010.*; delete .*step_00000010 to resume from step 5"):
            train_sae(store, CONFIG, run)
        with pytest.raises(SteersmanError, match="step_00000010"):
            checkpoint_to_sae(run)
    shutil.rmtree(run / NEWEST)
    train_sae(store, CONFIG, run)
    assert weight_bytes(run) == weight_bytes(whole)


def test_a_flipped_bit_of_the_record_is_noticed(store: ActivationStore, cut: Path, tmp_path: Path) -> None:
    shutil.copytree(cut, tmp_path / "run")
    flipped(tmp_path / "run" / "config.json", 0.5)
    with pytest.raises(SteersmanError, match=r"config\.json"):
        train_sae(store, CONFIG, tmp_path / "run")


def test_what_is_the_users_stays(store: ActivationStore, cut: Path, whole: Path, tmp_path: Path) -> None:
    """Copies and notes among the checkpoints, in one that is to be removed, and in what a killed run left."""
    run = tmp_path / "run"
    shutil.copytree(cut, run)
    shutil.copytree(run / NEWEST, run / f"{NEWEST}.bak")
    kept = ["step_00000005/notes.txt", "step_00000010/figures/a.png", ".writing-mine/a", ".writing-00000011/notes.txt"]
    kept += [".writing-00000012-of-00002/folder/b"]
    for name in kept:
        path = run / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    left = [".writing-00000011/state.safetensors", ".writing-00000011/.state.json.tmp"]
    left += [".writing-00000012-of-00002/state-00001-of-00002.safetensors", ".writing-00000013-of-00001/state.json"]
    for name in left:
        path = run / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    train_sae(store, CONFIG, run)
    assert weight_bytes(run) == weight_bytes(whole)
    for name in kept:
        assert (run / "checkpoints" / name).read_text() == name
    assert {file.name for file in (run / f"{NEWEST}.bak").iterdir()} == {"state.json", "state.safetensors"}
    assert not any((run / "checkpoints" / name).exists() for name in left)
    assert [file.name for file in (run / "checkpoints" / "step_00000005").iterdir()] == ["notes.txt"]


def test_a_checkpoint_takes_the_place_of_the_users_folder(store: ActivationStore, cut: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut, run)
    (run / "checkpoints" / "step_00000015").mkdir()
    (run / "checkpoints" / "step_00000015" / "notes.txt").write_text("mine")
    train_sae(store, CONFIG, run)
    there = {file.name for file in (run / "checkpoints" / "step_00000015").iterdir()}
    assert there == {"notes.txt", "state.json", "state.safetensors"}


HOLD = (
    "import sys; from steersman.folders import FolderLock; "
    "lock = FolderLock(sys.argv[1], 'it'); print(1, flush=True); input()"
)


def test_one_process_trains_in_a_folder_and_a_killed_one_leaves_no_lock(
    store: ActivationStore, cut: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = tmp_path / "runs" / "one", Trainer.step
    shutil.copytree(cut, run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "1\n"
    with pytest.raises(SteersmanError, match="another process is writing this run"):
        train_sae(store, CONFIG, run)
    with pytest.raises(SteersmanError, match="run one: .*another process is writing this run"):
        train_many(store, {"one": SweepRun(config=CONFIG)}, tmp_path / "runs")
    other.kill()
    other.wait()
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before

    def held_step(self: Trainer, x: Tensor) -> None:
        with pytest.raises(SteersmanError, match="another process"):
            FolderLock(run, "this run")
        step(self, x)

    monkeypatch.setattr(Trainer, "step", held_step)
    train_sae(store, CONFIG, run)
    assert weight_bytes(run) == weight_bytes(whole)
    assert logged(run) == logged(whole)
    with FolderLock(run, "this run"):  # which training has given up
        train_sae(store, CONFIG, run)  # finished: loaded, by any number of processes


def full_disk(name: str) -> Callable[..., object]:
    """`os.fsync` of a disk that is full from the first file called `name` on."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    return fsync


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json could not be written: No space left"),
        ("state.safetensors", "checkpoint 5 could not be written: .*No space left on device; earlier ones are intact"),
        ("state.json", "checkpoint 5 could not be written: .*No space left on device; earlier ones are intact"),
        ("sae_weights", "sae_weights.safetensors could not be written: No space left.*the checkpoints are intact"),
        ("feature_stats", "feature_stats.* could not be written: No space left.*the checkpoints are intact"),
    ],
)
def test_a_full_disk_is_one_line_and_what_is_saved_resumes(
    name: str, message: str, store: ActivationStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk(name))
        with pytest.raises(SteersmanError, match=message):
            train_sae(store, CONFIG, tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]
    train_sae(store, CONFIG, tmp_path / "run")
    assert weight_bytes(tmp_path / "run") == weight_bytes(whole)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = RunFolder(tmp_path)
    with pytest.raises(SteersmanError, match="metrics.jsonl is no regular file"):
        file.open_metrics(0)
    (tmp_path / "metrics.jsonl").unlink()
    lines = file.open_metrics(0)
    descriptor = os.open("/dev/full", os.O_WRONLY)
    os.dup2(descriptor, lines._file.fileno())
    os.close(descriptor)
    with pytest.raises(SteersmanError, match="metrics.jsonl could not be written: No space left on device"):
        lines.append({"step": 1})
    lines.close()


def test_a_disk_too_small_for_a_checkpoint_is_said_before_the_first_step(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    monkeypatch.setattr("steersman.train.Trainer.step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(SteersmanError, match=r"a checkpoint and the finished SAE need .* kB and 5 kB are free"):
        train_sae(store, CONFIG, tmp_path / "run")


# Going on to more tokens

LONGER = replace(CONFIG, tokens=64 * 40)


@pytest.fixture(scope="module")
def longer(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the greater length from the start."""
    out = tmp_path_factory.mktemp("longer") / "run"
    train_sae(store, replace(LONGER, warmup=0.0), out)
    return out


@pytest.fixture(scope="module")
def finished(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train_sae(store, replace(CONFIG, warmup=0.0), out)
    return out


@pytest.fixture
def extended(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_an_extended_run_is_the_longer_run_bit_for_bit(store: ActivationStore, extended: Path, longer: Path) -> None:
    config = replace(LONGER, warmup=0.0)
    shorter = weight_bytes(extended)
    with pytest.raises(SteersmanError, match=r"a run of 1,280 tokens, and 2,560 are asked for: .*--extend"):
        train_sae(store, config, extended)
    assert weight_bytes(extended) == shorter
    sae = train_sae(store, config, extended, extend=True)
    assert weight_bytes(extended) == weight_bytes(longer)
    assert logged(extended) == logged(longer)
    assert sae.cfg.metadata["extended"] == [{"from_step": 15, "n_steps": 20}]
    record = json.loads((extended / "config.json").read_text())
    assert record["extended"] == [{"from_step": 15, "n_steps": 20}]
    assert (record["recipe"]["n_steps"], record["recipe"]["decay_steps"]) == (40, 10)
    before = (extended / "sae_weights.safetensors").stat().st_mtime_ns
    for extend in (False, True):  # finished
        train_sae(store, config, extended, extend=extend)
    assert (extended / "sae_weights.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SteersmanError, match="a run of 2,560 tokens, more than the 1,280 that are asked for"):
        train_sae(store, replace(config, tokens=1280), extended, extend=True)
    with pytest.raises(SteersmanError, match="another configuration .*training.k was 3, now 4"):
        train_sae(store, replace(config, tokens=6400, k=4), extended, extend=True)


@pytest.mark.parametrize("stop_at", [15, 18, 33])
def test_an_interrupted_extension_goes_on_without_the_flag(
    stop_at: int, store: ActivationStore, extended: Path, longer: Path
) -> None:
    config, shorter = replace(LONGER, warmup=0.0), weight_bytes(extended)
    with stopped_before(stop_at):
        train_sae(store, config, extended, extend=True)
    assert weight_bytes(extended) == shorter, "until the longer run ends, the shorter one's SAE is there"
    assert SAE.load(extended).cfg.d_sae == 40
    train_sae(store, config, extended)
    assert weight_bytes(extended) == weight_bytes(longer)


def test_a_run_goes_on_more_than_once(store: ActivationStore, extended: Path, longer: Path) -> None:
    with stopped_before(27):
        train_sae(store, replace(CONFIG, warmup=0.0, tokens=64 * 30), extended, extend=True)
    train_sae(store, replace(LONGER, warmup=0.0), extended, extend=True)
    assert weight_bytes(extended) == weight_bytes(longer)
    assert len(json.loads((extended / "config.json").read_text())["extended"]) == 2


def test_a_run_whose_settings_follow_from_its_length_keeps_them_when_it_goes_on(
    store: ActivationStore, tmp_path: Path
) -> None:
    config = TrainConfig(d_sae=40, k=3, device="cpu", tokens=64 * 20, statistics_tokens=640, decay=0.0)
    train_sae(store, config, tmp_path / "run")
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    train_sae(store, config, tmp_path / "run", tokens=3 * 64 * 20, extend=True)
    now = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert now == {**recipe, "n_steps": now["n_steps"]}
    assert now["n_steps"] == 3 * 64 * 20 // recipe["batch_size"]


def test_a_finished_run_without_checkpoints_does_not_go_on(store: ActivationStore, extended: Path) -> None:
    shutil.rmtree(extended / "checkpoints")
    with pytest.raises(SteersmanError, match="holds no checkpoint to go on from"):
        train_sae(store, replace(LONGER, warmup=0.0), extended, extend=True)
    train_sae(store, replace(CONFIG, warmup=0.0), extended)  # still the finished run that it was


def test_another_store_under_a_run_is_refused_and_named(store: ActivationStore, cut: Path, tmp_path: Path) -> None:
    shutil.copytree(cut, tmp_path / "run")
    other = ActivationStore.from_tensors(mixture(6000, seed=9).split(1000), tmp_path / "b", HOOK, dtype="float32")
    with pytest.raises(SteersmanError, match="trained on other data: another fingerprint"):
        train_sae(other, CONFIG, tmp_path / "run")
    with pytest.raises(SteersmanError, match="trained on other data: another fingerprint"):
        train_sae(other, LONGER, tmp_path / "run", extend=True)
