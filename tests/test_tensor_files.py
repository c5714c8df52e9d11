"""Files with a checksum, bounded reading, and folders of which only what is ours is removed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steersman.errors import SteersmanError
from steersman.folders import FolderLock, remove_files, remove_folder
from steersman.reading import one_error, parse_json, read_json, read_json_object, read_text
from steersman.sealed import seal, unseal
from steersman.tensor_files import check_tensors, load_tensors, save_tensors

METADATA = {"format": 'x"y\n/é\u2028 \U0001f600\x1f', "z": "1", "a": "2"}
TENSORS = {"b": torch.arange(3.0), "a.é": torch.ones(2, 2).T, "empty": torch.zeros(0, 4), "scalar": torch.tensor(2)}


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    save_tensors(tmp_path / "one.safetensors", TENSORS, METADATA)
    for turn in range(8):
        save_tensors(tmp_path / f"{turn}.safetensors", dict(reversed(TENSORS.items())), METADATA)
        assert (tmp_path / f"{turn}.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    tensors, metadata = load_tensors(tmp_path / "one.safetensors")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())  # as those that were never in a file
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:  # the library's own reader
        assert torch.equal(file.get_tensor("b"), TENSORS["b"])


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, METADATA)
    content, path, refused = (tmp_path / "x.safetensors").read_bytes(), tmp_path / "flipped.safetensors", 0
    for bit in range(0, len(content) * 8, 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            tensors, metadata = load_tensors(path)
        except SteersmanError:
            refused += 1
        else:  # the name of the checksum itself was hit
            assert {name: metadata[name] for name in METADATA} == METADATA
            assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert refused > 0.95 * len(content) * 8 / 3


def test_a_file_without_checksum_opens(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2)}, tmp_path / "old.safetensors")
    check_tensors(tmp_path / "old.safetensors")
    assert torch.equal(load_tensors(tmp_path / "old.safetensors", ["b"])[0]["b"], torch.ones(2))
    with pytest.raises(SteersmanError, match="lacks the tensor c"):
        load_tensors(tmp_path / "old.safetensors", ["b", "c"])


def test_only_regular_bounded_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "nul").write_bytes(b"\0" * 40)
    for name in ("pipe", "loop", "device", "missing", "."):
        for read in (read_json, read_text, check_tensors):
            with pytest.raises(SteersmanError):
                read(tmp_path / name)
    with pytest.raises(SteersmanError, match="at most 10"):
        read_text(tmp_path / "nul", limit=10)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(SteersmanError, match="UTF-8"):
        read_text(tmp_path / "latin")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SteersmanError, match="object"):
        read_json_object(tmp_path / "list.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "", "\ufeff{}", "{", b"\xff\xfe{"])
def test_json_that_cannot_be_read_is_one_error(text: str | bytes) -> None:
    with pytest.raises(SteersmanError, match=r"here\.json"):
        parse_json(text, "here.json")


def test_every_changed_character_of_a_sealed_object_is_noticed() -> None:
    data = {"b": [1.5, None, "ä"], "a": {"x": 10**20}}
    text = json.dumps(seal(data))
    assert unseal(json.loads(text), "here.json") == data
    assert unseal(data, "here.json") == data  # of an earlier version
    for bit in range(len(text) * 8):
        damaged = bytearray(text.encode())
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = unseal(parse_json(bytes(damaged), "here.json"), "here.json")
        except SteersmanError:
            continue
        assert found == data or found.keys() != data.keys()  # the name of the checksum itself was hit


def test_one_process_writes_a_folder_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    hold = (
        "import sys; from steersman.folders import FolderLock; "
        "lock = FolderLock(sys.argv[1], 'it'); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "1\n"
    with pytest.raises(SteersmanError, match="another process is writing this store"):
        FolderLock(tmp_path, "this store")
    other.kill()
    other.wait()
    with FolderLock(tmp_path, "this store") as lock:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_removing_takes_named_files_only(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    (folder / "b").mkdir(parents=True)
    for name in ("a", "users", "b/a"):
        (folder / name).write_text(name)
    (folder / "link").symlink_to(folder / "users")
    remove_files(folder, ["a", "b", "link", "missing"])
    assert sorted(child.name for child in folder.iterdir()) == ["b", "users"]
    assert not remove_folder(folder, ["a"])
    assert (folder / "users").read_text() == "users"
    assert remove_folder(folder / "b", ["a"])
    assert not (folder / "b").exists()
    assert remove_folder(folder / "b", ["a"])


def test_every_type_is_what_the_library_reads(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.complex64]
    types += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint32, torch.uint64]
    types += [torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(kind): torch.randint(0, 2, (3, 5)).to(kind) for kind in types}
    save_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_process_killed_while_it_writes_leaves_one_file_that_the_next_takes_over(tmp_path: Path) -> None:
    write = (
        "import os, signal, sys, zlib, torch; from steersman.tensor_files import save_tensors\n"
        "crc, n = zlib.crc32, [0]\n"
        "def killed(*args):\n"
        "    n[0] += 1\n"
        "    if n[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return crc(*args)\n"
        "zlib.crc32 = killed; save_tensors(sys.argv[1], {'x': torch.zeros(1 << 20)})"
    )
    path = tmp_path / "x.safetensors"
    assert subprocess.run([sys.executable, "-c", write, path], check=False).returncode == -9
    assert [child.name for child in tmp_path.iterdir()] == [".x.safetensors.tmp"]
    save_tensors(path, TENSORS)
    assert [child.name for child in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_door_lets_one_kind_of_error_through() -> None:
    for error in (KeyError("x"), RecursionError("deep"), MemoryError(), AssertionError(), OverflowError("9")):
        with pytest.raises(SteersmanError, match=r"^cfg.json ") as raised, one_error("cfg.json"):
            raise error
        assert raised.value.__cause__ is error
    with pytest.raises(KeyboardInterrupt), one_error("cfg.json"):
        raise KeyboardInterrupt


def test_a_header_that_was_written_anew_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, METADATA)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length])).encode()  # with spaces
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(SteersmanError, match="header was changed"):
        check_tensors(path)


def test_a_message_is_as_long_as_can_be_read() -> None:
    assert len(str(SteersmanError("x" * 100_000 + " end"))) < 2100
    assert str(SteersmanError("x" * 100_000 + " end")).endswith(" end")


def test_another_first_entry_of_five_letters_is_no_damage(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"about": '{"k": "abcdef01"}'})
    assert load_tensors(tmp_path / "old.safetensors")[1] == {"about": '{"k": "abcdef01"}'}


def test_damage_at_the_checksum_and_elsewhere_is_told(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, METADATA)
    content = (tmp_path / "x.safetensors").read_bytes()
    for place in range(8, 8 + 25):  # the name of the checksum and what stands before it
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            damaged[-1] ^= 1
            (tmp_path / "y.safetensors").write_bytes(damaged)
            with pytest.raises(SteersmanError):
                load_tensors(tmp_path / "y.safetensors")
