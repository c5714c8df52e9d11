"""Gemma Scope 2: files by the rules of the release, computed a second time here."""

from pathlib import Path

import pytest
import torch
from support.sae_files import assert_computes, write_files

from steersman.errors import SteersmanError
from steersman.sae import SAE

pytestmark = pytest.mark.usefixtures("seeded")
D, L, D_OUT = 6, 40, 6


def tensors(**further: torch.Tensor) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {"w_enc": (D, L), "w_dec": (L, D_OUT), "b_enc": (L,), "b_dec": (D_OUT,)}
    content = {name: torch.randn(shape, generator=g) for name, shape in made.items()}
    return content | {"threshold": torch.rand(L, generator=g)} | further


def write(folder: Path, content: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    return write_files(folder, {"params.safetensors": content} | ({} if config is None else {"config.json": config}))


def code(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    z = x.double() @ t["w_enc"].double() + t["b_enc"].double()
    return (z * (z > t["threshold"])).float()


CONFIG = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.9.output"}


def test_an_sae_with_and_without_its_configuration(tmp_path: Path) -> None:
    t, x = tensors(), torch.randn(40, D)
    place = "google--gemma-scope-2-1b-pt/resid_post/layer_9_width_16k_l0_small"
    with_config = SAE.load(write(tmp_path / "a" / place, t, CONFIG))
    without = SAE.load(write(tmp_path / "b" / place, t))
    for sae in (with_config, without):
        assert (sae.cfg.hook_name, sae.cfg.model_name) == ("blocks.9.hook_resid_post", "google/gemma-3-1b-pt")
        assert_computes(sae, x, code(t, x), code(t, x) @ t["w_dec"] + t["b_dec"])


@pytest.mark.parametrize(
    ("folder", "path", "hook"),
    [
        ("attn_out", "model.layers.9.self_attn.o_proj.input", "blocks.9.attn.hook_z"),
        ("mlp_out", "model.layers.9.post_feedforward_layernorm.output", "blocks.9.hook_mlp_out"),
    ],
)
def test_hook_points(folder: str, path: str, hook: str, tmp_path: Path) -> None:
    place = tmp_path / folder / "layer_9_width_16k_l0_small"
    sae = SAE.load(write(place, tensors(), CONFIG | {"hf_hook_point_in": path}))
    assert sae.cfg.hook_name == hook
    assert sae.cfg.metadata["hf_hook_point_in"] == path


def test_a_transcoder_with_an_affine_connection(tmp_path: Path) -> None:
    skip = torch.randn(D, D_OUT)
    t, x = tensors(affine_skip_connection=skip), torch.randn(40, D)
    config = CONFIG | {
        "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output",
        "affine_connection": True,
    }
    sae = SAE.load(write(tmp_path / "transcoder" / "layer_9", t, config))
    assert (sae.cfg.hook_name, sae.cfg.hook_name_out) == ("blocks.9.hook_mlp_in", "blocks.9.hook_mlp_out")
    torch.testing.assert_close(sae(x), code(t, x) @ t["w_dec"] + t["b_dec"] + x @ skip, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match="cross-layer transcoder, which writes to many layers"):
        SAE.load(write(tmp_path / "clt", tensors(w_dec=torch.zeros(L, 3, D))))
    with pytest.raises(SteersmanError, match="with architecture 'topk'; can read 'jump_relu'"):
        SAE.load(write(tmp_path / "topk", tensors(), CONFIG | {"architecture": "topk"}))
    with pytest.raises(SteersmanError, match="has no tensor 'threshold'"):
        SAE.load(write(tmp_path / "short", {k: v for k, v in tensors().items() if k != "threshold"}))
    with pytest.raises(SteersmanError, match="does not have: surprise"):
        SAE.load(write(tmp_path / "long", tensors(surprise=torch.zeros(1))))
