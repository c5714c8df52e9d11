"""Edits of single heads, and profiles of heads: what is planted in one head is found there, and nothing elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.planted_heads import KV, NO, PLANTED, WIDTH, YES, D, H, planted_heads
from support.tiny_models import with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import AttentionBiasEdit, EditSet, HeadEdit, Steerer, function_vector, intervene_on_heads, steered
from steersman.steer.analysis.heads import (
    HeadProfile,
    HeadStates,
    answer_probability,
    mean_heads,
    patch_heads,
    probe_heads,
    profile_heads,
    shared_heads,
)
from steersman.steer.edits.heads import head_shape, z_hook

Z = z_hook(1)
G = torch.Generator().manual_seed(2)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return planted_heads()


@pytest.fixture(autouse=True)
def _draws() -> None:
    """Every test draws the same words, whatever ran before."""
    G.manual_seed(7)


def words(n: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(10, 60, (n,), generator=G).tolist())


SHOWN = [f"{words(3)} {YES} {words(2)}" for _ in range(12)]
HIDDEN = [words(6) for _ in range(20)]


def z_and_out(lm: LanguageModel, edit: HeadEdit | None = None) -> tuple[Tensor, Tensor]:
    batch = lm.encode(SHOWN[:2])
    hooks = [Z, "blocks.1.hook_attn_out"]
    if edit is None:
        found = lm.capture(batch.input_ids, hooks=hooks)
    else:
        with Steerer(lm).edit(Z, edit, include_bos=True):
            found = lm.capture(batch.input_ids, hooks=hooks)
    return found[Z], found[hooks[1]]


def test_heads_are_query_heads_and_each_has_its_columns(lm: LanguageModel) -> None:
    assert head_shape(lm, Z) == (H, WIDTH)
    assert H != KV
    z, out = z_and_out(lm)
    W = lm.model.model.layers[1].self_attn.o_proj.weight
    for head in range(H):
        columns = slice(head * WIDTH, (head + 1) * WIDTH)
        v = torch.randn(WIDTH, generator=G)
        new, written = z_and_out(lm, HeadEdit.of(lm, Z, {head: v}))
        torch.testing.assert_close(new[..., columns], z[..., columns] + v)
        rest = torch.ones(D, dtype=torch.bool)
        rest[columns] = False
        assert torch.equal(new[..., rest], z[..., rest])
        torch.testing.assert_close(written - out, (W[:, columns] @ v).expand_as(out), rtol=1e-4, atol=1e-5)
        silent, written = z_and_out(lm, HeadEdit.of(lm, Z, [head], keep=0.0))
        assert silent[..., columns].abs().max() == 0
        torch.testing.assert_close(out - written, z[..., columns] @ W[:, columns].T, rtol=1e-4, atol=1e-5)
    patched, _ = z_and_out(lm, HeadEdit.of(lm, Z, {2: torch.ones(WIDTH)}, keep=0.0))
    torch.testing.assert_close(patched[..., 16:24], torch.ones_like(patched[..., 16:24]))
    half, _ = z_and_out(lm, HeadEdit.of(lm, Z, [1], keep=0.0, strength=0.5))
    torch.testing.assert_close(half[..., 8:16], z[..., 8:16] / 2)


def test_heads_that_are_not_there(lm: LanguageModel) -> None:
    for call, said in (
        (lambda: HeadEdit.of(lm, Z, [H]), f"no head {H} .* {H} \\(0 to {H - 1}\\)"),
        (lambda: HeadEdit.of(lm, Z, {0: torch.ones(WIDTH + 1)}), f"head 0 must be \\[{WIDTH}\\]"),
        (lambda: HeadEdit.of(lm, "blocks.1.hook_resid_post", [0]), "at a hook_z alone"),
        (lambda: Steerer(lm).edit(Z, HeadEdit(torch.ones(2, WIDTH))), f"heads 2 x {WIDTH}.* has {H} x {WIDTH}"),
        (lambda: HeadEdit(torch.ones(4)), r"\[H, d\] or \[R, H, d\]"),
        (lambda: HeadEdit(torch.ones(H, 2), torch.ones(3)), rf"keep must be \[{H}\]"),
        (lambda: HeadEdit(torch.full((H, 2), torch.nan)), "NaN"),
    ):  # fmt: skip
        with pytest.raises(SteersmanError, match=said):
            call()


def test_patching_finds_the_head_that_copies(lm: LanguageModel) -> None:
    means = mean_heads(lm, SHOWN)
    by_hand = torch.stack([lm.capture(lm.encode([text]).input_ids, hooks=[Z])[Z][0, -1] for text in SHOWN]).mean(0)
    torch.testing.assert_close(means[1].flatten(), by_hand)
    profile = patch_heads(lm, means, HIDDEN, [f" {YES}"] * len(HIDDEN), batch_size=5)
    assert profile.ranked()[0] == PLANTED
    assert PLANTED in profile.significant()
    effect, heldout = profile.of(PLANTED)
    assert heldout > 0.5 * effect
    hook, patched = z_hook(PLANTED[0]), {PLANTED[1]: means[PLANTED[0]][PLANTED[1]]}
    probability = answer_probability(lm, HIDDEN, [f" {YES}"] * len(HIDDEN))
    rise = -probability()
    with Steerer(lm).edit(hook, HeadEdit.of(lm, hook, patched, keep=0.0), scope="last_prompt") as steering:
        rise = rise + probability()
    assert steering.trace.count == len(HIDDEN)
    assert float(rise.mean()) == pytest.approx((effect + heldout) / 2, rel=1e-3)  # both halves, in a whole pass each
    with pytest.raises(SteersmanError, match="at least two tokens"):
        patch_heads(lm, means, [lm.tokenizer.bos_token] * 4, [YES] * 4)
    assert f"layer {PLANTED[0]:>3} head {PLANTED[1]:>3}" in profile.to_text(1)
    assert profile.n == len(HIDDEN)


def test_probing_finds_the_heads_that_hear(lm: LanguageModel) -> None:
    pairs = [[f"{words(4)} {side}" for _ in range(24)] for side in (YES, NO)]
    states = HeadStates(lm, *pairs)
    x, side = states.of(1)
    assert x.shape == (48, H, WIDTH)
    assert int(side.sum()) == 24
    profile = probe_heads(states, shuffles=300)
    both = {PLANTED, (PLANTED[0], PLANTED[1] + 1)}  # they share their keys and values
    assert set(profile.top(2)) == both
    assert set(profile.significant()) >= both
    assert all(min(profile.of(head)) > 0.9 for head in both)
    assert profile.null < 0.95
    assert profile.chance == 0.5
    nothing = probe_heads(HeadStates(lm, pairs[0][:12], pairs[0][12:]), shuffles=300)
    assert nothing.significant() == []
    with pytest.raises(SteersmanError, match="at least 4 examples"):
        HeadStates(lm, pairs[0][:3], pairs[1])


def test_any_edit_and_any_score(lm: LanguageModel) -> None:
    """PASTA's question: what does it change to edit one head alone? Here, to silence it."""
    probability = answer_probability(lm, SHOWN, [f" {YES}"] * len(SHOWN))
    calls = []

    def silence(layer: int, head: int) -> Any:
        calls.append((layer, head))
        edit = {z_hook(layer): HeadEdit.of(lm, z_hook(layer), [head], keep=0.0)}
        return edit if head % 2 else Steerer(lm).edit(z_hook(layer), edit[z_hook(layer)])

    profile = profile_heads(lm, silence, lambda: -probability())
    assert calls == [(layer, head) for layer in range(2) for head in range(H)]
    assert profile.ranked()[0] == PLANTED
    idle = profile_heads(lm, lambda *_: {}, probability, layers=[1])
    assert float(idle.effect.abs().max()) == 0.0
    assert idle.significant() == []
    assert idle.layers == (1,)
    for score, said in (
        (lambda: torch.ones(3), "at least 4 and"),
        (lambda: torch.full((5,), torch.nan), "NaN"),
    ):
        with pytest.raises(SteersmanError, match=said):
            profile_heads(lm, silence, score)
    with pytest.raises(SteersmanError, match="2 prompts and 1 answers"):
        answer_probability(lm, ["w5", "w6"], ["w7"])


def test_attention_of_one_head_at_a_time(lm: LanguageModel) -> None:
    """PASTA's profile: each head alone looks more at the highlighted word, here the fourth of every text."""
    shown = [f"{words(3)} {YES} {words(2)}" for _ in range(40)]
    probability = answer_probability(lm, shown, [f" {YES}"] * len(shown), batch_size=40)

    def highlight(layer: int, head: int) -> Any:
        return {f"blocks.{layer}.hook_attn_mask": AttentionBiasEdit(2.0, keys=(4, 5), heads=[head])}

    profile = profile_heads(lm, highlight, probability)
    assert profile.ranked()[0] == PLANTED
    assert profile.significant() == [PLANTED]
    elsewhere = profile_heads(lm, lambda *at: _on(highlight(*at), (2, 3)), probability)
    assert PLANTED not in elsewhere.significant()


def _on(edits: dict[str, Any], keys: tuple[int, int]) -> dict[str, Any]:
    return {hook: AttentionBiasEdit(2.0, keys=keys, heads=edit.heads) for hook, edit in edits.items()}


def test_shared_heads_and_order() -> None:
    def of(*effects: float) -> HeadProfile:
        table = torch.tensor(effects, dtype=torch.float64).view(2, 2)
        return HeadProfile(measure="", layers=(3, 5), effect=table, heldout=table, null=0.5, chance=0.0, n=8)

    a, b, c = of(0.9, 0.1, 0.8, 0.1), of(0.2, 0.1, 0.9, 0.3), of(0.9, 0.8, 0.1, 0.1)
    assert a.ranked() == [(3, 0), (5, 0), (3, 1), (5, 1)]  # equal ones in the order of the model
    assert a.significant() == [(3, 0), (5, 0)]
    assert shared_heads([a, b, c], 2) == []
    assert shared_heads([a, b, c], 2, at_least=2) == [(3, 0), (5, 0)]
    assert shared_heads([a, b], 2) == [(5, 0)]
    with pytest.raises(SteersmanError, match="between 1 and the 4 heads"):
        a.top(5)
    with pytest.raises(SteersmanError, match="no profile"):
        shared_heads([], 2)


def test_inference_time_intervention_moves_the_heads_that_hear(tmp_path: Path) -> None:
    lm = planted_heads()
    sides = [[f"{words(4)} {side}" for _ in range(24)] for side in (YES, NO)]
    edits, profile = intervene_on_heads(lm, *sides, k=2, alpha=3.0)
    assert (edits.scope, edits.method, list(edits)) == ("last_prompt+generation", "iti", [Z])
    assert [row[:2] for row in edits.metadata["heads"]] == [list(head) for head in profile.top(2)]
    x, side = HeadStates(lm, *sides).of(1)
    edit, u = edits[Z], torch.zeros(WIDTH)
    assert isinstance(edit, HeadEdit)
    for head in range(H):
        v = edit.vectors[0, head]
        if (1, head) not in profile.top(2):
            assert float(v.abs().max()) == 0
            continue
        u = x[side, head].mean(0) - x[~side, head].mean(0)
        u = u / u.norm()
        torch.testing.assert_close(v, 3.0 * (x[:, head] @ u).std() * u, rtol=1e-4, atol=1e-5)
    prompts = [words(5) for _ in range(8)]
    probability = answer_probability(lm, prompts, [f" {YES}"] * 8)
    before = probability()
    with steered(edits, lm, scope=edits.scope) as steering:
        after = probability()
    assert after.mean() > before.mean() + 0.05  # what hears also says, here
    assert steering.trace.rows == [1] * 8  # the last token of each prompt
    with steered({Z: edit.scaled(-1.0)}, lm, scope=edits.scope):
        assert probability().mean() < before.mean()
    edits.save(tmp_path / "iti.safetensors")
    again = EditSet.load(tmp_path / "iti.safetensors")[Z]
    assert isinstance(again, HeadEdit)
    assert torch.equal(again.vectors, edit.vectors)
    probes, _ = intervene_on_heads(lm, *sides, k=1, direction="probe")
    found = probes[Z]
    assert isinstance(found, HeadEdit)
    assert float(torch.cosine_similarity(found.vectors[0, 2] + found.vectors[0, 3], u, 0)) > 0.5
    for settings, said in (
        ({"k": 99}, "between 1 and the 8 heads"),
        ({"direction": "pca"}, "mean or probe"),
        ({"k": 0}, "k must be at least 1"),
        ({"layers": 1}, "layers"),
    ):
        with pytest.raises(SteersmanError, match=said):
            intervene_on_heads(lm, *sides, **settings)


def test_a_function_vector_is_what_its_heads_write(lm: LanguageModel) -> None:
    post = "blocks.1.hook_resid_post"
    means = mean_heads(lm, SHOWN)
    v = function_vector(lm, SHOWN, [PLANTED, (0, 1)], hook=post)
    W = [lm.model.model.layers[i].self_attn.o_proj.weight for i in range(2)]
    expected = W[1][:, 16:24] @ means[1][2] + W[0][:, 8:16] @ means[0][1]
    torch.testing.assert_close(v.vector, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(v.vector, function_vector(lm, SHOWN, [PLANTED, (0, 1)], hook=post, means=means).vector)
    probability = answer_probability(lm, HIDDEN, [f" {YES}"] * len(HIDDEN))
    before = probability()
    alone = function_vector(lm, SHOWN, [PLANTED], hook=post)
    with Steerer(lm).vector(alone, scope="last_prompt"):
        assert probability().mean() > before.mean() + 0.1
    # At the last block, adding what the head writes is adding to its output.
    z = HeadEdit.of(lm, Z, {2: means[1][2]})
    with Steerer(lm).edit(Z, z, scope="last_prompt"):
        patched = probability()
    with Steerer(lm).vector(alone, scope="last_prompt"):
        torch.testing.assert_close(probability(), patched, rtol=1e-4, atol=1e-5)
    with pytest.raises(SteersmanError, match="at least one head"):
        function_vector(lm, SHOWN, [], hook=post)
    with pytest.raises(SteersmanError, match="residual stream, not at blocks.1.attn.hook_z"):
        function_vector(lm, SHOWN, [PLANTED], hook=Z)
    gemma = with_text("gemma2")
    with pytest.raises(SteersmanError, match="a norm or something else"):
        function_vector(gemma, ["w5 w6"], [(0, 0)], hook=post)
