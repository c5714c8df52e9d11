"""Gemma Scope 1: files by the rules of the release, computed a second time here; malformed archives."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.sae_files import assert_computes

from steersman.errors import SteersmanError
from steersman.sae import SAE

pytestmark = pytest.mark.usefixtures("seeded")
D, L = 6, 40
RELEASE = "models--google--gemma-scope-2b-pt-res/gemma-scope-2b-pt-{kind}/layer_7/width_16k/average_l0_71"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    g = np.random.default_rng(seed)
    return {
        "W_enc": g.normal(size=(D, L)).astype(np.float32),
        "W_dec": g.normal(size=(L, D)).astype(np.float32),
        "b_enc": g.normal(size=L).astype(np.float32),
        "b_dec": g.normal(size=D).astype(np.float32),
        "threshold": g.uniform(0.1, 1.5, size=L).astype(np.float32),
    }


def write(folder: Path, content: dict[str, np.ndarray], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if packed else np.savez)(folder / "params.npz", **content)  # pyright: ignore[reportArgumentType]
    return folder


def expected(a: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code and reconstruction, in NumPy and float64: the bias of the decoder is not subtracted from the input."""
    a = {name: array.astype(np.float64) for name, array in a.items()}
    z = x @ a["W_enc"] + a["b_enc"]
    f = np.where(z > a["threshold"], np.maximum(z, 0), 0)
    return f, f @ a["W_dec"] + a["b_dec"]


def check(sae: SAE, a: dict[str, np.ndarray]) -> None:
    x = np.random.default_rng(1).normal(size=(50, D))
    f, x_hat = expected(a, x)
    assert_computes(sae, torch.tensor(x), torch.tensor(f), torch.tensor(x_hat))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_an_sae_of_the_release(packed: bool, dtype: Any, tmp_path: Path) -> None:
    a = arrays()
    folder = write(tmp_path / RELEASE.format(kind="res"), {k: v.astype(dtype) for k, v in a.items()}, packed)
    sae = SAE.load(folder)
    assert (sae.cfg.hook_name, sae.cfg.model_name) == ("blocks.7.hook_resid_post", "google/gemma-2-2b")
    assert (sae.cfg.architecture, sae.cfg.apply_b_dec_to_input) == ("jumprelu", False)
    assert sae.cfg.metadata["average_l0"] == 71
    assert sae.cfg.metadata["origin"]["format"] == "gemma_scope"
    check(sae, a)
    check(SAE.load(folder / "params.npz"), a)


def test_lower_case_names_and_half_precision(tmp_path: Path) -> None:
    a = {name: array.astype(np.float16) for name, array in arrays().items()}
    lower = {name.lower() if name.startswith("W") else name: array for name, array in a.items()}
    check(SAE.load(write(tmp_path, lower)), a)


@pytest.mark.parametrize(
    ("kind", "hook", "heads"),
    [("mlp", "blocks.7.hook_mlp_out", False), ("att", "blocks.7.attn.hook_z", True)],
)
def test_hook_points_come_from_the_repository(kind: str, hook: str, heads: bool, tmp_path: Path) -> None:
    sae = SAE.load(write(tmp_path / RELEASE.format(kind=kind), arrays()))
    assert (sae.cfg.hook_name, sae.cfg.reshape_heads) == (hook, heads)
    assert sae.cfg.model_name == "google/gemma-2-2b"
    if heads:
        assert sae(torch.randn(3, 2, 3)).shape == (3, 2, 3)
        sae.check_residual("steering")  # the heads side by side are a hidden state like any other


def test_embedding_saes_are_rescaled(tmp_path: Path) -> None:
    a = arrays()
    sae = SAE.load(write(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6", a))
    assert sae.cfg.hook_name == "hook_embed"
    check(sae, a | {"W_enc": a["W_enc"] / np.sqrt(D), "W_dec": a["W_dec"] * np.sqrt(D)})


def test_transcoders(tmp_path: Path) -> None:
    a = arrays()
    sae = SAE.load(write(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_8", a))
    assert sae.cfg.transcoder
    assert (sae.cfg.hook_name, sae.cfg.hook_name_out) == ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")
    check(sae, a)
    with pytest.raises(SteersmanError, match="transcoder from blocks.3.ln2.hook_normalized to blocks.3.hook_mlp_out"):
        sae.check_residual("steering")


def test_weights_that_are_wrong(tmp_path: Path) -> None:
    a = arrays()
    wrong = {
        "b_dec has shape": a | {"b_dec": np.zeros(D + 1, np.float32)},
        "threshold has shape": a | {"threshold": np.zeros(L - 1, np.float32)},
        "W_enc has shape .* should be a matrix": a | {"W_enc": np.zeros(3, np.float32)},
        "W_dec holds values that are not finite": a | {"W_dec": np.full((L, D), np.nan, np.float32)},
        "threshold holds values that are not finite": a | {"threshold": np.full(L, np.nan, np.float32)},
        "tensors that an SAE of this kind does not have: extra": a | {"extra": np.zeros(2, np.float32)},
        "has no tensor 'b_enc'": {name: array for name, array in a.items() if name != "b_enc"},
        "weights must be floating point": a | {"b_enc": np.zeros(L, np.int32)},
        "holds object, which is not numbers": a | {"b_enc": np.array([{}], dtype=object)},
        "holds <U3, which is not numbers": a | {"b_enc": np.array(["abc"])},
        "Fortran order": a | {"W_enc": np.asfortranarray(a["W_enc"])},
    }
    for i, (message, content) in enumerate(wrong.items()):
        with pytest.raises(SteersmanError, match=message):
            SAE.load(write(tmp_path / str(i), content))


def test_an_infinite_threshold_switches_a_latent_off(tmp_path: Path) -> None:
    a = arrays()
    a["threshold"][5] = np.inf
    sae = SAE.load(write(tmp_path, a))
    assert not sae.encode(torch.randn(500, D) * 10)[:, 5].any()
    check(sae, a)


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path / "params.npz", "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def npy(shape: tuple[int, ...], data: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


def test_archives_that_lie(tmp_path: Path) -> None:
    whole = {f"{name}.npy": npy(array.shape, array.tobytes()) for name, array in arrays().items()}
    bomb = npy((D, L), bytes(40_000_000))  # far more behind the header than its shape says
    with pytest.raises(
        SteersmanError, match=r"W_enc of shape \[6, 40\] should take 960 bytes, the archive holds 40,000"
    ):
        SAE.load(archive(tmp_path / "bomb", whole | {"W_enc.npy": bomb}))
    n = 20_000_000  # the shape says it too: 80 MB of zeros in a small file
    zeros = npy((1, n), bytes(4 * n))
    with pytest.raises(SteersmanError, match="weights do not compress like that"):
        SAE.load(archive(tmp_path / "zeros", whole | {"W_enc.npy": zeros}))
    huge = npy((1 << 40, 1 << 20), b"1234")
    with pytest.raises(SteersmanError, match="should take"):
        SAE.load(archive(tmp_path / "huge", whole | {"W_enc.npy": huge}))
    with pytest.raises(SteersmanError, match="holds '../W_enc.npy'"):
        SAE.load(archive(tmp_path / "climb", whole | {"../W_enc.npy": b""}))
    with pytest.raises(SteersmanError, match="the header of W_enc cannot be read"):
        SAE.load(archive(tmp_path / "header", whole | {"W_enc.npy": b"\x93NUMPY\x01\x00\x05\x00{'a':"}))
    good = archive(tmp_path / "cut", whole) / "params.npz"
    good.write_bytes(good.read_bytes()[:-30])
    with pytest.raises(SteersmanError, match="truncated or not an npz file"):
        SAE.load(good.parent)
