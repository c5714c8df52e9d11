"""Every kind of hook point on every layout: what it holds, that an edit there is what a capture there reads."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, LAYERS, LAYOUTS, D, V, build, count_hooks, with_text
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import KINDS, additive_mask
from steersman.train import cache_activations

IDS = torch.randint(4, V, (2, 7), generator=torch.Generator().manual_seed(1))
SIDE_BY_SIDE = ("gpt_neox", "gptj", "codegen", "phi", "falcon", "falcon_new", "stablelm_parallel", "cohere")
NORMALISES_ITS_SUMS = ("bert", "roberta", "electra", "distilbert", "opt_post")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
LEAST = torch.finfo(torch.float32).min


def missing(name: str) -> set[str]:
    """The kinds that a layout does not have."""
    found = {"hook_resid_mid"} if name in SIDE_BY_SIDE or name in NORMALISES_ITS_SUMS else set()
    return found | ({"hook_mlp_post"} if name in EXPERTS else set()) | ({"hook_attn_mask"} if name == "mpt" else set())


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> tuple[str, LanguageModel]:
    return request.param, build(request.param)


def test_the_kinds_of_each_layout(layout: tuple[str, LanguageModel]) -> None:
    name, lm = layout
    kinds = [kind for kind in KINDS if kind not in missing(name)]
    points = [lm.hook_point(hook) for hook in lm.hook_names()]
    assert [(p.layer, p.kind) for p in points] == [*((i, k) for i in range(LAYERS) for k in kinds), (LAYERS, "logits")]
    assert points == sorted(points)
    assert all(a < b and not b <= a for a, b in pairwise(points))
    for kind in missing(name):
        with pytest.raises(SteersmanError, match=f"block 1 of this model has no {kind}; it has hook_resid_pre, "):
            lm.resolve_hook(f"blocks.1.{kind}")


def test_shapes_and_widths(layout: tuple[str, LanguageModel]) -> None:
    _, lm = layout
    got = lm.capture(IDS, hooks=lm.hook_names())
    assert list(got) == lm.hook_names()
    for hook, h in got.items():
        point = lm.hook_point(hook)
        expected = (2, point.width, 7, 7) if point.kind == "hook_attn_mask" else (2, 7, point.width)
        assert h.shape == expected, hook
        assert point.width == lm.hook_width(hook)
        if point.shape == "B S D":
            assert point.width == D
    assert lm.hook_width("logits") == V
    assert torch.equal(got["logits"], lm.logits(IDS))


def test_the_stream_adds_up_at_its_middle(layout: tuple[str, LanguageModel]) -> None:
    name, lm = layout
    if "hook_resid_mid" in missing(name):
        return
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    hooks = [f"blocks.{i}.hook_{k}" for i in range(LAYERS) for k in kinds]
    for edited in (False, True):
        with ExitStack() as stack:
            if edited:
                stack.enter_context(lm.edit("blocks.1.hook_resid_mid", lambda h, fwd: h + 1))
            got = lm.capture(IDS, hooks=hooks)
        for i in range(LAYERS):
            pre, attn, mid, mlp, post = (got[f"blocks.{i}.hook_{k}"] for k in kinds)
            torch.testing.assert_close(pre + attn + (edited and i == 1), mid, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mid + mlp, post, rtol=1e-5, atol=1e-5)


def projection(lm: LanguageModel, hook: str) -> Callable[[Tensor], Tensor]:
    module = lm.hook_point(hook).module
    return module.forward


def test_heads_and_neurons_are_what_the_projections_read(layout: tuple[str, LanguageModel]) -> None:
    """z @ W_O (+ b_O) is what the attention returns, and so for the neurons; before any norm after the sublayer."""
    name, lm = layout
    hooks = [h for h in lm.hook_names() if lm.hook_point(h).kind in ("hook_z", "hook_mlp_post")]
    outputs: dict[str, Tensor] = {}

    def keep(hook: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.update({hook: output.clone()})

    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(lm.hook_point(hook).module.register_forward_hook(keep(hook)).remove)
        got = lm.capture(IDS, hooks=[*hooks, *(f"blocks.{i}.hook_attn_out" for i in range(LAYERS)), "logits"])
    for hook in hooks:
        made = projection(lm, hook)(got[hook])
        torch.testing.assert_close(made, outputs[hook].reshape(made.shape), rtol=1e-5, atol=1e-5)
    if name not in ("gemma2", "gemma3", "olmo2", "olmo3", "glm4"):
        for i in range(LAYERS):
            made = projection(lm, f"blocks.{i}.attn.hook_z")(got[f"blocks.{i}.attn.hook_z"])
            torch.testing.assert_close(made, got[f"blocks.{i}.hook_attn_out"], rtol=1e-5, atol=1e-5)


def test_an_edit_is_what_a_capture_reads_and_leaves_nothing(layout: tuple[str, LanguageModel]) -> None:
    _, lm = layout
    clean, before = lm.logits(IDS), count_hooks(lm.model)
    whole = lm.capture(IDS, hooks=lm.hook_names())
    for hook in (*(h for h in lm.hook_names() if lm.hook_layer(h) == 1), "logits"):
        kind, change = lm.hook_point(hook).kind, torch.ones(())
        if kind == "hook_attn_mask":  # the same for all keys would change nothing
            change = torch.arange(7.0)
        with lm.edit(hook, lambda h, fwd: h):
            assert torch.equal(lm.logits(IDS), clean), hook
        with lm.edit(hook, lambda h, fwd, change=change: h + change):
            again = lm.capture(IDS, hooks=[hook])[hook]
            steered = lm.logits(IDS)
        assert torch.equal(again, whole[hook] + change), hook
        assert not torch.equal(steered, clean), hook
        with lm.edit(hook, lambda h, fwd: h + 1), lm.edit(hook, lambda h, fwd: h * 2):
            assert torch.equal(lm.capture(IDS, hooks=[hook])[hook], (whole[hook] + 1) * 2), hook
    assert count_hooks(lm.model) == before
    assert torch.equal(lm.logits(IDS), clean)


@pytest.mark.parametrize("name", ["olmo2", "llama"])
def test_the_stream_and_what_the_mlp_reads_of_it_are_edited_apart(name: str) -> None:
    """OLMo 2's MLP reads the stream itself: one module input is two hook points, whichever is edited first."""
    lm = build(name)
    mid, mlp_in, post = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in", "blocks.1.hook_resid_post"
    clean = lm.capture(IDS, hooks=[mid, mlp_in, "blocks.1.hook_mlp_out", post])
    edits = [(mlp_in, lambda h, fwd: h * 0), (mid, lambda h, fwd: h + 1)]
    for order in (edits, edits[::-1]):
        with ExitStack() as stack:
            for hook, fn in order:
                stack.enter_context(lm.edit(hook, fn))
            got = lm.capture(IDS, hooks=[mid, mlp_in, "blocks.1.hook_mlp_out", post])
        assert torch.equal(got[mid], clean[mid] + 1)
        assert not got[mlp_in].any()
        torch.testing.assert_close(got[mid] + got["blocks.1.hook_mlp_out"], got[post])
    assert count_hooks(lm.model) == 0


def test_an_edit_between_attention_and_mlp_passes_gradients_and_keeps_what_it_was_given() -> None:
    lm, kept, v = build("llama"), [], torch.zeros(D, requires_grad=True)

    def remember(h: Tensor, fwd: object) -> Tensor:
        kept.append((h, h.clone()))
        return h + v

    with lm.edit("blocks.1.hook_resid_mid", remember), lm.edit("blocks.1.hook_resid_mid", lambda h, fwd: h * 3):
        lm.logits(IDS, grad=True).sum().backward()
    assert v.grad is not None
    assert v.grad.abs().sum() > 0
    assert torch.equal(*kept[0])
    lm.model.zero_grad()


def test_a_bare_pass_over_logits_only_keeps_no_graph() -> None:
    lm = build("llama")
    assert not lm.logits(IDS).requires_grad
    assert lm.logits(IDS, grad=True).requires_grad
    with torch.no_grad():
        assert not lm.logits(IDS, grad=True).requires_grad


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_mask_is_the_same_whatever_the_attention_is_given(name: str) -> None:
    """sdpa gets no mask, or one of bools; eager attention one of floats: a hook point reads the same from all."""
    hook = "blocks.1.hook_attn_mask"
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[0, :2] = 0
    for mask in (None, padded):
        masks = []
        for attention in ("eager", "sdpa"):
            try:
                lm = build(name, attention)
            except ValueError:
                continue  # a family without that implementation
            if hook not in lm.hook_names():
                return
            masks.append(lm.capture(IDS, mask, hooks=[hook])[hook])
        real = torch.ones(2, 7, dtype=torch.bool) if mask is None else padded.bool()
        for other in masks:
            rows = masks[0].transpose(1, 2)[real], other.transpose(1, 2)[real]
            assert torch.equal(rows[0] <= LEAST / 2, rows[1] <= LEAST / 2)
            torch.testing.assert_close(*(r.masked_fill(r <= LEAST / 2, LEAST) for r in rows))
        if name not in ("falcon_serial",):  # whose mask holds its position bias too
            assert set(masks[0].unique().tolist()) <= {0.0, LEAST}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [n for n in LAYOUTS if n not in ("mpt", "bloom", "falcon_serial")])
def test_a_mask_that_is_made_changes_nothing(name: str, attention: str) -> None:
    """An edit that returns the mask it was given as a new tensor: what None and bools stand for, and no more."""
    try:
        lm = build(name, attention)
    except ValueError:
        return
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[0, :2] = 0
    for mask in (None, padded):
        real = slice(None) if mask is None else mask.bool()
        clean = lm.logits(IDS, mask)[real]
        with ExitStack() as stack:
            for i in range(LAYERS):
                stack.enter_context(lm.edit(f"blocks.{i}.hook_attn_mask", lambda h, fwd: h.clone()))
            torch.testing.assert_close(lm.logits(IDS, mask)[real], clean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "gptj", "falcon", "qwen3"])
def test_masks_and_logits_under_the_cache(family: str) -> None:
    lm, seen = with_text(family), {"mask": [], "logits": []}

    def note(what: str) -> Callable[..., Tensor]:
        def look(h: Tensor, fwd: object) -> Tensor:
            seen[what].append((tuple(h.shape), fwd.positions.tolist()))  # pyright: ignore[reportAttributeAccessIssue]
            return h

        return look

    plain = lm.generate(["w5 w6 w7", "w8"], max_new_tokens=4, eos_token_id=None)
    with lm.edit("blocks.1.hook_attn_mask", note("mask")), lm.edit("logits", note("logits")):
        made = lm.generate(["w5 w6 w7", "w8"], max_new_tokens=4, eos_token_id=None)
    assert torch.equal(made.tokens, plain.tokens)
    heads = lm.hook_width("blocks.1.hook_attn_mask")
    assert [shape[:3] for shape, _ in seen["mask"]] == [(2, heads, 4), *[(2, heads, 1)] * 3]
    if family != "mistral":  # its window is 4 tokens long
        assert [shape[3] for shape, _ in seen["mask"]] == [4, 5, 6, 7]
    shapes = [shape for shape, _ in seen["logits"]]
    assert shapes[1:] == [(2, 1, V)] * 3
    assert [positions[1][-1] for _, positions in seen["logits"]] == [1, 2, 3, 4]
    assert all(len(positions[0]) == shape[1] for shape, positions in seen["logits"])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("blocks.2.attn.hook_z", "blocks.2.attn.hook_z"),
        ("blocks.2.hook_z", "blocks.2.attn.hook_z"),
        ("blocks.2.mlp.hook_post", "blocks.2.mlp.hook_post"),
        ("blocks.2.hook_mlp_post", "blocks.2.mlp.hook_post"),
        ("logits", "logits"),
    ],
)
def test_names_of_transformer_lens_and_ours(lm: LanguageModel, given: str, name: str) -> None:
    assert lm.resolve_hook(given) == name


@pytest.mark.parametrize(
    "given",
    [
        "blocks.2.ln1.hook_normalized",  # the gain may be in it or not
        "blocks.2.mlp.down_proj",  # a module has its own path
    ],
)
def test_names_of_no_hook_point(lm: LanguageModel, given: str) -> None:
    with pytest.raises(SteersmanError, match="unknown hook point"):
        lm.resolve_hook(given)


def test_widths_are_the_points_own(lm: LanguageModel) -> None:
    assert lm.hook_width("blocks.0.mlp.hook_post") == 24


def test_what_takes_no_mask_says_so() -> None:
    lm = build("llama")
    lm.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(SteersmanError, match=r"'flash_attention_2' takes no bias: load the model with"):
        lm.capture(IDS, hooks=["blocks.1.hook_attn_mask"])
    lm = build("llama")
    lm.tensor_parallel = True
    for hook in ("attn.hook_z", "mlp.hook_post", "hook_attn_mask"):
        with pytest.raises(SteersmanError, match="split over the ranks of a tensor-parallel model"):
            lm.edit(f"blocks.1.{hook}", lambda h, fwd: h).__enter__()
    lm.capture(IDS, hooks=["blocks.1.hook_mlp_out"])


def test_a_model_without_a_head_has_no_logits() -> None:
    lm = build("llama")
    bare = LanguageModel(lm.model.model)
    assert "logits" not in bare.hook_names()
    assert isinstance(bare.model, nn.Module)
    with pytest.raises(SteersmanError, match="unknown hook point 'logits'"):
        bare.capture(IDS, hooks=["logits"])


def test_rows_of_heads_and_neurons_are_cached_and_masks_are_not(tmp_path: Path) -> None:
    lm, hooks = with_text("llama"), ["blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_mid"]
    options: dict[str, Any] = {"tokens": 12, "context_length": 4, "batch_size": 2}
    store = cache_activations(lm, ["w5 w6 w7 w8"] * 8, hook=hooks, out=tmp_path / "a", **options)
    for hook in hooks:
        x = torch.cat([batch.x for batch in store.batches(4, hook=hook)])
        assert x.shape[1] == lm.hook_width(hook)
        assert x.abs().max() > 0
    with pytest.raises(SteersmanError, match=r"blocks\.1\.hook_attn_mask holds an attention mask, which has no row"):
        cache_activations(lm, ["w5"], hook="blocks.1.hook_attn_mask", out=tmp_path / "b", **options)


def test_the_mask_without_padding() -> None:
    x = torch.zeros(2, 3, 4)
    allowed = additive_mask(None, x, 2, past=2) == 0
    assert allowed[1, 1].tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert bool((additive_mask(None, x, 2, causal=False) == 0).all())
    assert additive_mask(None, x.bfloat16(), 1).dtype == torch.bfloat16


def test_every_proven_family_is_among_the_layouts() -> None:
    assert set(FAMILIES) < set(LAYOUTS)
