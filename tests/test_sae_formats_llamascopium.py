"""Llamascopium: files by the rules of its source, computed a second time here."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.sae_files import assert_computes, write_files

from steersman.errors import SteersmanError
from steersman.sae import SAE

pytestmark = pytest.mark.usefixtures("seeded")
D, L, K, NORM_IN, NORM_OUT = 6, 40, 5, 9.0, 4.0
IN, OUT = "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"
CONFIG = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": L / D,
    "act_fn": "jumprelu",
    "top_k": K,
    "hook_point_in": IN,
    "hook_point_out": IN,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
}


def tensors(config: dict) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {"W_E": (D, L), "b_E": (L,), "W_D": (L, D), "b_D": (D,)}
    content = {name: torch.randn(shape, generator=g) for name, shape in made.items()}
    if not config["use_decoder_bias"]:
        del content["b_D"]
    if config["act_fn"] == "jumprelu":
        content["activation_function.log_jumprelu_threshold"] = torch.randn(L, generator=g) * 0.5
    for hook, norm in {config["hook_point_in"]: NORM_IN, config["hook_point_out"]: NORM_OUT}.items():
        content[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    return content


def write(folder: Path, config: dict, content: dict[str, torch.Tensor], pickled: bool = False) -> Path:
    pickle = {"sae_weights.pt": {"sae": content, "version": "2.0.0"}}
    weights = pickle if pickled else {"sae_weights.safetensors": content}
    return write_files(folder, {"config.json": config, **weights})


def expected(config: dict, t: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and reconstruction in the steps of the source library, in float64."""
    t = {name: tensor.double() for name, tensor in t.items()}
    x = x.double()
    s_in = s_out = torch.ones(len(x), 1).double()
    if config["norm_activation"] == "dataset-wise":
        s_in = math.sqrt(D) / t[f"dataset_average_activation_norm.{config['hook_point_in']}"]
        s_out = math.sqrt(D) / t[f"dataset_average_activation_norm.{config['hook_point_out']}"]
    elif config["norm_activation"] == "token-wise":
        s_in = s_out = math.sqrt(D) / x.norm(dim=1, keepdim=True)
    z = (x * s_in) @ t["W_E"] + t["b_E"]
    norms = t["W_D"].norm(dim=1) if config["sparsity_include_decoder_norm"] else torch.ones(L).double()
    scored = z * norms
    if config["act_fn"] == "jumprelu":
        f = scored * (scored > t["activation_function.log_jumprelu_threshold"].exp())
    elif config["act_fn"] == "topk":
        f = torch.zeros_like(scored).scatter(1, scored.topk(K).indices, scored.topk(K).values).relu()
    else:
        f = scored.relu()
    f = f / norms
    return f, (f @ t["W_D"] + t.get("b_D", 0)) / s_out


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("norm", ["dataset-wise", "token-wise", "inference"])
@pytest.mark.parametrize("activation", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_saes(activation: str, norm: str, by_norm: bool, pickled: bool, tmp_path: Path) -> None:
    config = CONFIG | {"act_fn": activation, "norm_activation": norm, "sparsity_include_decoder_norm": by_norm}
    t = tensors(config)
    if activation == "topk":
        t["W_D"] /= t["W_D"].norm(dim=1, keepdim=True)
    sae = SAE.load(write(tmp_path, config, t, pickled))
    assert (sae.cfg.hook_name, sae.cfg.architecture) == (IN, activation)
    x = torch.randn(60, D) * 3
    assert_computes(sae, x, *expected(config, t, x), atol=2e-5)


def test_topk_ranked_by_decoder_norm_rebuilds_the_same(tmp_path: Path) -> None:
    config = CONFIG | {"act_fn": "topk"}
    t = tensors(config)
    sae, x = SAE.load(write(tmp_path, config, t)), torch.randn(60, D) * 3
    f, x_hat = expected(config, t, x)
    torch.testing.assert_close(sae(x), x_hat.float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sae.encode(x), (f * t["W_D"].double().norm(dim=1)).float(), rtol=1e-5, atol=1e-5)


def test_a_transcoder_between_two_scales_without_a_bias(tmp_path: Path) -> None:
    config = CONFIG | {"hook_point_out": OUT, "use_decoder_bias": False}
    t = tensors(config)
    sae, x = SAE.load(write(tmp_path, config, t)), torch.randn(60, D) * 3
    assert (sae.cfg.transcoder, sae.cfg.hook_name_out) == (True, OUT)
    assert_computes(sae, x, *expected(config, t, x), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae_type": "crosscoder"}, "cannot read sae_type 'crosscoder'"),
        ({"use_glu_encoder": True}, "gated linear unit"),
        ({"act_fn": "batchtopk"}, "codes that depend on the batch"),
        ({"act_fn": "layertopk"}, "cannot read act_fn 'layertopk'"),
        ({"norm_activation": "batch-wise"}, "cannot read norm_activation 'batch-wise'"),
    ],
)
def test_what_cannot_be_read(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SteersmanError, match=message):
        SAE.load(write(tmp_path, CONFIG | change, tensors(CONFIG)))


def test_a_distributed_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "sae_weights.dcp").mkdir()
    with pytest.raises(SteersmanError, match="read by unpickling: save it with llamascopium"):
        SAE.load(tmp_path)
