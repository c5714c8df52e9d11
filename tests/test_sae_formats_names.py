"""Names of hook points and models, both ways."""

import pytest

from steersman.errors import SteersmanError
from steersman.sae.formats.names import (
    hook_in_path,
    to_hook_name,
    to_model_name,
    to_module_path,
    to_transformer_lens_model,
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


@pytest.mark.parametrize("model", ["gpt2", "EleutherAI/pythia-70m", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", ""])
@pytest.mark.parametrize("kind", ["hook_resid_post", "hook_mlp_out", "hook_attn_out"])
def test_there_and_back(model: str, kind: str) -> None:
    assert to_hook_name(to_module_path(f"blocks.7.{kind}", model), model) == f"blocks.7.{kind}"


def test_the_input_of_a_block_is_the_output_of_the_last() -> None:
    assert to_module_path("blocks.7.hook_resid_pre") == "layers.6"
    assert to_module_path("hook_embed", "gpt2") == "wte"
    for hook in ("blocks.7.attn.hook_z", "blocks.0.hook_resid_pre", "blocks.7.hook_resid_mid", "nothing"):
        with pytest.raises(SteersmanError, match="is not the output of a module"):
            to_module_path(hook)


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
    assert to_transformer_lens_model(long) == short


def test_folders() -> None:
    assert hook_in_path("runs/x/layers.10") == "blocks.10.hook_resid_post"
    assert hook_in_path("runs/x/h.3.mlp/seed2") == "blocks.3.hook_mlp_out"
    assert hook_in_path("runs/layers/x") == ""
