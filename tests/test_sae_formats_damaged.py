"""Files of SAEs that are damaged, contradict themselves, or say in their configuration what nobody reads."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import make_sae
from support.sae_files import write_files

from steersman.errors import SteersmanError
from steersman.sae import SAE, FeatureStats, SAEConfig
from steersman.sae.formats import convert
from steersman.sae.formats.inspection import inspect

D, L = 8, 32
G = torch.Generator().manual_seed(0)
X = torch.randn(20, D, generator=G)


def weights(**changes: Any) -> dict[str, Any]:
    """Those of OpenAI's files."""
    g = torch.Generator().manual_seed(1)
    plain = {
        "pre_bias": torch.randn(D, generator=g), "encoder.weight": torch.randn(L, D, generator=g),
        "latent_bias": torch.randn(L, generator=g), "decoder.weight": torch.randn(D, L, generator=g),
    }  # fmt: skip
    return {**plain, "activation": "ReLU", **changes}


def refused(path: Path, message: str) -> None:
    for read in (SAE.load, inspect, lambda path: convert(path, path.parent / "new", to="saelens")):
        with pytest.raises(SteersmanError, match=message) as raised:
            read(path)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 1000
    assert not (path.parent / "new").exists()


# .pt files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.weight": torch.zeros(1).expand(L, D)}, r"takes 1,024 bytes, the file holds 4"),
        ({"encoder.weight": torch.zeros(1).expand(1 << 34, D)}, r"takes 549,755,813,888 bytes, the file holds 4"),
        ({"encoder.weight": torch.zeros(L, D, dtype=torch.float8_e4m3fn)}, "dtype torch.float8_e4m3fn, which is not"),
        ({"latent_bias": torch.zeros(L, dtype=torch.complex64)}, "of the kind ComplexFloatStorage is not read"),
        ({"latent_bias": torch.zeros(L + 1)}, r"latent_bias has shape \[33\], the configuration says \[32\]"),
        ({"decoder.weight": torch.zeros(D, 0)}, r"shape \[0, 8\], the configuration says \[32, 8\]"),
        ({"encoder.weight": torch.zeros(0, D)}, r"it should be a matrix"),
        ({"decoder.weight": torch.full((D, L), 1e300, dtype=torch.float64)}, "too large for|not finite"),
        ({("a", 1): torch.zeros(2)}, "a key of its dictionary is a tuple"),
    ],
)
def test_pt_files_whose_tensors_are_not_what_they_say(changes: dict, message: str, tmp_path: Path) -> None:
    path = write_files(tmp_path, {"6.pt": weights(**{}) | changes}) / "6.pt"
    if "too large" in message:
        with pytest.raises(SteersmanError, match=message):
            SAE.load(path)
    else:
        refused(path, message)


@pytest.mark.parametrize("spoil", ["short", "flipped", "gone"])
def test_members_of_a_pt_file_are_as_long_as_it_says_and_have_their_checksums(spoil: str, tmp_path: Path) -> None:
    whole = write_files(tmp_path / "whole", {"6.pt": weights()}) / "6.pt"
    with zipfile.ZipFile(whole) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        assert len(names) == 4
        for name in names:
            path = tmp_path / f"{Path(name).name}.pt"
            if spoil == "flipped":
                content = bytearray(whole.read_bytes())
                with archive.open(name) as member:
                    place = content.index(member.read())
                content[place + 5] ^= 4
                path.write_bytes(content)
            else:
                with zipfile.ZipFile(path, "w") as damaged:
                    for other in archive.namelist():
                        if other != name or spoil == "short":
                            damaged.writestr(other, archive.read(other)[: 8 if other == name else None])
            refused(path, "is damaged|truncated or damaged: its storage")


def test_pt_files_without_checksums_open(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = write_files(tmp_path, {"6.pt": weights()}) / "6.pt"
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(SAE.load(path).b_dec, weights()["pre_bias"])


def test_two_norm_factors(tmp_path: Path) -> None:
    ae = {"encoder.weight": torch.ones(L, D), "encoder.bias": torch.ones(L), "decoder.weight": torch.ones(D, L)}
    for factor, message in (
        (torch.ones(2), "one number"),
        (torch.tensor(-1.0), "not a positive number"),
        ("2", "not a positive number"),
        (10**400, "not a positive number"),
    ):
        content = {"ae": ae | {"bias": torch.ones(D)}, "norm_factor": factor}
        refused(write_files(tmp_path, {"ae.pt": content}) / "ae.pt", f"norm_factor.*{message}")


# What is not a file, or is not there


@pytest.mark.parametrize("what", ["pipe", "folder", "nowhere", "loop", "device"])
@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "feature_stats.safetensors"])
def test_what_is_no_regular_file_is_an_error(name: str, what: str, tmp_path: Path) -> None:
    sae = make_sae(d_in=D, d_sae=L)
    sae.feature_stats = FeatureStats(
        **dict.fromkeys(("max_act", "density", "mean_act"), torch.ones(L)), n_tokens=1, median_norm=1.0
    )
    sae.save(tmp_path / "sae")
    path = tmp_path / "sae" / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"nowhere": "../gone", "loop": name, "device": "/dev/zero"}[what])
    refused(tmp_path / "sae", f"{name}.*(file|symbolic links)")


def test_an_input_scale_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    saelens(tmp_path, {"architecture": "standard"})
    (tmp_path / "activation_scaler.json").symlink_to("../../blobs/gone")
    refused(tmp_path, r"activation_scaler.json: no such file")


# Configurations


def saelens(folder: Path, changes: dict[str, Any]) -> Path:
    """A folder as SAELens 6 writes it."""
    sae = make_sae("relu", d_in=D, d_sae=L)
    fields = {
        "architecture": "standard", "d_in": D, "d_sae": L, "apply_b_dec_to_input": False, "reshape_activations": "none",
        "normalize_activations": "none", "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }  # fmt: skip
    return write_files(folder, {"sae_weights.safetensors": sae.weights(), "cfg.json": fields | changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input is 'false', it should be true or false"),
        ({"apply_b_dec_to_input": 0}, "apply_b_dec_to_input is 0, it should be true or false"),
        ({"rescale_acts_by_decoder_norm": "no"}, "rescale_acts_by_decoder_norm is 'no'"),
        ({"reshape_activations": "hook_q"}, "reshape_activations 'hook_q'"),
        ({"metadata": "x"}, "metadata is 'x', not an object"),
        ({"metadata": {"hook_name": 5}}, "hook_name is 5, not a name"),
        ({"d_in": 10**400}, "d_in is .*, not a whole number"),
        ({"d_sae": True}, "d_sae is True, not a whole number"),
        ({"metadata": None, "activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"metadata": None, "activation_fn": "topk"}, "topk has no k"),
        ({"architecture": 5}, "architecture is 5, not a name"),
    ],
)
def test_saelens_configurations_that_would_compute_something_else(changes: dict, message: str, tmp_path: Path) -> None:
    fields = {key: value for key, value in changes.items() if value is not None}
    saelens(tmp_path / "sae", fields)
    if changes.get("metadata", 0) is None:
        content = json.loads((tmp_path / "sae" / "cfg.json").read_text())
        del content["metadata"]
        (tmp_path / "sae" / "cfg.json").write_text(json.dumps(content))
    refused(tmp_path / "sae", message)


def sparsify(folder: Path, **changes: Any) -> Path:
    sae = make_sae("topk", d_in=D, d_sae=L, k=4)
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    fields = {"d_in": D, "num_latents": L, "k": 4, **changes}
    return write_files(
        folder, {"sae.safetensors": {k: v.detach().contiguous() for k, v in tensors.items()}, "cfg.json": fields}
    )


def test_a_signed_sparsify_sae_keeps_the_largest_by_absolute_value(tmp_path: Path) -> None:
    sae = SAE.load(sparsify(tmp_path, signed=True))
    pre = (X - sae.b_dec) @ sae.W_enc + sae.b_enc
    top = pre.abs().topk(4).indices
    code = torch.zeros_like(pre).scatter(1, top, pre.gather(1, top))
    assert bool((code < 0).any())
    torch.testing.assert_close(sae.encode(X), code)
    torch.testing.assert_close(sae(X), code @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signed": True, "activation": "groupmax"}, "signed SAE"),
        ({"signed": "true"}, "signed is 'true'"),
        ({"transcode": "false"}, "transcode is 'false'"),
        ({"skip_connection": 1}, "skip_connection is 1"),
        ({"cross_layer": 4}, "cross_layer 4"),
        ({"coalesce_topk": "concat"}, "coalesce_topk 'concat'"),
        ({"k": float("nan")}, "k is nan, not a whole number"),
    ],
)
def test_sparsify_configurations_that_would_compute_something_else(changes: dict, message: str, tmp_path: Path) -> None:
    refused(sparsify(tmp_path / "sae", **changes), message)


# Our own


def own(folder: Path) -> Path:
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=4, hook_name="blocks.1.hook_resid_post", model_name="m"), G)
    g = torch.Generator().manual_seed(3)
    arrays = {name: torch.rand(L, generator=g) for name in ("max_act", "density", "mean_act")}
    sae.feature_stats = FeatureStats(**arrays, n_tokens=900, median_norm=2.5)
    sae.save(folder)
    return folder


def change(**settings: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        fields = json.loads((folder / "cfg.json").read_text())
        fields["metadata"]["steersman"]["config"].update(settings)
        fields["metadata"]["steersman"].pop("crc32")
        (folder / "cfg.json").write_text(json.dumps(fields))

    return spoil


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input of an SAE is 'false', it should be true or false"),
        ({"hook_name": 5}, "hook_name of an SAE is 5, it should be text"),
        ({"model_name": None}, "model_name of an SAE is None"),
        ({"k": float("nan")}, "k of an SAE is nan"),
        ({"k": 2.5}, "k of an SAE is 2.5"),
        ({"d_in": "8"}, "d_in of an SAE is '8'"),
        ({"group_sizes": 3}, "group_sizes of an SAE is 3"),
        ({"options": []}, r"options of an SAE is \[\]"),
        ({"what": 1}, "what"),
        ({"input_norm": "x"}, "input_norm of an SAE is 'x', it should be one of none, layer_norm"),
    ],
)
def test_values_of_another_type_in_our_own_configuration(settings: dict, message: str, tmp_path: Path) -> None:
    change(**settings)(own(tmp_path / "sae"))
    refused(tmp_path / "sae", message)


def test_a_changed_configuration_is_said_and_can_be_meant(tmp_path: Path) -> None:
    file = own(tmp_path / "sae") / "cfg.json"
    file.write_text(file.read_text().replace('"k": 4,\n        "activation"', '"k": 5,\n        "activation"'))
    refused(tmp_path / "sae", r"cfg.json was changed or is damaged.*take out its crc32")
    change()(tmp_path / "sae")
    assert SAE.load(tmp_path / "sae").cfg.k == 5


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "feature_stats.safetensors", "cfg.json"])
def test_no_flipped_bit_of_an_sae_is_taken_for_what_was_saved(name: str, tmp_path: Path) -> None:
    folder = own(tmp_path / "sae")
    whole, content = SAE.load(folder), (folder / name).read_bytes()
    refusals, tries = 0, range(0, 8 * len(content), max(1, 8 * len(content) // 150) | 1)
    for bit in tries:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(damaged)
        try:
            found = SAE.load(folder)
        except SteersmanError:
            refusals += 1
            continue
        assert found.cfg == whole.cfg
        assert found.feature_stats is not None
        assert whole.feature_stats is not None
        for part in ("max_act", "density", "mean_act", "n_tokens", "median_norm"):
            assert torch.equal(*(torch.as_tensor(getattr(sae.feature_stats, part)) for sae in (found, whole)))
        assert all(torch.equal(found.weights()[key], value) for key, value in whole.weights().items())
    assert refusals > (0.2 if name == "cfg.json" else 0.9) * len(tries)


def test_weights_and_configuration_of_two_saes_are_not_mixed(tmp_path: Path) -> None:
    a, b = own(tmp_path / "a"), own(tmp_path / "b")
    shutil.copy(b / "sae_weights.safetensors", a)
    refused(a, "is not the file that cfg.json was written with")
    file = b / "sae_weights.safetensors"
    save_file(load_file(file), file)  # another program has written them since, and kept the configuration
    SAE.load(b)


def test_equal_saes_have_equal_bytes_and_name_no_folder_of_their_makers(tmp_path: Path) -> None:
    source = saelens(tmp_path / "home" / "somebody" / "sae", {})
    for name in ("one", "two"):
        convert(source, tmp_path / name, to="saelens")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert [(tmp_path / "two" / name).read_bytes() for name in files] == [
        (tmp_path / "one" / name).read_bytes() for name in files
    ]
    assert not any(b"somebody" in (tmp_path / "one" / name).read_bytes() for name in files)


def test_names_in_a_file_do_not_reach_the_terminal_as_commands_to_it(tmp_path: Path) -> None:
    saelens(tmp_path / "sae", {"metadata": {"hook_name": "\x1b]0;x\x07blocks.1", "model_name": "m\x1b[2J"}})
    shown = inspect(tmp_path / "sae").to_text()
    assert "\x1b" not in shown
    assert "m\\x1b[2J" in shown
