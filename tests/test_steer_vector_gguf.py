"""GGUF control vectors: written, read back, read by the rules of llama.cpp, and refused where they do not fit."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import D, with_text

from steersman import Steerer, SteeringVector
from steersman.cli import run
from steersman.errors import SteersmanError

gguf: Any = pytest.importorskip("gguf")
G = torch.Generator().manual_seed(0)
V = SteeringVector(
    directions={f"blocks.{i}.hook_resid_post": torch.randn(D, generator=G) for i in (1, 2)},
    model_name="tiny",
    method="pca",
    metadata={"model_type": "llama", "n": 3},
)


def foreign(
    path: Path,
    architecture: str = "controlvector",
    name: str = "direction.1",
    hint: str | None = "llama",
    array: Any = None,
    **fields: str,
) -> Path:
    """A file as another program writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", 1)
    for key, value in fields.items():
        writer.add_string(f"controlvector.{key}", value)
    writer.add_tensor(name, V.at("blocks.1.hook_resid_post").vector.numpy() if array is None else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "v.gguf"
    V.save(path)
    back = SteeringVector.load(path)
    assert back.provenance() == V.provenance()
    assert all(back.directions[hook].equal(direction) for hook, direction in V.directions.items())
    assert [p.name for p in path.parent.iterdir()] == ["v.gguf"]
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    V.save(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    assert [(t.name, t.data.dtype.name, list(t.shape)) for t in reader.tensors] == [
        ("direction.1", "float32", [D]), ("direction.2", "float32", [D]),
    ]  # fmt: skip


def test_a_file_of_another_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    v = SteeringVector.load(foreign(tmp_path / "v.gguf"))
    assert v.hook_names == ["blocks.1.hook_resid_post"]
    assert (v.model_name, v.method, v.metadata["model_type"]) == ("", "gguf", "llama")
    Steerer(with_text("llama")).vector(v)
    Steerer(with_text("mistral")).vector(v)  # llama.cpp has one name for both
    assert not [said for said in caplog.messages if "model of type" in said]
    Steerer(with_text("gpt2")).vector(v)
    assert "this vector says that it is for a model of type 'llama', 'gpt2' is 'gpt2'" in caplog.messages
    Steerer(with_text("gpt2")).vector(SteeringVector.load(foreign(tmp_path / "v.gguf", hint=None)))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    with pytest.raises(SteersmanError, match="holds a model of architecture 'llama', not a control vector"):
        SteeringVector.load(foreign(path, architecture="llama"))
    with pytest.raises(SteersmanError, match=r"tensors are direction\.1.*found 'token_embd.weight'"):
        SteeringVector.load(foreign(path, name="token_embd.weight"))
    whole = foreign(path).read_bytes()
    for cut in (2, 20, 60, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(SteersmanError, match="v.gguf is damaged or not a GGUF file"):
            SteeringVector.load(path)
    path.write_bytes(b"")
    with pytest.raises(SteersmanError, match="damaged or not a GGUF file"):
        SteeringVector.load(path)
    path.write_text("hello, this is not a vector at all")
    with pytest.raises(SteersmanError, match="damaged or not a GGUF file"):
        SteeringVector.load(path)
    with pytest.raises(SteersmanError, match="no such file"):
        SteeringVector.load(tmp_path / "none.gguf")


def test_what_a_file_means_beyond_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    with pytest.raises(SteersmanError, match=r"direction.1 has shape \[2, 16\]; a direction has one dimension"):
        SteeringVector.load(foreign(path, array=np.ones((2, 16), np.float32)))
    with pytest.raises(SteersmanError, match="operation is 'project', and here control vectors are added"):
        SteeringVector.load(foreign(path, operation="project"))
    assert SteeringVector.load(foreign(path, operation="add", trained_on="x")).metadata["trained_on"] == "x"
    half = SteeringVector.load(foreign(path, array=np.arange(4, dtype=np.float16)))
    assert half.vector.tolist() == [0, 1, 2, 3]


def test_hook_points_that_are_the_output_of_a_block_by_another_name(tmp_path: Path) -> None:
    ones = torch.ones(D)
    places = {"model.layers.1": ones, "blocks.3.hook_resid_pre": 2 * ones, "blocks.2.hook_resid_post": 3 * ones}
    SteeringVector(directions=places).save(tmp_path / "v.gguf")
    back = SteeringVector.load(tmp_path / "v.gguf").directions
    assert {hook: direction[0] for hook, direction in back.items()} == {
        "blocks.1.hook_resid_post": 1,
        "blocks.2.hook_resid_post": 5,
    }
    with pytest.raises(SteersmanError, match="from 1 on"):
        SteeringVector.of(ones, hook_name="blocks.1.hook_resid_pre").save(tmp_path / "w.gguf")


def test_some_layers_of_a_vector(tmp_path: Path) -> None:
    v = SteeringVector(directions={f"blocks.{i}.hook_resid_post": torch.ones(2) for i in range(1, 30)})
    kept = [f"blocks.{i}.hook_resid_post" for i in range(13, 23)]
    assert v.layers(13, 23).hook_names == kept
    v.save(tmp_path / "all.gguf")
    run(
        [
            "vector",
            "convert",
            "--vector",
            str(tmp_path / "all.gguf"),
            "--out",
            str(tmp_path / "some.gguf"),
            "--layers",
            "13:22",
        ]
    )
    assert SteeringVector.load(tmp_path / "some.gguf").hook_names == kept
    with pytest.raises(SteersmanError, match="nothing in blocks 40 to 49; it has blocks 1, 2"):
        v.layers(40, 50)


def s(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


HEAD = s("general.architecture") + struct.pack("<I", 8) + s("controlvector")
TENSOR = s("direction.1") + struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("counts", "rest"),
    [
        ((0, 2), HEAD + s("x") + struct.pack("<IIQ", 9, 0, 1 << 40)),
        ((0, 2), HEAD + s("x") + struct.pack("<IIQ", 9, 8, 1 << 40)),
        ((0, 2), HEAD + s("x") + struct.pack("<IIQIQ", 9, 9, 2, 9, 1 << 60)),
        ((0, 2), HEAD + s("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 100) * 200),
        ((0, 1 << 40), HEAD),
        ((1 << 40, 1), HEAD),
        ((0, 1), struct.pack("<Q", 1 << 63)),
        ((0, 2), HEAD + HEAD),
        ((0, 1), s("x") + struct.pack("<I", 77)),
        ((1, 1), HEAD + TENSOR + struct.pack("<QIQ", 1 << 60, 0, 0)),
        ((1, 1), HEAD + TENSOR + struct.pack("<QIQ", 4, 0, 1 << 62)),
        ((1, 1), HEAD + TENSOR + struct.pack("<QIQ", 4, 99, 0)),
        ((1, 1), HEAD + s("direction.1") + struct.pack("<I", 1 << 31)),
        ((2, 1), HEAD + (TENSOR + struct.pack("<QIQ", 4, 0, 0)) * 2),
    ],
)
def test_counts_and_lengths_that_the_file_does_not_have(counts: tuple[int, int], rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest + bytes(4096))
    with pytest.raises(SteersmanError, match="v.gguf"):
        SteeringVector.load(path)


def test_no_flipped_bit_of_a_vector_is_taken_for_what_was_saved(tmp_path: Path) -> None:
    for name in ("v.gguf", "v.safetensors"):
        path = tmp_path / name
        V.save(path)
        content, refused = path.read_bytes(), 0
        tries = range(0, 8 * len(content), 7)
        for bit in tries:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                back = SteeringVector.load(path)
            except SteersmanError:
                refused += 1
            else:  # the name of the checksum itself, or padding
                assert back.provenance() == V.provenance()
                assert all(torch.equal(back.directions[hook], direction) for hook, direction in V.directions.items())
        assert refused > 0.9 * len(tries)


def test_vectors_the_format_cannot_hold(tmp_path: Path) -> None:
    for hook in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"):
        with pytest.raises(SteersmanError, match="outputs of blocks from 1 on"):
            SteeringVector.of(torch.ones(D), hook_name=hook).save(tmp_path / "v.gguf")
    with pytest.raises(SteersmanError, match="same at every position"):
        SteeringVector.of(torch.ones(2, D), hook_name="blocks.1.hook_resid_post").save(tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(SteersmanError, match=r"pip install .steersman\[gguf\]"):
        V.save(tmp_path / "v.gguf")
