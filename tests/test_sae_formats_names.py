"""Names of hook points and models."""

import pytest

from steersman.sae.formats.names import (
    hook_in_path,
    to_hook_name,
    to_model_name,
)

PATHS = [
    ("layers.10", "", "blocks.10.hook_resid_post"),
    ("model.layers.10", "", "blocks.10.hook_resid_post"),
    ("model.layers.10.output", "", "blocks.10.hook_resid_post"),
    ("model.layers.10.input", "", "blocks.10.hook_resid_pre"),
    ("gpt_neox.layers.3.attention", "EleutherAI/pythia-70m", "blocks.3.hook_attn_out"),
    ("transformer.h.5.mlp", "gpt2", "blocks.5.hook_mlp_out"),
    ("h.0.attn", "gpt2", "blocks.0.hook_attn_out"),
    ("model.layers.9.self_attn.o_proj.input", "google/gemma-3-1b", "blocks.9.attn.hook_z"),
    ("model.layers.9.post_feedforward_layernorm.output", "google/gemma-3-1b", "blocks.9.hook_mlp_out"),
    ("layers.9.post_attention_layernorm", "google/gemma-2-2b", "blocks.9.hook_attn_out"),
    ("embed_tokens", "", "hook_embed"),
    ("transformer.wte", "", "hook_embed"),
    # What has no TransformerLens name stays as it is.
    ("layers.9.mlp", "google/gemma-2-2b", "layers.9.mlp"),
    ("layers.9.post_attention_layernorm", "meta-llama/Llama-3.1-8B", "layers.9.post_attention_layernorm"),
    ("layers.3.mlp.down_proj", "", "layers.3.mlp.down_proj"),
    ("lm_head", "", "lm_head"),
    ("blocks.1.attn.hook_z", "", "blocks.1.attn.hook_z"),
    ("", "", ""),
]


@pytest.mark.parametrize(("path", "model", "hook"), PATHS)
def test_module_paths(path: str, model: str, hook: str) -> None:
    assert to_hook_name(path, model) == hook


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("gpt2-small", "gpt2"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("somebody/gemma-2-2b-tuned", "somebody/gemma-2-2b-tuned"),
        ("unheard-of", "unheard-of"),
        ("", ""),
    ],
)
def test_models(short: str, long: str) -> None:
    assert to_model_name(short) == long


def test_folders() -> None:
    assert hook_in_path("runs/x/layers.10") == "blocks.10.hook_resid_post"
    assert hook_in_path("runs/x/h.3.mlp/seed2") == "blocks.3.hook_mlp_out"
    assert hook_in_path("runs/layers/x") == ""
