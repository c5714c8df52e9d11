"""The runtime contract of steering, end to end while generating."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import D, count_hooks, toy_sae, with_text

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig
from steersman.steer import MODES, Steerer

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12"]
SCOPES: list[Any] = [
    "all", "prompt", "generation", "last_prompt", "2:6", {5, 9, 30, 31, 32}, torch.tensor([0, 1, 0, 1, 1]) > 0,
]  # fmt: skip
VECTOR = torch.randn(D, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture(scope="module", params=["llama", "gpt2", "gptj", "gemma2"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """Plain, learned positions, a block that returns a tuple, and sliding windows with norms after the sublayers."""
    return with_text(request.param)


def tokens(lm: LanguageModel, prompts: list[str], steering: Any = None, **options: Any) -> list[list[int]]:
    """Generated tokens of each row, up to the end."""
    if steering is None:
        out = lm.generate(prompts, max_new_tokens=8, **options)
    else:
        with steering:
            out = lm.generate(prompts, max_new_tokens=8, **options)
    return [row[keep.bool()].tolist() for row, keep in zip(out.new_tokens, out.new_mask)]


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("mode", ["vector", "clamp"])
def test_cache_on_equals_cache_off(lm: LanguageModel, scope: Any, mode: str) -> None:
    def steering() -> Any:
        if mode == "vector":
            return Steerer(lm).vector(VECTOR, hook=HOOK, scope=scope)
        return Steerer(lm).features(toy_sae(), {3: 6.0, 8: 6.0}, mode="clamp", scope=scope)

    on, off = steering(), steering()
    with_cache = tokens(lm, PROMPTS, on)
    assert with_cache == tokens(lm, PROMPTS, off, use_cache=False)
    assert on.trace.pairs() == off.trace.pairs()
    assert on.trace.count == off.trace.count > 0
    if scope in ("all", "generation"):
        assert with_cache != tokens(lm, PROMPTS)


@pytest.mark.parametrize("mode", ["vector", *MODES])
@pytest.mark.parametrize("scope", ["all", "generation", "1:4"])
def test_a_batch_equals_its_rows_one_by_one(lm: LanguageModel, mode: str, scope: str) -> None:
    st, sae = Steerer(lm), toy_sae()
    strengths, ids = [6.0, 3.0, 0.5], [3, 8, 11]

    def steering(rows: list[int]) -> Any:
        if mode == "vector":
            v = torch.stack([VECTOR, -VECTOR, VECTOR.flip(0)])[rows]
            return st.vector(v, scale=[strengths[i] for i in rows], hook=HOOK, scope=scope)
        return st.features(sae, [{ids[i]: strengths[i], 20: 2.0} for i in rows], mode=mode, scope=scope)

    whole = steering([0, 1, 2])
    together = tokens(lm, PROMPTS, whole)
    counts = whole.trace.rows
    for i in range(3):
        alone = steering([i])
        assert tokens(lm, [PROMPTS[i]], alone) == [together[i]]
        assert alone.trace.count == counts[i]


def test_scale_zero_is_the_unsteered_output_bit_for_bit(lm: LanguageModel) -> None:
    batch = lm.encode(PROMPTS)
    clean, plain = lm.logits(batch.input_ids, batch.attention_mask), tokens(lm, PROMPTS)
    st = Steerer(lm)
    with st.vector(VECTOR, hook=HOOK, scale=5.0):
        assert not torch.equal(lm.logits(batch.input_ids, batch.attention_mask), clean)
        five = tokens(lm, PROMPTS)
    with st.vector(VECTOR, hook=HOOK, scale=0.0):  # after 5: still exactly nothing
        assert torch.equal(lm.logits(batch.input_ids, batch.attention_mask), clean)
        assert tokens(lm, PROMPTS) == plain != five
    with st.vector(VECTOR, hook=HOOK, scale=[0.0, 5.0, 0.0]) as ctx:
        mixed = lm.logits(batch.input_ids, batch.attention_mask)
    real = batch.attention_mask.bool()
    assert torch.equal(mixed[0][real[0]], clean[0][real[0]])
    assert torch.equal(mixed[2][real[2]], clean[2][real[2]])
    assert not torch.equal(mixed[1][real[1]], clean[1][real[1]])
    assert ctx.trace.rows == [0, 1, 0]


def test_every_row_of_the_batch_is_steered(lm: LanguageModel) -> None:
    """The edit reaches row 1 as it does row 0, whatever container the block returns."""
    batch = lm.encode(["w5 w6 w7", "w5 w6 w7"])
    with Steerer(lm).vector(VECTOR, hook=HOOK):
        rows = lm.logits(batch.input_ids)
    clean = lm.logits(batch.input_ids)
    torch.testing.assert_close(rows[0], rows[1])
    assert (rows - clean).abs().amax((1, 2)).min() > 1e-3


def test_teacher_forcing_gives_what_generating_gave(lm: LanguageModel) -> None:
    for scope in SCOPES[:4]:
        steering = Steerer(lm).vector(VECTOR, hook=HOOK, scope=scope)
        with steering:
            out = lm.generate(PROMPTS, max_new_tokens=8, eos_token_id=None)
        generated = steering.trace.pairs()
        with steering:
            logits = lm.logits(out.tokens, out.attention_mask, prompt_length=out.prompt_length)
        assert torch.equal(logits[:, out.prompt_columns - 1 : -1].argmax(-1), out.new_tokens)
        columns = int(out.attention_mask.shape[1])
        # the last generated token is fed only now
        assert [p for p in steering.trace.pairs() if p[1] != int(out.attention_mask[p[0]].sum()) - 1] == generated
        assert columns == out.prompt_columns + 8


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_follow_their_prompts(options: dict[str, Any]) -> None:
    lm = with_text("llama")
    st, scales = Steerer(lm), [0.0, 4.0, -4.0]
    together = tokens(lm, PROMPTS, st.vector(VECTOR, hook=HOOK, scale=scales), **options)
    per = options.get("num_return_sequences", 1)
    for i in range(3):
        alone = tokens(lm, [PROMPTS[i]], st.vector(VECTOR, hook=HOOK, scale=scales[i]), **options)
        assert together[i * per : (i + 1) * per] == alone
    assert together[:per] == tokens(lm, [PROMPTS[0]], **options)


def test_return_sequences_follow_their_prompts() -> None:
    lm = with_text("llama")
    loud = torch.zeros(2, D)
    loud[1] = VECTOR * 30
    with Steerer(lm).vector(loud, hook=HOOK, scale=[0.0, 1.0]):
        out = lm.generate(PROMPTS[:2], max_new_tokens=4, num_return_sequences=3, do_sample=True, top_k=1, seed=0)
    plain = lm.generate(PROMPTS[:2], max_new_tokens=4, num_return_sequences=3, do_sample=True, top_k=1, seed=0)
    assert torch.equal(out.tokens[:3], plain.tokens[:3])
    assert not torch.equal(out.tokens[3:], plain.tokens[3:])


def test_contexts_nest_and_unwind() -> None:
    lm, sae = with_text("llama"), toy_sae()
    st, ids = Steerer(lm), torch.tensor([[0, 5, 6]])
    h = lm.capture(ids, hooks=[HOOK])[HOOK]

    def out() -> torch.Tensor:
        return lm.capture(ids, hooks=[HOOK])[HOOK][0, 1:]

    d = sae.W_dec[3].detach()
    removed = h[0, 1:] - (h[0, 1:] @ d)[:, None] * d
    with st.vector(VECTOR, hook=HOOK) as outer:
        added = out()
        with st.features(sae, {3: 1.0}, mode="project_out") as inner:  # after the addition: d is gone altogether
            torch.testing.assert_close(out() @ d, torch.zeros(2), rtol=0, atol=1e-5)
        assert torch.equal(out(), added)
    with st.features(sae, {3: 1.0}, mode="project_out"), st.vector(VECTOR, hook=HOOK):
        torch.testing.assert_close(out(), removed + VECTOR, rtol=1e-5, atol=1e-5)
    assert outer.trace.count == 6  # three passes, each a text of its own, two tokens each
    assert inner.trace.count == 2
    with pytest.raises(RuntimeError, match="planned"), st.vector(VECTOR, hook=HOOK), st.features(sae, {3: 1.0}):
        raise RuntimeError("planned")
    assert torch.equal(out(), h[0, 1:])
    assert count_hooks(lm.model) == 0
    assert "generate" not in lm.model.__dict__


def test_a_context_that_cannot_attach_leaves_nothing() -> None:
    lm = with_text("llama")
    steering = Steerer(lm).vector({HOOK: VECTOR, "layers.2": VECTOR})
    steering.edits["blocks.9.hook_resid_post"] = steering.edits[HOOK]
    with pytest.raises(SteersmanError, match="no layer 9, the model has 3 layers"):
        steering.__enter__()
    assert count_hooks(lm.model) == 0


def test_a_context_may_be_used_again_but_not_twice_at_once() -> None:
    lm = with_text("llama")
    steering = Steerer(lm).vector(VECTOR, hook=HOOK)
    for _ in range(2):
        with steering:
            lm.logits(torch.tensor([[0, 5, 6]]))
        assert steering.trace.count == 2
    with steering, pytest.raises(SteersmanError, match="already open"):
        steering.__enter__()
    assert count_hooks(lm.model) == 0


def test_number_of_rows_must_fit() -> None:
    lm = with_text("llama")
    with (
        Steerer(lm).vector(VECTOR, hook=HOOK, scale=[1.0, 2.0]),
        pytest.raises(SteersmanError, match="the edit has 2 rows and the batch has 3"),
    ):
        lm.generate(PROMPTS, max_new_tokens=4)


record: Any = SimpleNamespace  # what it has besides is not of its type


def test_an_sae_or_vector_of_another_model_or_place() -> None:
    lm = with_text("llama")
    st = Steerer(lm)
    with pytest.raises(SteersmanError, match="this SAE was made for 'gpt2', the model is 'llama'"):
        st.features(toy_sae(model_name="gpt2"), {1: 1.0})
    st.features(toy_sae(model_name="org/Llama"), {1: 1.0})
    with pytest.raises(SteersmanError, match=r"made at 'blocks\.1\.hook_resid_post', not at 'blocks\.2"):
        st.features(toy_sae(), {1: 1.0}, hook="layers.2")
    with pytest.raises(SteersmanError, match="no layer 7, the model has 3 layers"):
        st.features(toy_sae(hook="blocks.7.hook_resid_post"), {1: 1.0})
    with pytest.raises(SteersmanError, match="records no hook point"):
        st.features(toy_sae(hook=""), {1: 1.0})
    st.features(toy_sae(hook=""), {1: 1.0}, hook="layers.1")
    wide = SAE(SAEConfig(d_in=24, d_sae=40, k=4, architecture="topk", hook_name=HOOK))
    with pytest.raises(SteersmanError, match="width 24, blocks.1.hook_resid_post of llama has width 16"):
        st.features(wide, {1: 1.0})
    with pytest.raises(
        SteersmanError, match="shape \\[5\\] has width 5, blocks.1.hook_resid_post of llama has width 16"
    ):
        st.vector(torch.zeros(5), hook=HOOK)
    with pytest.raises(SteersmanError, match="name the hook point"):
        st.vector(VECTOR)
    with pytest.raises(SteersmanError, match="made for 'gpt2', the model is 'llama'"):
        st.vector(record(hook_name=HOOK, vector=VECTOR, model_name="gpt2"))
    with pytest.raises(SteersmanError, match="made at 'blocks.1.hook_resid_post', not at 'blocks.2.hook_resid_post'"):
        st.vector(record(hook_name=HOOK, vector=VECTOR), hook="layers.2")
    with pytest.raises(SteersmanError, match="a vector is a tensor"):
        st.vector("north")  # pyright: ignore[reportArgumentType]
    assert list(st.vector(record(hook_name="layers.1", vector=VECTOR)).edits) == [HOOK]
