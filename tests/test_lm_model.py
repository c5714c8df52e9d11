"""LanguageModel: encoding, capture, edits, and the model's own facts."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.tiny_models import D, V, build, count_hooks, with_text, word_tokenizer
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel

HOOK = "blocks.1.hook_resid_post"


def test_facts(lm: LanguageModel) -> None:
    assert (lm.n_layers, lm.d_model, lm.context_length, lm.dtype) == (3, D, 32, torch.float32)
    assert (lm.bos_token_id, lm.eos_token_id, lm.pad_token_id) == (0, 1, 3)
    w_u, norm = lm.unembed()
    assert w_u.shape == (D, V)
    ids = torch.tensor([[0, 5, 6]])
    last = lm.capture(ids, hooks=["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    assert norm is not None
    torch.testing.assert_close(norm(last) @ w_u, lm.logits(ids))


def test_names_of_one_model(lm: LanguageModel) -> None:
    named = LanguageModel(lm.model, name="google/gemma-2-2b")
    assert named.matches("gemma-2-2b")
    assert named.matches("models/Gemma-2-2b/")
    assert named.matches("")
    assert not named.matches("google/gemma-2-9b")
    assert LanguageModel(lm.model, name="openai-community/gpt2").matches("gpt2-small")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_left_and_right_padding_give_the_same_states(family: str) -> None:
    lm = with_text(family)
    texts = ["w5 w6 w7 w8", "w9", "w10 w11"]
    right, left = lm.encode(texts), lm.encode(texts, padding_side="left")
    assert right.attention_mask.tolist()[1] == [1, 1, 0, 0, 0]
    assert left.attention_mask.tolist()[1] == [0, 0, 0, 1, 1]
    a = lm.capture(right.input_ids, right.attention_mask, hooks=[HOOK])[HOOK][right.attention_mask.bool()]
    b = lm.capture(left.input_ids, left.attention_mask, hooks=[HOOK])[HOOK][left.attention_mask.bool()]
    alone = torch.cat([lm.capture(lm.encode([t]).input_ids, hooks=[HOOK])[HOOK][0] for t in texts])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a, alone, rtol=1e-4, atol=1e-5)


def test_capture_keeps_the_names_it_was_given_and_builds_no_graph(lm: LanguageModel) -> None:
    got = lm.capture(torch.tensor([[0, 5]]), hooks=["layers.0", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
    assert list(got) == ["layers.0", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    assert torch.equal(got["layers.0"], got["blocks.1.hook_resid_pre"])
    assert not got["layers.0"].requires_grad
    torch.nn.functional.linear(got["layers.0"], torch.ones(1, D, requires_grad=True)).sum().backward()  # trainable on


def test_edits_compose_in_order_of_entry_and_unwind(lm: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, 6]])
    h = lm.capture(ids, hooks=[HOOK])[HOOK]
    with lm.edit(HOOK, lambda h, now: h + 1):
        with lm.edit(HOOK, lambda h, now: h * 2):
            assert torch.equal(lm.capture(ids, hooks=[HOOK])[HOOK], (h + 1) * 2)
        assert torch.equal(lm.capture(ids, hooks=[HOOK])[HOOK], h + 1)
    with lm.edit(HOOK, lambda h, now: h * 2), lm.edit(HOOK, lambda h, now: h + 1):
        assert torch.equal(lm.capture(ids, hooks=[HOOK])[HOOK], h * 2 + 1)
    assert torch.equal(lm.capture(ids, hooks=[HOOK])[HOOK], h)
    assert count_hooks(lm.model) == 0


def test_edits_at_several_layers_and_gradients(lm: LanguageModel) -> None:
    v = torch.zeros(D, requires_grad=True)
    ids = torch.tensor([[0, 5, 6]])
    with lm.edit("layers.0", lambda h, now: h + v), lm.edit("layers.2", lambda h, now: h + v):
        lm.model(ids).logits.sum().backward()
    assert v.grad is not None
    assert v.grad.abs().sum() > 0
    lm.model.zero_grad()


@pytest.mark.parametrize("form", [None, tuple, list])
def test_what_a_block_returns_keeps_its_form_and_every_row(form: Callable[[Any], Any] | None) -> None:
    """Which blocks return a tensor and which a tuple changes with the release of transformers."""
    lm, ids = with_text("llama"), torch.tensor([[0, 5, 6], [0, 7, 8]])
    seen: list[Any] = []

    def unwrap(module: Any, args: Any, output: Any) -> Any:
        seen.append(output)
        return output if isinstance(output, Tensor) else output[0]

    for edited in (False, True):
        with ExitStack() as stack:
            if form is not None:
                made = lm.blocks[1].register_forward_hook(lambda module, args, output: form([output, "rest"]))
                stack.callback(made.remove)
            if edited:
                stack.enter_context(lm.edit(HOOK, lambda h, now: h + 1))
            stack.callback(lm.blocks[1].register_forward_hook(unwrap).remove)
            lm.logits(ids)
    before, after = seen
    assert type(before) is type(after) is (Tensor if form is None else form)
    if form is not None:
        assert after[1:] == before[1:] == form(["rest"])
        before, after = before[0], after[0]
    assert after.shape == (2, 3, D)
    assert torch.equal(after, before + 1)  # both rows, not batch row 0 alone


def test_edits_keep_dtype_and_shape() -> None:
    lm = LanguageModel(build("llama").model.to(torch.bfloat16))
    ids = torch.tensor([[0, 5, 6]])
    with lm.edit(HOOK, lambda h, now: h.float() + 1):
        assert lm.capture(ids, hooks=[HOOK])[HOOK].dtype == torch.bfloat16
    with lm.edit(HOOK, lambda h, now: h[0]), pytest.raises(SteersmanError, match=r"returned \(3, 16\)"):
        lm.logits(ids)


def test_an_edit_never_writes_in_place(lm: LanguageModel) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def remember(h: Tensor, now: ForwardPass) -> Tensor:
        kept.append((h, h.clone()))
        return h + 1

    with lm.edit(HOOK, remember), lm.edit(HOOK, lambda h, now: h * 3):
        lm.logits(torch.tensor([[0, 5, 6]]))
    assert torch.equal(*kept[0])


def test_bad_inputs(lm: LanguageModel) -> None:
    with pytest.raises(SteersmanError, match=r"\[batch, sequence\]"):
        lm.logits(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(SteersmanError, match="without a tokenizer"):
        LanguageModel(lm.model).encode(["w5"])
    with pytest.raises(SteersmanError, match="not a ModuleList"):
        LanguageModel(lm.model, blocks="model.norm")
    assert isinstance(LanguageModel(lm.model, blocks="model.layers").blocks, nn.ModuleList)
    with pytest.raises(SteersmanError, match="it is not a decoder"):
        LanguageModel(build("bert").model, word_tokenizer(cls_token="<s>", pad_token="<pad>")).generate("w5")
