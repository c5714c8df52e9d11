"""Checkpoints that eai-sparsify writes, read by Steersman, and the other way round."""

import itertools
from pathlib import Path

import pytest
import sparsify
import torch
from support.helpers import make_sae

from steersman.sae import SAE
from steersman.sae.formats import convert

D, L, K = 12, 48, 6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def theirs(activation: str = "topk", transcode: bool = False, skip: bool = False, by_factor: bool = False):
    g = generator()
    size = {"expansion_factor": L // D} if by_factor else {"num_latents": L}
    cfg = sparsify.SparseCoderConfig(activation=activation, k=K, transcode=transcode, skip_connection=skip, **size)
    coder = sparsify.SparseCoder(D, cfg)
    for parameter in coder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.5
    return coder


def dense(code) -> torch.Tensor:
    return torch.zeros(len(code.top_acts), L).scatter(1, code.top_indices, code.top_acts)


CASES = [
    ("topk", False, False),
    ("topk", False, True),
    ("topk", True, False),
    ("topk", True, True),
    ("groupmax", False, False),
    ("groupmax", True, True),
]


@pytest.mark.parametrize(("activation", "transcode", "skip"), CASES)
def test_what_sparsify_saves_computes_the_same(activation: str, transcode: bool, skip: bool, tmp_path: Path) -> None:
    coder = theirs(activation, transcode, skip)
    coder.save_to_disk(tmp_path / "layers.3")
    sae = SAE.load(tmp_path / "layers.3")
    assert (sae.cfg.architecture, sae.cfg.transcoder, sae.cfg.skip_connection) == (activation, transcode, skip)
    assert sae.cfg.hook_name == "blocks.3.hook_resid_post"
    x = torch.randn(200, D, generator=generator())
    with torch.no_grad():
        code = coder.encode(x)
        torch.testing.assert_close(sae.encode(x), dense(code), rtol=1e-5, atol=1e-5)
        decoded = coder.decode(code.top_acts, code.top_indices)
        torch.testing.assert_close(sae.decode(dense(code)), decoded, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), coder(x).sae_out, rtol=1e-5, atol=1e-5)


def test_width_from_the_expansion_factor(tmp_path: Path) -> None:
    theirs(by_factor=True).save_to_disk(tmp_path)
    assert SAE.load(tmp_path).cfg.d_sae == L


def test_a_hub_layout_of_many_hook_points(tmp_path: Path) -> None:
    names = {
        "h.2.attn": "blocks.2.hook_attn_out",
        "layers.7.mlp": "blocks.7.hook_mlp_out",
        "embed_tokens": "hook_embed",
    }
    for name in names:
        theirs().save_to_disk(tmp_path / name)
    (tmp_path / "config.json").write_text('{"model": "EleutherAI/pythia-160m"}')
    for name, hook in names.items():
        sae = SAE.load(tmp_path / name)
        assert (sae.cfg.hook_name, sae.cfg.model_name) == (hook, "EleutherAI/pythia-160m")


@pytest.mark.parametrize(
    ("activation", "transcoder", "skip"), list(itertools.product(["topk", "groupmax"], [False, True], [False, True]))
)
def test_sparsify_opens_what_we_convert(activation: str, transcoder: bool, skip: bool, tmp_path: Path) -> None:
    sae = make_sae(
        activation,
        d_in=D,
        d_sae=L,
        k=K,
        transcoder=transcoder,
        skip_connection=skip,
        hook_name="blocks.3.hook_resid_post",
        model_name="m",
    )
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="sparsify")
    coder = sparsify.SparseCoder.load_from_disk(tmp_path / "theirs")
    x = torch.randn(200, D, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(dense(coder.encode(x)), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(coder(x).sae_out, sae(x), rtol=1e-5, atol=1e-5)
    back = SAE.load(tmp_path / "theirs")
    assert (back.cfg.hook_name, back.cfg.model_name) == ("blocks.3.hook_resid_post", "m")
