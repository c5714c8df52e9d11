"""Tensor files: blocks, malformed headers, and files of random bytes."""

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.helpers import make_sae
from support.sae_files import write_files

from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.sae.formats import tensors as module
from steersman.sae.formats.inspection import row_norms
from steersman.sae.formats.source import open_tensors

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".pt"])
@pytest.mark.parametrize("block_bytes", [1, 64, 1 << 20])
def test_entries_in_blocks_of_any_size(
    ending: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    content = {"m": torch.randn(7, 5), "v": torch.randn(9), "s": torch.tensor(2.5)}
    file = open_tensors(write_files(tmp_path, {f"x{ending}": content}) / f"x{ending}")
    target = torch.empty(7, 5)
    file.entry("m").copy_into(target)
    assert torch.equal(target, content["m"])
    turned = torch.empty(7, 5).T
    file.entry("m").T.scaled(2.0).copy_into(turned)
    assert torch.equal(turned, 2 * content["m"].T)
    torch.testing.assert_close(row_norms(file.entry("m")), content["m"].norm(dim=1))
    torch.testing.assert_close(row_norms(file.entry("m").T), content["m"].norm(dim=0))
    vector = torch.empty(9, dtype=torch.bfloat16)
    file.entry("v").copy_into(vector)
    assert torch.equal(vector, content["v"].bfloat16())
    assert torch.equal(file.entry("v").exp().read(), content["v"].exp())
    assert file.entry("s").number() == 2.5
    with pytest.raises(SteersmanError, match=r"m has shape \[7, 5\], it should be one number"):
        file.entry("m").number()
    with pytest.raises(SteersmanError, match=r"m has shape \[5, 7\], it should be \[7, 5\]"):
        file.entry("m").T.copy_into(target)
    with pytest.raises(SteersmanError, match="has no tensor 'w'; it has m, s, v"):
        file.entry("w")


def test_only_a_block_is_held_beside_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 18)
    path = (
        write_files(tmp_path, {"x.npz": {"m": torch.randn(1000, 2000)}}) / "x.npz"
    )  # NumPy's memory is traced, torch's is not
    target = torch.empty(2000, 1000)
    file = open_tensors(path)
    tracemalloc.start()
    file.entry("m").T.copy_into(target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000  # of 8 million bytes


def header(content: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 1 << 60) + b"{}",
        header({"a": F32}),  # the data is missing
        header({"a": F32 | {"shape": [3]}}, bytes(8)),
        header({"a": F32 | {"data_offsets": [0, 1 << 40]}}, bytes(8)),
        header({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
        header({"a": F32, "b": F32}, bytes(8)),  # overlapping
        header({"a": F32 | {"dtype": "F99"}}, bytes(8)),
        header({"a": F32 | {"shape": [-2]}}, bytes(8)),
        header({"a": F32 | {"shape": [1 << 62, 1 << 62]}}, bytes(8)),
        header({"a": []}),
        struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
    ],
)
def test_safetensors_headers_that_are_wrong(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(SteersmanError, match="truncated or not a safetensors file"):
        open_tensors(path)


def test_dtypes_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)))
    with pytest.raises(SteersmanError, match="a has dtype F8_E4M3, which is not supported"):
        open_tensors(path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SteersmanError, match=r"read from .safetensors, .npz and .pt"):
        open_tensors(tmp_path / "x.bin")


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.pt"])
@quick
@given(data=st.binary(max_size=300), magic=st.booleans())
def test_random_bytes_are_an_error_of_ours(name: str, data: bytes, magic: bool, tmp_path: Path) -> None:
    start = {"x.safetensors": struct.pack("<Q", max(0, len(data) - 2)), "x.npz": b"PK\x03\x04", "x.pt": b"\x80\x02"}
    (tmp_path / name).write_bytes((start[name] if magic else b"") + data)
    with pytest.raises(SteersmanError):
        open_tensors(tmp_path / name).entry("W_enc")


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz", "x.pt"])
@quick
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6), cut=st.integers(0, 3000))
@example(changes=[(5641, 1)], cut=0)  # makes the .pt an archive of several disks
def test_damaged_files_load_or_are_an_error_of_ours(
    name: str, changes: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    whole = tmp_path / f"whole_{name}"
    if not whole.exists():
        write_files(tmp_path, {whole.name: {"W_enc": torch.randn(4, 6), "b_enc": torch.randn(6)}})
    data = bytearray(whole.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    (tmp_path / name).write_bytes(data[: len(data) - cut] if cut < 1000 else data)
    with contextlib.suppress(SteersmanError):  # any other exception fails the test
        file = open_tensors(tmp_path / name)
        for entry in [file.entry(key) for key in file.headers]:
            if len(entry.shape) == 2 and entry.header.n_bytes < 10_000:
                entry.copy_into(torch.empty(entry.shape))


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 70), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        ["topk", "jumprelu", "standard", "gated", "transcoder", "matryoshka_batchtopk", "layer_norm", "hook_z"]
    ),
)
keys = [
    "architecture",
    "d_in",
    "d_sae",
    "d_out",
    "k",
    "activation",
    "num_latents",
    "expansion_factor",
    "transcode",
    "skip_connection",
    "normalize_activations",
    "reshape_activations",
    "apply_b_dec_to_input",
    "rescale_acts_by_decoder_norm",
    "activation_fn",
    "activation_fn_kwargs",
    "matryoshka_widths",
    "hook_name",
    "metadata",
]


@pytest.mark.parametrize("weights", ["sae_weights.safetensors", "sae.safetensors"])
@settings(quick, max_examples=150)
@given(fields=st.dictionaries(st.sampled_from(keys), values, max_size=6), native=st.booleans())
def test_configurations_of_random_values(weights: str, fields: dict[str, Any], native: bool, tmp_path: Path) -> None:
    made = tmp_path / "made"
    if not made.exists():
        make_sae().save(made)
        (made / "sae_weights.safetensors").rename(tmp_path / weights)
    base = {"d_in": 8, "d_sae": 64, "k": 5, "num_latents": 64, "architecture": "topk"} | fields
    if native:
        base = {"metadata": {"steersman": {"config": base}}}
    (tmp_path / "cfg.json").write_text(json.dumps(base))
    with contextlib.suppress(SteersmanError):  # any other exception fails the test
        assert SAE.load(tmp_path).cfg.d_in == 8


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', "NaN", "{" * 5000, '{"a": ' * 100_000])
def test_configurations_that_are_no_objects(content: str, tmp_path: Path) -> None:
    make_sae().save(tmp_path)
    (tmp_path / "cfg.json").write_text(content)
    with pytest.raises(SteersmanError, match="not a readable SAE configuration"):
        SAE.load(tmp_path)
