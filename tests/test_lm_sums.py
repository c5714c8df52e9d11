"""What a block adds is measured: factors, modules inside and after a sublayer, what adds up to nothing known."""

import copy
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import LAYERS, LLAMA, D, V, build, count_hooks, word_tokenizer
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.final_norm import norm_gain

IDS = torch.randint(4, V, (2, 7), generator=torch.Generator().manual_seed(1))
KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def filled(model: nn.Module) -> LanguageModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return LanguageModel(model.eval())


def granite(**settings: Any) -> LanguageModel:
    config = transformers.GraniteConfig(**LLAMA, residual_multiplier=0.22, **settings)
    return filled(transformers.GraniteForCausalLM(config))


def parts(lm: LanguageModel, layer: int = 1) -> list[Tensor]:
    got = lm.capture(IDS, hooks=[f"blocks.{layer}.hook_{kind}" for kind in KINDS])
    return list(got.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_multiplies_is_the_product(dtype: torch.dtype) -> None:
    lm = granite()
    lm.model.to(dtype)
    point = lm.hook_point("blocks.1.hook_mlp_out")
    assert point.factor == 0.22
    pre, attn, mlp, post = (x.float() for x in parts(lm))
    torch.testing.assert_close(pre + attn + mlp, post, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    module = "model.layers.1.mlp"
    assert lm.resolve_hook(module) == module  # what the module returns is another tensor
    torch.testing.assert_close(lm.capture(IDS, hooks=[module])[module].float() * 0.22, mlp, rtol=0.01, atol=1e-3)


def test_an_edit_of_a_product_is_what_the_block_adds() -> None:
    lm = granite()
    mlp, post = "blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"
    clean = lm.capture(IDS, hooks=[post])[post]
    with lm.edit(mlp, lambda h, fwd: h + 1):
        torch.testing.assert_close(lm.capture(IDS, hooks=[post])[post], clean + 1, rtol=1e-4, atol=1e-4)
    with lm.edit(mlp, lambda h, fwd: h):
        assert torch.equal(lm.capture(IDS, hooks=[post])[post], clean)


def test_a_layout_that_matches_half_is_not_taken() -> None:
    config = transformers.AfmoeConfig(
        **{**LLAMA, "num_key_value_heads": 2}, head_dim=8, moe_intermediate_size=8, num_experts=4,
        num_experts_per_tok=2, num_shared_experts=1, sliding_window=4,
    )  # fmt: skip
    lm = filled(transformers.AfmoeForCausalLM(config))
    for layer in range(LAYERS):
        pre, attn, mlp, post = parts(lm, layer)
        torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-4, atol=1e-4)


class Third(nn.Module):
    """A block that adds a third thing beside its sublayers."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.self_attn: nn.Module = block.self_attn
        self.mlp: nn.Module = block.mlp
        self.input_layernorm: nn.Module = block.input_layernorm
        self.post_attention_layernorm: nn.Module = block.post_attention_layernorm
        self.third = nn.Linear(D, D)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        attn, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        mid = hidden_states + attn + self.third(hidden_states)
        return mid + self.mlp(self.post_attention_layernorm(mid))


def test_a_block_that_adds_a_third_thing_does_not_offer_what_does_not_add_up() -> None:
    model = build("llama").model
    model.model.layers[1] = Third(model.model.layers[1])
    lm = filled(model)
    assert "blocks.1.hook_attn_out" not in lm.hook_names()
    with pytest.raises(SteersmanError, match=r"has no hook_attn_out \(what the block adds is no multiple") as error:
        lm.capture(IDS, hooks=["blocks.1.hook_attn_out"])
    assert "\n" not in str(error.value)
    assert {"blocks.0.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"} <= {*lm.hook_names()}
    path = "model.layers.1.self_attn"
    assert lm.capture(IDS, hooks=[path])[path].shape == (2, 7, D)  # as what it is


def test_the_measurement_changes_nothing_and_passes_users_by() -> None:
    lm = build("llama")
    ran: list[nn.Module] = []
    handle = lm.blocks[1].register_forward_hook(lambda module, args, out: ran.append(module))
    lm.model.train()
    modes, weights = [m.training for m in lm.model.modules()], copy.deepcopy(lm.model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with lm.edit(0, lambda h, fwd: h * 0):
        lm.resolve_hook("blocks.1.hook_mlp_out")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in lm.model.modules()] == modes
    assert all(torch.equal(value, lm.model.state_dict()[name]) for name, value in weights.items())
    assert ran == []
    assert count_hooks(lm.model) == 1
    handle.remove()


def test_several_streams_are_refused_with_their_shape() -> None:
    config = transformers.Gemma3nTextConfig(
        **{**LLAMA, "num_hidden_layers": 2, "intermediate_size": [24, 24]}, head_dim=8, vocab_size_per_layer_input=V,
        hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0] * 2, sliding_window=4,
    )  # fmt: skip
    lm = filled(transformers.Gemma3nForCausalLM(config))
    with pytest.raises(SteersmanError, match=r"holds a tensor \(4, 2, 7, 16\) in this model, not one state of width"):
        lm.capture(IDS, hooks=[1])
    with pytest.raises(SteersmanError, match=r"\(4, 2, 7, 16\)"), lm.edit(1, lambda h, fwd: h + 1):
        lm.logits(IDS)
    assert "blocks.1.hook_resid_post" not in lm.hook_names()


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm(8),
        transformers.models.nemotron.modeling_nemotron.NemotronLayerNorm1P(8),
        transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNorm(8),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_the_gain_of_a_norm_is_measured(norm: nn.Module) -> None:
    weight: Any = norm.weight
    with torch.no_grad():
        weight.copy_(torch.linspace(0.5, 2.0, 8))
    plus = type(norm).__name__ not in ("LayerNorm", "RMSNorm")
    torch.testing.assert_close(norm_gain(norm), weight.detach() + plus, rtol=1e-3, atol=1e-3)


def test_a_final_norm_of_another_name_is_found_by_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steersman.lm.final_norm.FINAL_NORMS", ())
    for family, path in {"llama": "model.norm", "gpt2": "transformer.ln_f", "bert": None}.items():
        lm = build(family)
        assert lm.final_norm() is (None if path is None else lm.model.get_submodule(path))


def test_positions_of_families_that_keep_one_for_padding() -> None:
    config = transformers.RobertaConfig(
        hidden_size=D, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=V,
        max_position_embeddings=10, pad_token_id=1,
    )  # fmt: skip
    lm = filled(transformers.RobertaForMaskedLM(config))
    lm = LanguageModel(lm.model, word_tokenizer(cls_token="<s>", sep_token="<unk>", pad_token="<pad>"))
    assert lm.context_length == 8
    texts = ["w4 w5 w6 w7 w8", "w9 w10"]
    alone = [lm.capture(b.input_ids, b.attention_mask, hooks=[1])[1][0] for b in map(lm.encode, texts)]
    for side in ("left", "right"):
        batch = lm.encode(texts, padding_side=side)
        states = lm.capture(batch.input_ids, batch.attention_mask, hooks=[1])[1]
        for row, mask, expected in zip(states, batch.attention_mask.bool(), alone):
            torch.testing.assert_close(row[mask], expected, rtol=1e-4, atol=1e-5)
