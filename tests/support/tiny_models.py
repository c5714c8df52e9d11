"""Small random language models of every proven family, built from their configurations, with a tokenizer of words."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig

V, D, LAYERS = 61, 16, 3
HEADS = {"num_attention_heads": 2, "num_hidden_layers": LAYERS, "hidden_size": D, "vocab_size": V}
LLAMA: dict[str, Any] = {**HEADS, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 8, "sliding_window": 4}
GPT = {"n_embd": D, "n_layer": LAYERS, "n_head": 2, "vocab_size": V, "n_positions": 32}

# name -> (configuration class, its arguments, model class, path of the blocks, is a block the sum of its parts)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str, bool]] = {
    "gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel", "transformer.h", True),
    "gpt_neox": (
        "GPTNeoXConfig", {**HEADS, "intermediate_size": 24}, "GPTNeoXForCausalLM", "gpt_neox.layers", True,
    ),
    "gpt_neox_serial": (
        "GPTNeoXConfig", {**HEADS, "intermediate_size": 24, "use_parallel_residual": False}, "GPTNeoXForCausalLM",
        "gpt_neox.layers", True,
    ),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}, "GPTJForCausalLM", "transformer.h", True),
    "opt": (
        "OPTConfig", {**HEADS, "ffn_dim": 24, "word_embed_proj_dim": D, "max_position_embeddings": 32},
        "OPTForCausalLM", "model.decoder.layers", True,
    ),
    "llama": ("LlamaConfig", LLAMA, "LlamaForCausalLM", "model.layers", True),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 4}, "MistralForCausalLM", "model.layers", True),
    "qwen2": ("Qwen2Config", LLAMA, "Qwen2ForCausalLM", "model.layers", True),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 8}, "Qwen3ForCausalLM", "model.layers", True),
    "gemma2": ("Gemma2Config", GEMMA, "Gemma2ForCausalLM", "model.layers", True),
    "gemma3": ("Gemma3TextConfig", GEMMA, "Gemma3ForCausalLM", "model.layers", True),
    "phi": ("PhiConfig", {**LLAMA, "num_key_value_heads": 2}, "PhiForCausalLM", "model.layers", True),
    "olmo2": ("Olmo2Config", LLAMA, "Olmo2ForCausalLM", "model.layers", True),
    "falcon": ("FalconConfig", {**HEADS, "ffn_hidden_size": 24}, "FalconForCausalLM", "transformer.h", True),
    "falcon_serial": (
        "FalconConfig", {**HEADS, "parallel_attn": False, "alibi": True, "multi_query": False}, "FalconForCausalLM",
        "transformer.h", True,
    ),
    "bloom": ("BloomConfig", {"hidden_size": D, "n_layer": LAYERS, "n_head": 2, "vocab_size": V}, "BloomForCausalLM",
              "transformer.h", True),
    "bert": ("BertConfig", {**HEADS, "intermediate_size": 24}, "BertForMaskedLM", "bert.encoder.layer", False),
    "esm": (
        "EsmConfig", {**HEADS, "intermediate_size": 24, "pad_token_id": 1, "mask_token_id": 2,
                      "position_embedding_type": "rotary"}, "EsmForMaskedLM", "esm.encoder.layer", True,
    ),
}  # fmt: skip


def build(family: str) -> LanguageModel:
    config_class, arguments, model_class, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():  # default initialisation leaves the sublayers near zero, where nothing shows
            p.copy_(torch.randn_like(p) * 0.3)
    return LanguageModel(model, name=family)


def word_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """`<s>` 0, `</s>` 1, `<unk>` 2, `<pad>` 3, then w4 ... w60; `special` names which it declares."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3, **{f"w{i}": i for i in range(4, V)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def with_text(family: str) -> LanguageModel:
    """A decoder with a tokenizer that has BOS, EOS and padding."""
    lm = build(family)
    lm.model.generation_config.eos_token_id = 1
    return LanguageModel(lm.model, word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>"), name=family)


def toy_sae(hook: str = "blocks.1.hook_resid_post", model_name: str = "", k: int = 8) -> SAE:
    """A random SAE of width D with 40 features."""
    config = SAEConfig(d_in=D, d_sae=40, k=k, architecture="topk", hook_name=hook, model_name=model_name)
    return SAE(config, torch.Generator().manual_seed(0))


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
