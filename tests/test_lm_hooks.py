"""Hook points on every proven family: names, exact captures, one pass that stops early."""

import pytest
import torch
import transformers
from support.tiny_models import FAMILIES, GEMMA, LAYERS, D, V, build, count_hooks
from torch import nn

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.hooks import find_blocks


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[str, LanguageModel]:
    return request.param, build(request.param)


IDS = torch.randint(4, V, (2, 7), generator=torch.Generator().manual_seed(1))


def test_capture_equals_hidden_states_bit_for_bit(family: tuple[str, LanguageModel]) -> None:
    _, lm = family
    seen: dict[int, torch.Tensor] = {}

    def keep(i: int, out: object) -> None:
        seen[i] = out[0] if isinstance(out, tuple) else out  # pyright: ignore[reportArgumentType]

    handles = [block.register_forward_hook(lambda m, a, out, i=i: keep(i, out)) for i, block in enumerate(lm.blocks)]
    with torch.no_grad():
        states = lm.model(IDS, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    got = lm.capture(IDS, hooks=[f"blocks.{i}.hook_{k}" for i in range(LAYERS) for k in ("resid_pre", "resid_post")])
    for i in range(LAYERS):
        assert torch.equal(got[f"blocks.{i}.hook_resid_pre"], states[i])
        assert torch.equal(got[f"blocks.{i}.hook_resid_post"], seen[i])
        if i < LAYERS - 1:
            assert torch.equal(got[f"blocks.{i}.hook_resid_post"], states[i + 1])
    # transformers reports the last state after the final norm: the captured one comes before it
    last, norm = got[f"blocks.{LAYERS - 1}.hook_resid_post"], lm.final_norm()
    assert torch.equal(last if norm is None else norm(last), states[-1])


def test_parts_sum_to_the_block(family: tuple[str, LanguageModel]) -> None:
    name, lm = family
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    got = lm.capture(IDS, hooks=[f"blocks.{i}.hook_{k}" for i in range(LAYERS) for k in kinds])
    assert all(h.shape == (2, 7, D) for h in got.values())
    assert list(got) == [hook for hook in lm.hook_names() if hook in got]  # in the order of the pass
    for i in range(LAYERS):
        pre, attn, mlp, post = (got[f"blocks.{i}.hook_{k}"] for k in kinds)
        assert attn.abs().max() > 1e-3
        assert mlp.abs().max() > 1e-3
        if FAMILIES[name][4]:
            torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-4, atol=1e-5)


def test_pass_stops_after_the_last_hook_needed(family: tuple[str, LanguageModel]) -> None:
    _, lm = family
    ran: list[int] = []
    handles = [b.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(lm.blocks)]
    before = count_hooks(lm.model)
    lm.capture(IDS, hooks=["blocks.1.hook_attn_out", "blocks.0.hook_resid_post"])
    assert ran == [0, 1]
    ran.clear()
    lm.capture(IDS, hooks=["blocks.2.hook_resid_pre"])
    assert ran == [0, 1, 2][: len(ran)]
    assert count_hooks(lm.model) == before
    for handle in handles:
        handle.remove()


def test_edit_reaches_every_kind_of_hook_and_leaves_nothing(family: tuple[str, LanguageModel]) -> None:
    _, lm = family
    clean, before = lm.logits(IDS), count_hooks(lm.model)
    for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        name = f"blocks.1.hook_{kind}"
        old = lm.capture(IDS, hooks=[name])[name]
        with lm.edit(name, lambda h, now: h + 1):
            new = lm.capture(IDS, hooks=[name])[name]
            steered = lm.logits(IDS)
        assert torch.equal(new, old + 1)
        assert steered.shape == clean.shape
        assert not torch.equal(steered, clean)
    assert count_hooks(lm.model) == before
    assert "generate" not in lm.model.__dict__
    assert torch.equal(lm.logits(IDS), clean)


def test_module_paths_are_translated(family: tuple[str, LanguageModel]) -> None:
    name, lm = family
    path = FAMILIES[name][3]
    assert lm.hooks.path == path
    for given in (f"{path}.1", f"{path.rpartition('.')[2]}.1", "layers.1", "blocks.1.hook_resid_post"):
        assert lm.resolve_hook(given) == "blocks.1.hook_resid_post"
    assert lm.hook_layer("layers.1") == 1
    assert lm.hook_width("layers.1") == D


def test_sublayer_path_means_what_is_added_to_the_stream() -> None:
    assert build("llama").resolve_hook("model.layers.2.mlp") == "blocks.2.hook_mlp_out"
    gemma = build("gemma2")
    assert gemma.resolve_hook("layers.2.post_feedforward_layernorm") == "blocks.2.hook_mlp_out"
    assert gemma.resolve_hook("layers.2.mlp") == "model.layers.2.mlp"  # normalised again before it is added
    assert gemma.capture(IDS, hooks=["layers.2.mlp"])["layers.2.mlp"].shape == (2, 7, D)


def test_the_path_of_any_module_is_a_hook_point() -> None:
    """Named by its path where no other name is the same tensor, and placed where it runs."""
    lm = build("gemma2")
    path = "model.layers.1.mlp"
    point, seen = lm.hook_point("layers.1.mlp"), []
    assert (point.name, point.layer, point.width, point.kind) == (path, 1, D, "module")
    assert lm.hook_point("blocks.1.hook_mlp_in") < point < lm.hook_point("blocks.1.hook_mlp_out")
    assert lm.hook_point("model.embed_tokens") < lm.hook_point(0)
    assert lm.hook_point(LAYERS - 1) < lm.hook_point("model.norm") < lm.hook_point("logits")
    assert lm.hook_width("layers.0.mlp.up_proj") == 24
    handle = lm.model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    got = lm.capture(IDS, hooks=["layers.1.mlp"])["layers.1.mlp"]
    handle.remove()
    assert torch.equal(got, seen[0])
    norm = lm.model.get_submodule("model.layers.1.post_feedforward_layernorm")
    out = "blocks.1.hook_mlp_out"
    with lm.edit("layers.1.mlp", lambda h, fwd: h + 1):
        torch.testing.assert_close(lm.capture(IDS, hooks=[out])[out], norm(got + 1))
    for wrong, message in {"model.layers": "runs 0 times", "model.rotary_emb": "does not return one state"}.items():
        with pytest.raises(SteersmanError, match=message):
            lm.resolve_hook(wrong)


def test_unknown_names_and_layers() -> None:
    lm = build("llama")
    with pytest.raises(SteersmanError, match=r"no layer 7, the model has 3 layers"):
        lm.resolve_hook("blocks.7.hook_resid_post")
    with pytest.raises(SteersmanError, match=r"no layer 3, the model has 3 layers"):
        lm.capture(IDS, hooks=["model.layers.3"])
    with pytest.raises(SteersmanError, match=r"no layer -1"), lm.edit("layers.-1", lambda h, now: h):
        pass
    with pytest.raises(SteersmanError, match=r"blocks\.1\.hook_resid_post"):
        lm.resolve_hook("blocks.1.hook_resid_pst")
    with pytest.raises(SteersmanError, match="at least one hook"):
        lm.capture(IDS, hooks=[])


def test_a_layer_may_be_given_by_its_number() -> None:
    lm, post = build("llama"), "blocks.{}.hook_resid_post".format
    assert [lm.resolve_hook(given) for given in (1, "1", -1, "-1")] == [post(i) for i in (1, 1, LAYERS - 1, LAYERS - 1)]
    assert lm.resolve_hooks(0) == [post(0)]
    assert lm.resolve_hooks([0, post(1)]) == [post(0), post(1)]
    got = lm.capture(IDS, hooks=[1, post(1)])
    assert torch.equal(got[1], got[post(1)])
    with lm.edit(-1, lambda h, fwd: h + 1):
        assert torch.equal(lm.capture(IDS, hooks=2)[2], build("llama").capture(IDS, hooks=post(2))[post(2)] + 1)
    for wrong in (3, -4, "17"):
        with pytest.raises(SteersmanError, match=rf"there is no layer {wrong}: the model has 3 layers"):
            lm.resolve_hook(wrong)
    for wrong in (None, 1.5, True, ["a"]):
        with pytest.raises(SteersmanError, match="named by a string or by a layer's number"):
            lm.resolve_hook(wrong)  # pyright: ignore[reportArgumentType]


def test_multimodal_nesting() -> None:
    text = transformers.Gemma3TextConfig(**GEMMA)
    vision = transformers.SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    lm = LanguageModel(transformers.Gemma3ForConditionalGeneration(config).eval())
    assert lm.hooks.path == "model.language_model.layers"
    assert lm.capture(IDS, hooks=["layers.2"])["layers.2"].shape == (2, 7, D)
    assert lm.resolve_hook("language_model.layers.0") == "blocks.0.hook_resid_post"


class Trunk(nn.Module):
    def __init__(self, *lengths: int) -> None:
        super().__init__()
        for i, n in enumerate(lengths):
            setattr(self, f"stack{i}", nn.ModuleList(nn.Identity() for _ in range(n)))


def test_blocks_are_found_by_their_number_or_named() -> None:
    assert find_blocks(Trunk(2, 5), n_layers=5)[0] == "stack1"
    assert find_blocks(Trunk(5, 5), n_layers=5, path="stack0")[0] == "stack0"
    with pytest.raises(SteersmanError, match=r"stack0 \(5\), stack1 \(5\)"):
        find_blocks(Trunk(5, 5), n_layers=5)
    with pytest.raises(SteersmanError, match="not a ModuleList"):
        find_blocks(Trunk(5), n_layers=5, path="stack9")
