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

POST = {**HEADS, "intermediate_size": 24}
MOE = {**LLAMA, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
# Further layouts, for what depends on the layout alone: which hook points there are, and what they hold
LAYOUTS: dict[str, tuple[str, dict[str, Any], str, str, bool]] = {
    **FAMILIES,
    "gpt_neo": (
        "GPTNeoConfig", {"hidden_size": D, "num_layers": LAYERS, "num_heads": 2, "vocab_size": V, "window_size": 4,
                         "attention_types": [[["global", "local"], 1], [["global"], 1]]}, "GPTNeoForCausalLM",
        "transformer.h", True,
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT, "GPTBigCodeForCausalLM", "transformer.h", True),
    "codegen": ("CodeGenConfig", {**GPT, "n_head": 4, "rotary_dim": 4}, "CodeGenForCausalLM", "transformer.h", True),
    "mpt": (
        "MptConfig", {"d_model": D, "n_heads": 2, "n_layers": LAYERS, "vocab_size": V, "max_seq_len": 32},
        "MptForCausalLM", "transformer.blocks", True,
    ),
    "falcon_new": (
        "FalconConfig", {**HEADS, "new_decoder_architecture": True, "num_kv_heads": 1}, "FalconForCausalLM",
        "transformer.h", True,
    ),
    "opt_post": (
        "OPTConfig", {**HEADS, "ffn_dim": 24, "word_embed_proj_dim": D, "max_position_embeddings": 32,
                      "do_layer_norm_before": False}, "OPTForCausalLM", "model.decoder.layers", False,
    ),
    "glm4": ("Glm4Config", {**LLAMA, "head_dim": 8, "pad_token_id": 1}, "Glm4ForCausalLM", "model.layers", True),
    "olmo3": ("Olmo3Config", {**LLAMA, "sliding_window": 4}, "Olmo3ForCausalLM", "model.layers", True),
    "phi3": ("Phi3Config", {**LLAMA, "pad_token_id": 1}, "Phi3ForCausalLM", "model.layers", True),
    "stablelm": ("StableLmConfig", LLAMA, "StableLmForCausalLM", "model.layers", True),
    "stablelm_parallel": (
        "StableLmConfig", {**LLAMA, "use_parallel_residual": True}, "StableLmForCausalLM", "model.layers", True,
    ),
    "cohere": ("CohereConfig", LLAMA, "CohereForCausalLM", "model.layers", True),
    "starcoder2": ("Starcoder2Config", LLAMA, "Starcoder2ForCausalLM", "model.layers", True),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, "MixtralForCausalLM", "model.layers", True),
    "qwen2_moe": (
        "Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 8}, "Qwen2MoeForCausalLM", "model.layers", True,
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 8}, "Qwen3MoeForCausalLM", "model.layers", True),
    "roberta": ("RobertaConfig", POST, "RobertaForMaskedLM", "roberta.encoder.layer", False),
    "electra": ("ElectraConfig", {**POST, "embedding_size": D}, "ElectraForMaskedLM", "electra.encoder.layer", False),
    "distilbert": (
        "DistilBertConfig", {"dim": D, "n_heads": 2, "n_layers": LAYERS, "hidden_dim": 24, "vocab_size": V},
        "DistilBertForMaskedLM", "distilbert.transformer.layer", False,
    ),
}  # fmt: skip


def build(family: str, attention: str | None = None) -> LanguageModel:
    """A model with random weights; `attention` names its implementation, eager or sdpa."""
    config_class, arguments, model_class, _, _ = LAYOUTS[family]
    if attention is not None:
        arguments = {**arguments, "attn_implementation": attention}
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
