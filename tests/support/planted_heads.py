"""A model of two layers in which one head alone does something, so that a profile of heads has a known answer."""

from typing import Any

import torch
import transformers

from steersman.lm import LanguageModel
from support.tiny_models import V, word_tokenizer

D, H, KV, WIDTH = 32, 4, 2, 8
PLANTED = (1, 2)
"""Layer and query head."""
YES, NO = "w7", "w9"


def planted_heads(*, copies: bool = True) -> LanguageModel:
    """Attention is uniform. `YES` and `NO` differ in the first coordinate of their embeddings alone, which the keys'
    head of `PLANTED` reads, and no other; of the two query heads that share it the other is the next one.

    `copies`: what `PLANTED` says makes `YES` likelier. All other heads write noise.
    """
    config = transformers.LlamaConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=KV, num_hidden_layers=2, intermediate_size=16,
        vocab_size=V, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        embed = model.model.embed_tokens.weight
        embed[:, 0] = 0
        yes, no = int(YES[1:]), int(NO[1:])
        embed[no] = embed[yes]
        embed[yes, 0], embed[no, 0] = 3.0, -3.0
        for block in model.model.layers:
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.v_proj.weight[:, 0] = 0
            block.self_attn.o_proj.weight *= 0.1
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight.zero_()
        layer, head = PLANTED
        attention = model.model.layers[layer].self_attn
        attention.v_proj.weight[head // (H // KV) * WIDTH, 0] = 4.0
        if copies:
            attention.o_proj.weight[:, head * WIDTH] = model.lm_head.weight[yes] * 3
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return LanguageModel(model, tokenizer, name="planted")
