"""Llama Scope: files by the rules of the release, computed a second time here."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.sae_files import assert_computes, write_files

from steersman.errors import SteersmanError
from steersman.sae import SAE

pytestmark = pytest.mark.usefixtures("seeded")
D, L, NORM, THRESHOLD = 6, 40, 11.0, 0.8
HYPERPARAMETERS = {
    "d_model": D,
    "d_sae": L,
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "jump_relu_threshold": THRESHOLD,
    "dataset_average_activation_norm": {"in": NORM, "out": NORM},
}


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {"encoder.weight": (L, D), "encoder.bias": (L,), "decoder.weight": (D, L), "decoder.bias": (D,)}
    return {name: torch.randn(shape, generator=g) for name, shape in made.items()}


def write(folder: Path, fields: dict, content: dict[str, torch.Tensor]) -> Path:
    return write_files(folder, {"hyperparams.json": fields, "checkpoints/final.safetensors": content})


def expected(t: dict[str, torch.Tensor], x: torch.Tensor, s: float, threshold: torch.Tensor | float):
    z = (x * s).double() @ t["encoder.weight"].double().T + t["encoder.bias"].double()
    f = z * (z > threshold) * (z > 0)
    return f.float(), ((f @ t["decoder.weight"].double().T + t["decoder.bias"].double()) / s).float()


def test_an_sae_of_the_release(tmp_path: Path) -> None:
    t, x, s = tensors(), torch.randn(60, D) * NORM / math.sqrt(D), math.sqrt(D) / NORM
    sae = SAE.load(write(tmp_path / "Llama3_1-8B-Base-L15R-8x", HYPERPARAMETERS, t))
    assert (sae.cfg.hook_name, sae.cfg.model_name) == ("blocks.15.hook_resid_post", "meta-llama/Llama-3.1-8B")
    assert sae.neuronpedia_url(9) == "https://www.neuronpedia.org/llama3.1-8b/15-llamascope-res-32k/9"
    assert_computes(sae, x, *expected(t, x, s, THRESHOLD * s))


def test_bfloat16_files_and_dtypes(tmp_path: Path) -> None:
    t = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    folder = write(tmp_path / "L15", HYPERPARAMETERS, t)
    x, s = torch.randn(60, D), math.sqrt(D) / NORM
    f, _ = expected({name: tensor.float() for name, tensor in t.items()}, x, s, THRESHOLD * s)
    wide, narrow = SAE.load(folder), SAE.load(folder, dtype=torch.bfloat16)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(wide.encode(x), f, rtol=1e-5, atol=1e-5)
    assert ((narrow.encode(x) - f).abs() < 0.05).float().mean() > 0.98  # a few cross their threshold


def test_the_saes_of_the_distilled_model(tmp_path: Path) -> None:
    log_threshold = torch.randn(L, generator=torch.Generator().manual_seed(1)) * 0.3
    t = tensors()
    (tmp_path / "config.json").write_text(
        json.dumps({"d_model": D, "expansion_factor": 8, "hook_point_in": "blocks.1.hook_resid_post"})
    )
    save_file(t | {"log_jumprelu_threshold": log_threshold}, tmp_path / "sae_weights.safetensors")
    sae, x = SAE.load(tmp_path), torch.randn(60, D)
    assert_computes(sae, x, *expected(t, x, 1.0, log_threshold.exp()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_average_activation_norm": None}, "no dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 0}}, "is 0, not a positive number"),
        ({"dataset_average_activation_norm": {"in": "x"}}, "is 'x', not a positive number"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold is None, not a number"),
        ({"d_sae": L + 1}, "the weights have d_sae 40, the configuration says 41"),
        ({"d_model": "six"}, "d_model is 'six', not a whole number"),
    ],
)
def test_configurations_that_are_wrong(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match=message):
        SAE.load(write(tmp_path / "L15", HYPERPARAMETERS | change, tensors()))
