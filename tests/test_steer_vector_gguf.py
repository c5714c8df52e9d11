"""GGUF control vectors: written, read back, read by the rules of llama.cpp, and refused where they do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import D, with_text

from steersman import Steerer, SteeringVector
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
    path: Path, architecture: str = "controlvector", name: str = "direction.1", hint: str | None = "llama"
) -> Path:
    """A file as another program writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor(name, V.at("blocks.1.hook_resid_post").vector.numpy())
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
    assert [(t.name, t.data.dtype.name, list(t.shape)) for t in reader.tensors] == [
        ("direction.1", "float32", [D]), ("direction.2", "float32", [D]),
    ]  # fmt: skip


def test_a_file_of_another_program(tmp_path: Path) -> None:
    v = SteeringVector.load(foreign(tmp_path / "v.gguf"))
    assert v.hook_names == ["blocks.1.hook_resid_post"]
    assert (v.model_name, v.method, v.metadata["model_type"]) == ("", "gguf", "llama")
    Steerer(with_text("llama")).vector(v)
    with pytest.raises(SteersmanError, match="made for a model of type 'llama', 'gpt2' is 'gpt2'"):
        Steerer(with_text("gpt2")).vector(v)
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
