"""Checkpoints that dictionary-learning writes, read by Steersman, and the other way round."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from support.helpers import make_sae

from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.sae.formats import convert

D, L, K = 12, 48, 6
GROUPS = [8, 16, 24]

CLASSES = {
    "AutoEncoder": lambda: AutoEncoder(D, L),
    "AutoEncoderNew": lambda: AutoEncoderNew(D, L),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, L),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, L),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, L, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, L, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, L, K, GROUPS),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def theirs(kind: str, threshold: float = 0.6) -> Any:
    g = generator()
    ae = CLASSES[kind]()
    for name, parameter in ae.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.5
        if name == "threshold":
            parameter.data = parameter.data.abs()
    if hasattr(ae, "threshold") and kind != "JumpReluAutoEncoder":
        ae.threshold.fill_(threshold)
    return ae


def save(ae: Any, folder: Path, kind: str, name: str = "ae.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(ae.state_dict(), folder / name)
    trainer = {
        "dict_class": kind,
        "activation_dim": D,
        "dict_size": L,
        "k": K,
        "layer": 4,
        "lm_name": "google/gemma-2-2b",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_what_dictionary_learning_saves_computes_the_same(kind: str, tmp_path: Path) -> None:
    ae = theirs(kind)
    sae = SAE.load(save(ae, tmp_path, kind))
    assert (sae.cfg.hook_name, sae.cfg.model_name) == ("blocks.4.hook_resid_post", "google/gemma-2-2b")
    x = torch.randn(200, D, generator=generator())
    with torch.no_grad():
        f = ae.encode(x)
        assert (f > 0).any()
        torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(f), ae.decode(f), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), ae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_is_not_set_lets_all_through(kind: str, tmp_path: Path) -> None:
    ae = theirs(kind, threshold=-1.0)
    sae = SAE.load(save(ae, tmp_path, kind))
    x = torch.randn(50, D, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), ae.encode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder", "BatchTopKSAE"])
def test_a_backup_of_normalised_inputs(kind: str, tmp_path: Path) -> None:
    """A backup holds the biases of inputs divided by norm_factor; the finished file has them scaled."""
    ae, factor = theirs(kind), 7.5
    with torch.no_grad():
        for rows in (ae.decoder.weight.T,) if hasattr(ae, "decoder") else (ae.W_dec,):
            rows.div_(rows.norm(dim=1, keepdim=True))
    folder = save(ae, tmp_path, kind)
    optimizer = torch.optim.Adam(ae.parameters())
    backup = {"step": 3, "ae": ae.state_dict(), "optimizer": optimizer.state_dict(), "config": {"k": K}}
    torch.save(backup | {"norm_factor": factor}, folder / "ae.pt")
    sae = SAE.load(folder)
    ae.scale_biases(factor)
    x = torch.randn(100, D, generator=generator()) * factor
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), ae.encode(x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sae(x), ae(x), rtol=1e-5, atol=1e-4)


def test_a_step_in_the_checkpoints_folder(tmp_path: Path) -> None:
    ae = theirs("AutoEncoderTopK")
    save(ae, tmp_path, "AutoEncoderTopK")
    (tmp_path / "checkpoints").mkdir()
    torch.save(ae.state_dict(), tmp_path / "checkpoints" / "ae_1000.pt")
    sae = SAE.load(tmp_path / "checkpoints" / "ae_1000.pt")
    assert (sae.cfg.architecture, sae.cfg.k) == ("topk", K)


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_the_class_is_told_from_the_tensors(kind: str, tmp_path: Path) -> None:
    ae = theirs(kind)
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    x = torch.randn(50, D, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(SAE.load(tmp_path).encode(x), ae.encode(x), rtol=1e-5, atol=1e-5)


FITTING = {
    "AutoEncoder": ("relu", {}),
    "AutoEncoderNew": ("relu", {"apply_b_dec_to_input": False}),
    "GatedAutoEncoder": ("gated", {}),
    "JumpReluAutoEncoder": ("jumprelu", {"apply_b_dec_to_input": False}),
    "AutoEncoderTopK": ("topk", {}),
    "BatchTopKSAE": ("batch_topk", {}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {"group_sizes": (8, 16, 24)}),
}


@pytest.mark.parametrize("kind", FITTING)
def test_dictionary_learning_opens_what_we_convert(kind: str, tmp_path: Path) -> None:
    activation, options = FITTING[kind]
    sae = make_sae(activation, d_in=D, d_sae=L, k=K, **options)
    sae.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="dictionary_learning")
    trainer = json.loads((tmp_path / "theirs" / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == kind
    ae = CLASSES[kind]()
    ae.load_state_dict(torch.load(tmp_path / "theirs" / "ae.pt"))
    x = torch.randn(200, D, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(ae.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ae(x), sae(x), rtol=1e-5, atol=1e-5)
    back = SAE.load(tmp_path / "theirs")
    torch.testing.assert_close(back.encode(x), sae.encode(x))


def test_what_no_class_computes_is_refused(tmp_path: Path) -> None:
    make_sae("jumprelu", d_in=D, d_sae=L).save(tmp_path / "ours")
    with pytest.raises(SteersmanError, match="cannot express a JumpReLU SAE that subtracts b_dec"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="dictionary_learning")
