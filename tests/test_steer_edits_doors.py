"""Any edit at any hook point keeps the runtime contract: scopes, rows, traces, padding, cache, nesting."""

import math
from typing import Any, cast

import pytest
import torch
from support.helpers import make_sae
from support.tiny_models import D, V, count_hooks, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, LanguageModel
from steersman.steer import AttentionBiasEdit, Edit, FunctionEdit, LogitsEdit, Steerer, Steering, VectorEdit, blend

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12"]
Z, POST, MASK = "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.1.hook_attn_mask"
MID, MLP_IN = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in"
IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])


@pytest.fixture(scope="module", params=["llama", "gpt2", "gptj", "gemma2", "mistral"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """Grouped keys, learned positions, blocks side by side, soft-capped logits, and a window of four tokens."""
    return with_text(request.param)


class Pull(Edit):
    """An edit from outside: half of h towards a fixed direction, stronger row by row."""

    def __init__(self, strength: list[float]) -> None:
        self.strength = torch.tensor(strength)
        self.rows = len(strength)
        self.active = self.strength != 0

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        pull = self.expand(self.strength, fwd).view(-1, *[1] * (h.ndim - 1))
        target = torch.linspace(-4, 4, h.shape[-1])
        return blend(h, h + pull * (target - h) / 2, where)


def edits(lm: LanguageModel, rows: list[int]) -> dict[str, tuple[str, Edit]]:
    """Name -> (hook point, edit with a strength for each of `rows`)."""
    strengths = [[1.0, 0.5, 0.75][row] for row in rows]
    width = lm.hook_width(POST)
    v = torch.randn(3, width, generator=torch.Generator().manual_seed(2)) * 2
    windows = torch.zeros(3, 9, dtype=torch.bool)
    windows[0, 1:3] = windows[1, :1] = windows[2, 2:6] = True
    found: dict[str, tuple[str, Edit]] = {
        "z": (Z, Pull(strengths)),
        "neurons": (POST, VectorEdit(v[rows], strengths)),
        "mlp_in": (MLP_IN, Pull(strengths)),
        "bias": (MASK, AttentionBiasEdit([4.0 * s for s in strengths], keys=windows[rows], heads=[1])),
        "away": (MASK, AttentionBiasEdit(-math.inf, keys=windows[rows])),
        "logits": ("logits", LogitsEdit([{7 + row: 40 * s, 30: 39 * s} for row, s in zip(rows, strengths)])),
    }
    if MID in lm.hook_names():
        found["mid"] = (MID, Pull(strengths))
    return found


NAMES = ["z", "neurons", "mlp_in", "mid", "bias", "away", "logits"]


def steering(lm: LanguageModel, name: str, rows: list[int], **options: Any) -> Steering:
    known = edits(lm, rows)
    if name not in known:
        pytest.skip("attention and MLP run side by side")
    return Steerer(lm).edit(*known[name], **options)


def tokens(lm: LanguageModel, prompts: list[str], context: Steering | None, **options: Any) -> list[list[int]]:
    if context is None:
        out = lm.generate(prompts, max_new_tokens=5, **options)
    else:
        with context:
            out = lm.generate(prompts, max_new_tokens=5, **options)
    return [row[keep.bool()].tolist() for row, keep in zip(out.new_tokens, out.new_mask)]


@pytest.mark.parametrize("scope", ["all", "generation", "last_prompt", "1:4"])
@pytest.mark.parametrize("name", NAMES)
def test_cache_on_equals_cache_off_and_a_batch_its_rows(lm: LanguageModel, name: str, scope: str) -> None:
    on, off = (steering(lm, name, [0, 1, 2], scope=scope) for _ in range(2))
    together = tokens(lm, PROMPTS, on)
    assert together == tokens(lm, PROMPTS, off, use_cache=False)
    assert on.trace.pairs() == off.trace.pairs()
    assert on.trace.count > 0
    for i in range(3):
        alone = steering(lm, name, [i], scope=scope)
        assert tokens(lm, [PROMPTS[i]], alone) == [together[i]]
        assert alone.trace.count == on.trace.rows[i]


@pytest.mark.parametrize("name", NAMES)
def test_left_and_right_padding_are_the_same(lm: LanguageModel, name: str) -> None:
    context = steering(lm, name, [0, 1, 2], include_bos=True)
    out = []
    for side in ("left", "right"):
        batch = lm.encode(PROMPTS, padding_side=side)
        clean = lm.logits(batch.input_ids, batch.attention_mask)[batch.attention_mask.bool()]
        with context:
            steered = lm.logits(batch.input_ids, batch.attention_mask)[batch.attention_mask.bool()]
        assert (steered - clean).abs().max() > 1e-2
        out.append(steered)
        assert context.trace.rows == [5, 2, 4]
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_no_strength_is_the_unsteered_output_bit_for_bit(lm: LanguageModel, name: str) -> None:
    batch = lm.encode(PROMPTS)
    real = batch.attention_mask.bool()
    clean = lm.logits(batch.input_ids, batch.attention_mask)
    with steering(lm, name, [0, 1, 2], gate=0.0):
        assert torch.equal(lm.logits(batch.input_ids, batch.attention_mask), clean)
    with steering(lm, name, [0, 1, 2], gate=[1.0, 0.0, 1.0], include_bos=True) as context:
        mixed = lm.logits(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(mixed[1][real[1]], clean[1][real[1]])
    assert (mixed[0][real[0]] - clean[0][real[0]]).abs().max() > 1e-2
    assert context.trace.rows == [5, 0, 4]
    assert count_hooks(lm.model) == 0


@pytest.mark.parametrize("name", NAMES)
def test_beams_follow_their_prompts(name: str) -> None:
    lm = with_text("llama")
    together = tokens(lm, PROMPTS, steering(lm, name, [0, 1, 2]), num_beams=2)
    for i in range(3):
        assert tokens(lm, [PROMPTS[i]], steering(lm, name, [i]), num_beams=2) == [together[i]]


def by_hand(lm: LanguageModel, removed: list[int], head: int) -> Tensor:
    """z of block 1 for IDS[:1] with keys taken from one head: softmax(q k / sqrt(d)) v, written out."""
    x = lm.capture(IDS[:1], hooks=["blocks.1.hook_attn_in"])["blocks.1.hook_attn_in"]
    attention: Any = lm.blocks[1].self_attn  # pyright: ignore[reportAttributeAccessIssue]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v = (p(x).view(1, 6, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    cos, sin = lm.model.model.rotary_emb(x, torch.arange(6)[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)  # two query heads share one head of keys
    scores = (q @ k.mT) / 8**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    for query in range(6):
        if any(key not in removed for key in range(query + 1)):
            scores[0, head, query, removed] = -torch.inf
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 6, D)


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("removed", [[2], [0, 1], [0, 3, 4]])
def test_a_key_taken_from_one_head_is_attention_without_it(head: int, removed: list[int]) -> None:
    lm = with_text("llama")
    with torch.no_grad():
        expected = by_hand(lm, removed, head)
    plain = lm.capture(IDS[:1], hooks=[Z])[Z]
    windows = [(key, key + 1) for key in removed]
    edit = AttentionBiasEdit(-math.inf, keys=windows, heads=[head])
    with Steerer(lm).edit(MASK, edit, include_bos=True):
        got = lm.capture(IDS[:1], hooks=[Z])[Z]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    other = slice(8, 16) if head == 0 else slice(0, 8)
    torch.testing.assert_close(got[..., other], plain[..., other], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_a_bias_of_log_a_multiplies_the_weight() -> None:
    """With base weight m on the chosen keys it becomes a m / (1 - m + a m)."""
    lm, a = with_text("gemma2"), 0.1
    lm.model.set_attn_implementation("eager")  # which returns the weights, and is not every version's default
    hook = "blocks.1.hook_attn_in"
    weights: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        weights.append(output[1])

    handle = lm.hook_point(hook).module.register_forward_hook(keep)
    lm.logits(IDS[:1])
    with Steerer(lm).edit(MASK, AttentionBiasEdit(math.log(a), keys=(1, 3), heads=[0]), include_bos=True):
        lm.logits(IDS[:1])
    handle.remove()
    before, after = weights
    m = before[0, 0, :, 1:3].sum(-1)
    torch.testing.assert_close(after[0, 0, :, 1:3].sum(-1), a * m / (1 - m + a * m), rtol=1e-4, atol=1e-6)
    assert torch.equal(after[0, 1], before[0, 1])


def test_logits_of_chosen_tokens_by_hand() -> None:
    lm = with_text("gemma2")
    clean = lm.logits(IDS)
    with Steerer(lm).edit("logits", LogitsEdit([{5: 2.0, 9: -math.inf}, {6: -1.0}])) as context:
        steered = lm.logits(IDS)
    expected = clean.clone()
    expected[0, 1:, 5] += 2
    expected[0, 1:, 9] = -math.inf
    expected[1, 1:, 6] -= 1
    assert torch.equal(steered, expected)
    assert context.trace.count == 10
    with Steerer(lm).edit("logits", LogitsEdit({9: -math.inf}), include_bos=True):
        assert all(9 not in row for row in tokens(lm, PROMPTS, None))


def test_functions_nest_and_are_scaled_between_nothing_and_themselves() -> None:
    lm = with_text("llama")
    st, clean = Steerer(lm), lm.logits(IDS)
    halve = FunctionEdit(lambda logits, fwd: logits / 2)
    with st.edit("logits", halve, include_bos=True), st.edit("logits", LogitsEdit({5: 1.0}), include_bos=True):
        both = lm.logits(IDS)
    expected = clean / 2
    expected[..., 5] += 1
    assert torch.equal(both, expected)
    for factor in (0.0, 0.5, 1.0, [1.0, 0.0]):
        with st.edit("logits", halve, gate=factor, include_bos=True):
            got = lm.logits(IDS)
        weight = torch.tensor(factor).view(-1, 1, 1)
        torch.testing.assert_close(got, clean * (1 - weight / 2))
    with st.edit("logits", halve.scaled(1.0), include_bos=True):
        assert torch.equal(lm.logits(IDS), clean / 2)


@pytest.mark.parametrize(
    "edit",
    [
        VectorEdit(torch.ones(D), [1.0, 2.0]),
        LogitsEdit({4: 1.0}, [1.0, 2.0]),
        AttentionBiasEdit([-1.0, -2.0], keys=(0, 2)),
        Pull([1.0, 2.0]),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_scaling_twice_is_scaling_by_the_product(edit: Edit) -> None:
    lm = with_text("llama")
    hook = {"LogitsEdit": "logits", "AttentionBiasEdit": MASK}.get(type(edit).__name__, "layers.1")
    out = []
    for scaled in (edit.scaled(3.0).scaled([0.5, 0.25]), edit.scaled([1.5, 0.75])):
        with Steerer(lm).edit(hook, scaled, include_bos=True):
            out.append(lm.logits(IDS))
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)
    with pytest.raises(SteersmanError, match="rows disagree"):
        edit.scaled([1.0, 2.0, 3.0])


@pytest.mark.parametrize("reshape", [True, False])
def test_features_of_an_sae_on_heads_and_neurons(reshape: bool) -> None:
    """An SAE at hook_z reads an ordinary hidden state of H d entries, whether or not it was given them head by head."""
    lm = with_text("llama")
    st = Steerer(lm)
    for hook in (Z, POST, MLP_IN, MID):
        heads: dict[str, Any] = {"reshape_heads": reshape} if hook == Z else {}
        sae = make_sae("relu", d_in=lm.hook_width(hook), d_sae=40, hook_name=hook, **heads)
        h = lm.capture(IDS, hooks=[hook])[hook]
        with st.features(sae, {3: 2.0}):
            added = lm.capture(IDS, hooks=[hook])[hook]
        d = sae.W_dec[3].detach()
        torch.testing.assert_close(added[:, 1:], h[:, 1:] + 2 * d, rtol=1e-5, atol=1e-5)
        assert torch.equal(added[:, 0], h[:, 0])
        with st.features(sae, {3: 5.0}, mode="clamp", measure=True) as context:
            clamped = lm.capture(IDS, hooks=[hook])[hook]
        f = sae.encode(h[:, 1:])[..., 3, None]
        torch.testing.assert_close(clamped[:, 1:], h[:, 1:] + (5 - f) * d, rtol=1e-4, atol=1e-4)
        assert context.report().n_tokens == 10


def test_where_an_edit_makes_no_sense_says_so_before_anything_runs() -> None:
    lm = with_text("llama")
    st = Steerer(lm)
    vector, bias = VectorEdit(torch.ones(D)), AttentionBiasEdit(-1.0, keys=(0, 2))
    with pytest.raises(SteersmanError, match="blocks.1.hook_attn_mask, an attention mask: use an AttentionBiasEdit"):
        st.edit(MASK, vector)
    with pytest.raises(SteersmanError, match=f"has width {D}, logits of llama has width {V}"):
        st.vector(torch.ones(D), hook="logits")
    with pytest.raises(SteersmanError, match="added at a hook_attn_mask, not at blocks.1.hook_resid_post"):
        st.edit("layers.1", bias)
    with pytest.raises(SteersmanError, match="edited at the hook point 'logits', not at blocks.1"):
        st.edit("layers.1", LogitsEdit({1: 1.0}))
    with pytest.raises(SteersmanError, match="no token 61: the vocabulary of llama has 61"):
        st.edit("logits", LogitsEdit({61: 1.0}))
    with pytest.raises(SteersmanError, match=r"heads \[0, 2\]: llama has 2"):
        st.edit(MASK, AttentionBiasEdit(-1.0, keys=(0, 2), heads=[0, 2]))
    with pytest.raises(SteersmanError, match="logits holds no hidden states"):
        st.features(make_sae("relu", d_in=V, d_sae=70, hook_name="logits"), {3: 1.0})
    with pytest.raises(SteersmanError, match="VectorEdit edits none"):
        st.edit("layers.1", vector, measure=True)
    st.vector(torch.ones(V), hook="logits")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionBiasEdit(math.inf, keys=(0, 2)), "bias must be finite"),
        (lambda: AttentionBiasEdit(math.nan, keys=(0, 2)), "bias must be finite"),
        (lambda: AttentionBiasEdit(1.0, keys=(2, 2)), "window 2:2 is empty"),
        (lambda: AttentionBiasEdit(1.0, keys=[]), "at least one window"),
        (lambda: AttentionBiasEdit(1.0, keys=cast("Any", "2:4")), "keys must be windows"),
        (lambda: AttentionBiasEdit(1.0, keys=torch.ones(1, 1, 2, 3)), r"must be \[P\], \[R, P\] or"),
        (lambda: AttentionBiasEdit(1.0, keys=(0, 2), heads=[]), "at least one head"),
        (lambda: AttentionBiasEdit([1.0, 2.0], keys=torch.ones(3, 4)), "rows disagree"),
        (lambda: LogitsEdit({}), "tokens must be"),
        (lambda: LogitsEdit({3: math.inf}), "a finite number, or -inf"),
        (lambda: LogitsEdit([{3: 1.0}, {4: 1.0}], factor=[1.0, 2.0, 3.0]), "rows disagree"),
    ],
)
def test_wrong_inputs(make: Any, message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        make()


def test_one_edit_at_several_hook_points() -> None:
    lm = with_text("llama")
    hooks = [f"blocks.{i}.hook_attn_mask" for i in range(3)]
    edit = AttentionBiasEdit(-math.inf, keys=(1, 2))
    with Steerer(lm).edit(hooks, edit) as context:
        steered = lm.logits(IDS)
    assert list(context.edits) == hooks
    changed = IDS.clone()
    changed[:, 1] = 40  # what no later token looks at makes no difference to them
    with Steerer(lm).edit(hooks, edit):
        torch.testing.assert_close(lm.logits(changed)[:, 2:], steered[:, 2:], rtol=1e-4, atol=1e-4)
