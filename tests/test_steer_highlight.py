"""Highlighting spans of prompts: attention masses in closed form, rows, padding, cache, heads."""

import math
from typing import Any

import pytest
import torch
import transformers
from support.runtime_contract import PROMPTS, check_contract, check_off
from support.tiny_models import build, count_hooks, with_text, word_tokenizer
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.offsets import text_offsets
from steersman.steer import AttentionBiasEdit, Steerer
from steersman.steer.dose import steered
from steersman.steer.edits.file import EditSet

SPANS = [["w6"], ["w9"], [(0, 3), "w12"]]
N, TEXT = 8, "w4 w5 w6 w7 w8 w9 w10"  # with the BOS eight tokens, each of which occurs once


def one_hot_model(attention: str) -> LanguageModel:
    """One layer of two heads whose values are one-hot in the token: z of a head is its attention, by token id."""
    width = 64
    config = transformers.LlamaConfig(
        hidden_size=width, head_dim=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
        vocab_size=61, intermediate_size=8, max_position_embeddings=32, rms_norm_eps=1e-12,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(61, width))
        attention_layer = model.model.layers[0].self_attn
        for p in (attention_layer.q_proj.weight, attention_layer.k_proj.weight):
            p.copy_(torch.randn_like(p) * 0.3)
        attention_layer.v_proj.weight.copy_(torch.eye(width).repeat(2, 1) / width**0.5)
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return LanguageModel(model, tokenizer, name="one-hot")


def weights_of(lm: LanguageModel, texts: list[str], context: Any = None) -> Tensor:
    """[B, H, S, 64]: what each query gives to the tokens of each id."""
    batch, hook = lm.encode(texts, padding_side="left"), "blocks.0.attn.hook_z"
    if context is None:
        z = lm.capture(batch.input_ids, batch.attention_mask, hooks=hook)[hook]
    else:
        with context:
            z = lm.capture(batch.input_ids, batch.attention_mask, hooks=hook)[hook]
    return z.unflatten(-1, (2, 64)).transpose(1, 2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_span_gets_m_over_m_plus_a_times_the_rest(attention: str) -> None:
    lm, a = one_hot_model(attention), 0.01
    st, span = Steerer(lm), [5, 9, 10]
    before = weights_of(lm, [TEXT])
    spans = ["w5", (15, len(TEXT))]
    after = weights_of(lm, [TEXT], st.highlight(TEXT, spans, heads=[(0, 1)], alpha=a))
    torch.testing.assert_close(before.sum(-1), torch.ones(1, 2, N), atol=1e-5, rtol=0)
    m = before[..., span].sum(-1)
    torch.testing.assert_close(after[:, 1, :, span].sum(-1), (m / (m + a * (1 - m)))[:, 1], rtol=1e-5, atol=1e-6)
    assert (after[:, 1] - before[:, 1]).abs().max() > 0.1
    twice = weights_of(lm, [TEXT], st.highlight(TEXT, spans, heads=[(0, 1)], alpha=a / 2))
    assert torch.equal(twice[:, 0], after[:, 0])  # what the other head does is no business of this one
    if attention == "eager":
        assert torch.equal(after[:, 0], before[:, 0])
    other = weights_of(lm, [TEXT], st.highlight(TEXT, spans, heads={0: [1]}, alpha=a, include=True))
    torch.testing.assert_close(other, after, rtol=1e-4, atol=1e-6)  # 1 / a inside is a outside, normalised
    rest = [token for token in range(64) if token not in [*span, 0]]
    spared = weights_of(lm, [TEXT], st.highlight(TEXT, spans, heads={0: [1]}, alpha=a, spare_bos=True))
    ratio = (spared[0, 1, -1, rest].sum() / spared[0, 1, -1, 0]) / (before[0, 1, -1, rest].sum() / before[0, 1, -1, 0])
    assert float(ratio) == pytest.approx(a, rel=1e-3)


def test_several_spans_are_one_union() -> None:
    """Two spans suppress what lies outside both by alpha, not by its square, and leave each other alone."""
    lm = one_hot_model("eager")
    st = Steerer(lm)
    both = weights_of(lm, [TEXT], st.highlight(TEXT, ["w5", "w8"], alpha=0.1))
    inner = weights_of(lm, [TEXT])
    factor = (both / inner)[0, 0, -1, [0, 4, 5, 6, 7, 8, 9, 10]]
    factor = factor / factor[2]
    torch.testing.assert_close(factor, torch.tensor([0.1, 0.1, 1, 0.1, 0.1, 1, 0.1, 0.1]), rtol=1e-4, atol=0)
    overlapping = weights_of(lm, [TEXT], st.highlight(TEXT, ["w5 w6", "w6 w7"], alpha=0.1))
    torch.testing.assert_close(overlapping, weights_of(lm, [TEXT], st.highlight(TEXT, "w5 w6 w7", alpha=0.1)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_runtime_contract(family: str) -> None:
    lm = with_text(family)
    st = Steerer(lm)

    def highlighted(rows: Any) -> Any:
        return st.highlight([PROMPTS[i] for i in rows], [SPANS[i] for i in rows], alpha=1e-3)

    check_contract(lm, highlighted)
    check_off(lm, st.highlight(list(PROMPTS), SPANS, alpha=1.0))
    check_off(lm, st.highlight(list(PROMPTS), SPANS, gate=0.0))
    check_off(lm, st.highlight(list(PROMPTS), [[], [], []]))
    assert count_hooks(lm.model) == 0


def test_generated_tokens_keep_their_attention() -> None:
    lm = with_text("llama")
    seen: list[Tensor] = []
    hook = "blocks.0.hook_attn_mask"
    with (
        Steerer(lm).highlight(PROMPTS[0], "w6 w7", heads={0: [0]}, alpha=0.5),
        lm.edit(hook, lambda h, fwd: (seen.append(h), h)[1]),
    ):
        lm.generate(PROMPTS[0], max_new_tokens=4, min_new_tokens=4)
    log = math.log(0.5)
    torch.testing.assert_close(seen[-1][0, 0, 0], torch.tensor([log, log, 0, 0, log, 0, 0, 0]))
    assert torch.equal(seen[-1][0, 1], torch.zeros(1, 8))


def test_a_row_without_a_span_is_left_alone() -> None:
    lm = with_text("llama")
    plain = lm.generate(list(PROMPTS), max_new_tokens=6).tokens
    with Steerer(lm).highlight(list(PROMPTS), [["w6"], [], ["w12"]], alpha=1e-3) as context:
        text = lm.generate(list(PROMPTS), max_new_tokens=6)
    assert torch.equal(text.tokens[1], plain[1])
    assert [context.trace.rows[i] > 0 for i in range(3)] == [True, False, True]


def test_a_table_of_keys_for_each_head() -> None:
    lm = one_hot_model("eager")
    table = torch.zeros(1, 2, N, dtype=torch.bool)
    table[0, 0, 3] = table[0, 1, 5] = True  # positions of w6 and w8
    before = weights_of(lm, [TEXT])
    hook = "blocks.0.hook_attn_mask"
    after = weights_of(lm, [TEXT], Steerer(lm).edit(hook, AttentionBiasEdit(math.log(3), table), include_bos=True))
    for head, token in ((0, 6), (1, 8)):
        m = before[0, head, -1, token]
        assert float(after[0, head, -1, token]) == pytest.approx(float(3 * m / (1 + 2 * m)), rel=1e-4)
    with pytest.raises(SteersmanError, match="a table of keys for 3 heads: one-hot has 2"):
        Steerer(lm).edit(hook, AttentionBiasEdit(1.0, torch.zeros(1, 3, N)))


def test_a_file_keeps_a_highlight(tmp_path: Any) -> None:
    lm = with_text("llama")
    st = Steerer(lm)
    with st.highlight(list(PROMPTS), SPANS, heads=[(0, 1), (2, 0)], alpha=1e-3) as context:
        wanted = lm.generate(list(PROMPTS), max_new_tokens=6).tokens
    EditSet(edits=context.edits, include_bos=True).save(tmp_path / "highlight.safetensors")
    again = EditSet.load(tmp_path / "highlight.safetensors")
    with steered(again, st, include_bos=True):
        assert torch.equal(lm.generate(list(PROMPTS), max_new_tokens=6).tokens, wanted)


def test_offsets_of_the_bundled_models_tokens() -> None:
    from steersman.demo import MODEL_PATH

    lm = LanguageModel.load(str(MODEL_PATH))
    text = "Once upon a time the naïve dog \N{GRINNING FACE} ran."
    offsets = text_offsets(lm, text)
    assert offsets.ids == lm.token_ids(text, bos=True)
    for piece in ("naïve", "dog", "\N{GRINNING FACE}", "upon a"):
        ids = [offsets.ids[i] for i in offsets.positions([piece])]
        assert lm.tokenizer.decode(ids).strip() == piece
    assert offsets.positions(["Once"]) == [1]  # the BOS holds no character
    assert offsets.positions(["o", (0, 4)]) == sorted({1, *offsets.positions(["o"])})


def test_spans_of_conversations() -> None:
    lm = with_text("llama")
    lm.tokenizer.chat_template = (
        "{{ '<s>' }}{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} w30{% endif %}"
    )
    talk = [{"role": "user", "content": "w5 w6"}]
    assert text_offsets(lm, talk).positions(["w6"]) == [2]
    with Steerer(lm).highlight([talk], [["w6"]], alpha=1e-3) as context:
        lm.generate([talk], max_new_tokens=2)
    assert context.trace.count > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w5 w6", "w7"), "the span 'w7' does not occur"),
        (("w5 w6", (3, 9)), "characters 3:9 are not in a prompt of 5"),
        (("w5 w6", " "), "more than white space"),
        (("w5 w6", [3]), "a span is a substring or a pair"),
        ((["w5", "w6"], ["w5"]), "2 prompts and the spans of 1"),
        (([[0, 5, 6]], [["w5"]]), "not as token ids"),
    ],
)
def test_wrong_spans(lm: LanguageModel, arguments: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        Steerer(lm).highlight(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"heads": {7: [0]}}, "heads of layer 7: llama has layers 0 to 2"),
        ({"heads": [(0, 2)]}, r"heads \[2\]: llama has 2"),
        ({"heads": []}, "at least one head"),
    ],
)
def test_wrong_settings(lm: LanguageModel, options: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        Steerer(lm).highlight("w5 w6", "w6", **options)


def test_attention_that_takes_no_bias_is_refused() -> None:
    lm = build("llama")
    lm = LanguageModel(lm.model, word_tokenizer(bos_token="<s>", eos_token="</s>"), name="llama")
    lm.config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(SteersmanError, match="'flash_attention_2' takes no bias: load the model with"),
        Steerer(lm).highlight("w5 w6", "w6"),
    ):
        pass
