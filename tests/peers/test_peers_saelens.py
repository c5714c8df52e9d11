"""Checkpoints that SAELens writes, read by Steersman, and the other way round."""

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from sae_lens.synthetic.evals import mean_correlation_coefficient
from safetensors.torch import save_file
from support.helpers import make_sae

from steersman.sae import SAE, SAEConfig, TrainingState, compare_saes

D, L, K, D_OUT = 12, 48, 6, 10


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def fill(sae: Any) -> Any:
    g = generator()
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.5
        if "threshold" in name:
            parameter.data = parameter.data.abs()
    return sae


def inference(architecture: str, **options: Any) -> Any:
    kind, config = get_sae_class(architecture)
    metadata = sae_lens.saes.sae.SAEMetadata(
        hook_name="blocks.5.hook_resid_post", model_name="gpt2-small", neuronpedia_id="gpt2-small/5-res-jb"
    )
    if "transcoder" in architecture:
        options = {"apply_b_dec_to_input": False, "d_out": D_OUT} | options
    return fill(kind(config(d_in=D, d_sae=L, metadata=metadata, **options)))


def agree(sae: SAE, peer: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        f = peer.encode(x)
        assert (f > 0).any()
        torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(f), peer.decode(f), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), peer(x), rtol=1e-5, atol=5e-5)


ARCHITECTURES = {
    "standard": {},
    "topk": {"k": K},
    "jumprelu": {},
    "gated": {},
    "matching_pursuit": {"max_iterations": 7, "residual_threshold": 0.8},
    "transcoder": {},
    "skip_transcoder": {},
    "jumprelu_transcoder": {},
    "jumprelu_skip_transcoder": {},
}
NORMS = ["none", "layer_norm", "constant_norm_rescale"]


# A transcoder's b_dec belongs to its output.
SUBTRACT = [(name, subtract) for name in ARCHITECTURES for subtract in (True, False)[1 * ("transcoder" in name) :]]


@pytest.mark.parametrize(("architecture", "subtract"), SUBTRACT)
@pytest.mark.parametrize("norm", NORMS)
def test_what_saelens_saves_computes_the_same(architecture: str, norm: str, subtract: bool, tmp_path: Path) -> None:
    peer = inference(
        architecture, normalize_activations=norm, apply_b_dec_to_input=subtract, **ARCHITECTURES[architecture]
    )
    peer.save_model(tmp_path)
    sae = SAE.load(tmp_path)
    assert (sae.cfg.hook_name, sae.cfg.model_name) == ("blocks.5.hook_resid_post", "gpt2")
    assert sae.neuronpedia_url(3).endswith("gpt2-small/5-res-jb/3")
    x = torch.randn(100, D, generator=generator()) * 2 + 0.5
    agree(sae, sae_lens.SAE.load_from_disk(tmp_path), x)


@pytest.mark.parametrize("norm", NORMS)
def test_topk_ranked_by_decoder_norm(norm: str, tmp_path: Path) -> None:
    peer = inference("topk", k=K, rescale_acts_by_decoder_norm=True, normalize_activations=norm)
    peer.save_model(tmp_path)
    sae = SAE.load(tmp_path)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(L))
    agree(sae, peer, torch.randn(100, D, generator=generator()))


def test_attention_heads(tmp_path: Path) -> None:
    peer = inference("jumprelu", reshape_activations="none")
    peer.cfg.metadata.hook_name = "blocks.5.attn.hook_z"
    peer.cfg.reshape_activations = "hook_z"
    peer.save_model(tmp_path)
    sae, peer = SAE.load(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    x = torch.randn(7, 3, 4, generator=generator())
    torch.testing.assert_close(sae.encode(x), peer.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), peer(x), rtol=1e-5, atol=1e-5)


def training(architecture: str, **options: Any) -> Any:
    kind, config = get_sae_training_class(architecture)
    peer = fill(kind(config(d_in=D, d_sae=L, **options)))
    if hasattr(peer, "topk_threshold"):
        peer.topk_threshold.fill_(0.7)
    return peer


TRAINING = [
    ("standard", {}),
    ("gated", {}),
    ("jumprelu", {}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": False}),
    ("batchtopk", {"k": 5.5, "rescale_acts_by_decoder_norm": True}),
    ("batchtopk", {"k": 5.5, "rescale_acts_by_decoder_norm": False}),
    ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [8, 24, 48]}),
]


@pytest.mark.parametrize(("architecture", "options"), TRAINING)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_training_checkpoint_is_folded_as_saelens_folds_it(
    architecture: str, options: dict, scale: float | None, tmp_path: Path
) -> None:
    peer = training(architecture, normalize_activations="expected_average_only_in" if scale else "none", **options)
    peer.save_model(tmp_path / "training")
    if scale:
        (tmp_path / "training" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
        peer.fold_activation_norm_scaling_factor(scale)
    peer.save_inference_model(tmp_path / "final")
    finished = sae_lens.SAE.load_from_disk(tmp_path / "final")
    x = torch.randn(100, D, generator=generator())
    agree(SAE.load(tmp_path / "training"), finished, x)
    agree(SAE.load(tmp_path / "final"), finished, x)


def test_matryoshka_groups_survive(tmp_path: Path) -> None:
    training("matryoshka_batchtopk", k=K, matryoshka_widths=[8, 24, 48]).save_model(tmp_path)
    assert SAE.load(tmp_path).cfg.group_sizes == (8, 16, 24)


def test_a_matryoshka_step_loses_what_it_loses_in_saelens() -> None:
    """The sum over the nested SAEs, a mean over tokens; and the same gradients."""
    peer = training("matryoshka_batchtopk", k=K, matryoshka_widths=[8, 24, 48])
    sae = SAE(SAEConfig(d_in=D, d_sae=L, k=K, architecture="matryoshka", group_sizes=(8, 16, 24)))
    with torch.no_grad():
        sae.normalize_decoder()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(peer, name).copy_(getattr(sae, name))
        peer.b_dec += 0.1
        sae.b_dec += 0.1
    x = torch.randn(100, D, generator=generator())
    theirs = peer.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
    )
    step = sae.training_step(x, x, TrainingState())
    inner = sum(value for name, value in theirs.losses.items() if name.startswith("inner_mse_loss"))
    torch.testing.assert_close(step.losses["squared_error"] / 100, theirs.losses["mse_loss"])
    torch.testing.assert_close(step.losses["nested"] / 100, inner)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    found = torch.autograd.grad(step.loss / 100, [getattr(sae, name) for name in names])
    want = torch.autograd.grad(theirs.loss, [getattr(peer, name) for name in names])
    for name, mine, other in zip(names, found, want):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda m, at=name: f"{at} {m}")


OLD = [
    ("standard", {}),
    ("standard", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
    ("gated", {"normalize_activations": "layer_norm"}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": False}),
]


@pytest.mark.parametrize(("architecture", "fields"), OLD)
@pytest.mark.parametrize("ones", [True, False])
def test_configurations_from_before_version_6(architecture: str, fields: dict, ones: bool, tmp_path: Path) -> None:
    peer = inference(architecture)
    tensors = dict(peer.state_dict())
    if ones:
        tensors["scaling_factor"] = torch.ones(L)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    flat = {
        "d_in": D,
        "d_sae": L,
        "dtype": "float32",
        "hook_point": "blocks.5.hook_resid_post",
        "model_name": "gpt2-small",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(flat | {"architecture": architecture} | fields))
    sae = SAE.load(tmp_path)
    assert sae.cfg.hook_name == "blocks.5.hook_resid_post"
    agree(sae, sae_lens.SAE.load_from_disk(tmp_path), torch.randn(100, D, generator=generator()))


OURS = [
    ("topk", {}),
    ("topk", {"apply_b_dec_to_input": False}),
    ("topk", {"input_norm": "layer_norm"}),
    ("batch_topk", {}),
    ("jumprelu", {"input_norm": "constant_norm"}),
    ("relu", {}),
    ("gated", {}),
    ("matching_pursuit", {"options": {"stop_on_duplicate_support": False, "max_iterations": 9}}),
    ("matryoshka", {}),
    ("matryoshka_topk", {}),
    ("relu", {"transcoder": True, "d_out": D_OUT}),
    ("relu", {"transcoder": True, "d_out": D_OUT, "skip_connection": True}),
    ("jumprelu", {"transcoder": True}),
    ("batch_topk", {"transcoder": True, "skip_connection": True}),
]


@pytest.mark.parametrize(("activation", "options"), OURS)
def test_saelens_opens_what_we_save(activation: str, options: dict, tmp_path: Path) -> None:
    sae = make_sae(activation, d_in=D, d_sae=L, k=K, hook_name="blocks.5.hook_resid_post", model_name="gpt2", **options)
    sae.save(tmp_path)
    peer = sae_lens.SAE.load_from_disk(tmp_path)
    assert (peer.cfg.metadata.hook_name, peer.cfg.metadata.model_name) == ("blocks.5.hook_resid_post", "gpt2")
    agree(sae, peer, torch.randn(100, D, generator=generator()))


def test_their_mcc_is_that_of_signed_codes_here() -> None:
    """They compare |cosines| always, Steersman where the sign of a row means nothing."""
    a, b = (
        SAE(SAEConfig(d_in=D, d_sae=width, k=K, architecture="abs_topk"), torch.Generator().manual_seed(seed))
        for seed, width in ((1, L), (2, 2 * L))
    )
    theirs = mean_correlation_coefficient(a.W_dec.detach(), b.W_dec.detach())
    assert compare_saes(a, b).mcc == pytest.approx(theirs, abs=1e-5)
