"""Conversion: round trips through every format that is written, and what each cannot express."""

from pathlib import Path

import pytest
import torch
from support.helpers import make_sae

from steersman.errors import SteersmanError
from steersman.sae import SAE
from steersman.sae.formats import convert

pytestmark = pytest.mark.usefixtures("seeded")
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))

FITTING = [
    ("saelens", "topk", {}),
    ("saelens", "matryoshka", {"input_norm": "layer_norm"}),
    ("saelens", "gated", {"apply_b_dec_to_input": False}),
    ("saelens", "jumprelu", {"transcoder": True, "d_out": 5, "skip_connection": True, "hook_name_out": "o"}),
    ("sparsify", "topk", {}),
    ("sparsify", "groupmax", {"skip_connection": True}),
    ("sparsify", "topk", {"transcoder": True}),
    ("dictionary_learning", "relu", {}),
    ("dictionary_learning", "relu", {"apply_b_dec_to_input": False}),
    ("dictionary_learning", "gated", {}),
    ("dictionary_learning", "topk", {}),
    ("dictionary_learning", "batch_topk", {}),
    ("dictionary_learning", "matryoshka", {}),
    ("dictionary_learning", "jumprelu", {"apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("to", "activation", "options"), FITTING)
def test_there_and_back(to: str, activation: str, options: dict, tmp_path: Path) -> None:
    sae = make_sae(activation, hook_name="blocks.3.hook_mlp_out", model_name="google/gemma-2-2b", **options)
    sae.save(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / to, to=to).cfg.d_sae == 64
    there = SAE.load(tmp_path / to)
    torch.testing.assert_close(there.encode(X), sae.encode(X), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(there(X), sae(X), rtol=1e-6, atol=1e-6)
    assert (there.cfg.hook_name, there.cfg.model_name) == ("blocks.3.hook_mlp_out", "google/gemma-2-2b")
    convert(tmp_path / to, tmp_path / "back", to="saelens") if activation != "groupmax" and not (
        to == "sparsify" and options
    ) else there.save(tmp_path / "back")
    back = SAE.load(tmp_path / "back")
    torch.testing.assert_close(back(X), sae(X), rtol=1e-6, atol=1e-6)


UNFIT = [
    ("saelens", "groupmax", {}, "SAELens has no groupmax"),
    ("saelens", "topk", {"transcoder": True}, "SAELens has no topk transcoder"),
    ("saelens", "relu", {"skip_connection": True}, "SAELens has no relu with a skip connection"),
    ("saelens", "abs_topk", {}, "SAELens has no abs_topk architecture"),
    ("dictionary_learning", "abs_topk", {}, "dictionary_learning cannot express abs_topk"),
    ("sparsify", "abs_topk", {}, "sparsify cannot express activation 'abs_topk'"),
    ("sparsify", "jumprelu", {}, "sparsify cannot express activation 'jumprelu'"),
    ("sparsify", "topk", {"input_norm": "layer_norm"}, "input normalisation 'layer_norm'"),
    ("sparsify", "topk", {"apply_b_dec_to_input": False}, "an input that keeps b_dec"),
    ("sparsify", "topk", {"transcoder": True, "d_out": 5}, r"output of another width \(5\)"),
    ("sparsify", "topk", {"reshape_heads": True}, "inputs per attention head"),
    ("dictionary_learning", "topk", {"transcoder": True}, "cannot express transcoders"),
    ("dictionary_learning", "groupmax", {}, "cannot express groupmax"),
    ("dictionary_learning", "topk", {"skip_connection": True}, "cannot express skip connections"),
    ("dictionary_learning", "topk", {"input_norm": "constant_norm"}, "input normalisation 'constant_norm'"),
    ("dictionary_learning", "topk", {"apply_b_dec_to_input": False}, "topk SAE that keeps b_dec"),
    ("dictionary_learning", "jumprelu", {}, "JumpReLU SAE that subtracts b_dec"),
]


@pytest.mark.parametrize(("to", "activation", "options", "message"), UNFIT)
def test_what_a_format_cannot_express(to: str, activation: str, options: dict, message: str, tmp_path: Path) -> None:
    make_sae(activation, **options).save(tmp_path / "ours")
    with pytest.raises(SteersmanError, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    assert not (tmp_path / "theirs").exists()


def test_targets_that_are_wrong(tmp_path: Path) -> None:
    make_sae().save(tmp_path / "ours")
    with pytest.raises(SteersmanError, match="cannot write the format 'openai'; can write saelens, sparsify"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="openai")
    with pytest.raises(SteersmanError, match="exists and is not an empty folder"):
        convert(tmp_path / "ours", tmp_path / "ours", to="saelens")
    (tmp_path / "file").write_text("")
    with pytest.raises(SteersmanError, match="exists and is not an empty folder"):
        convert(tmp_path / "ours", tmp_path / "file", to="saelens")
