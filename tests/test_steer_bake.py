"""Edits written into weights: the folder, opened anew, gives the steered logits; what cannot be exact is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import D, build, toy_sae, word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from steersman import SteeringVector
from steersman.cli import main
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import AffineEdit, DirectionEdit, Edit, FunctionEdit, HeadEdit, Steerer, VectorEdit, ablate, bake
from steersman.steer.edits import FeatureEdit
from steersman.steer.edits.file import EditSet
from steersman.steer.edits.rules import RULES

IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 10], [0, 11, 12, 13, 14, 15, 16]])
G = torch.Generator().manual_seed(0)


def random(*shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=G) * size


def with_text(family: str) -> LanguageModel:
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return LanguageModel(build(family).model, tokenizer, name=family)


def steered(lm: LanguageModel, edits: dict[str, Edit]) -> Tensor:
    from steersman.steer.steering import Steering

    scope = Steerer(lm).edit("blocks.0.hook_resid_post", VectorEdit(torch.zeros(D)), include_bos=True).scope
    with Steering(lm, edits, scope):
        return lm.logits(IDS)


def full(width: int) -> AffineEdit:
    matrix = torch.eye(width) + random(width, width, size=0.2)
    return AffineEdit.of_matrix(matrix, random(width), random(width))


def low(width: int) -> AffineEdit:
    return AffineEdit(write=random(width, 2), read=random(width, 2, size=0.3), mean=random(width))


CASES = [
    ("llama", "blocks.1.hook_mlp_out", lambda d: VectorEdit(random(d), 2.0)),
    ("llama", "blocks.1.hook_resid_post", lambda d: VectorEdit(random(d))),
    ("llama", "blocks.2.hook_resid_pre", lambda d: VectorEdit(random(d))),
    ("llama", "blocks.1.hook_resid_mid", lambda d: VectorEdit(random(d))),
    ("llama", "blocks.0.hook_resid_pre", low),
    ("llama", "blocks.1.attn.hook_z", lambda d: HeadEdit(random(2, d // 2), torch.tensor([0.0, 1.5]))),
    ("llama", "blocks.1.mlp.hook_post", full),
    ("gpt2", "blocks.2.hook_resid_post", lambda d: VectorEdit(random(d))),
    ("gpt2", "blocks.0.hook_resid_pre", full),
    ("gpt2", "blocks.1.hook_attn_out", low),
    ("gpt2", "blocks.1.attn.hook_z", lambda d: HeadEdit(random(2, d // 2))),
    ("gpt_neox", "blocks.1.hook_resid_post", lambda d: VectorEdit(random(d))),
    ("phi", "blocks.1.hook_mlp_out", full),
    ("opt", "blocks.0.hook_resid_pre", full),
    ("mistral", "blocks.1.hook_attn_out", lambda d: AffineEdit(write=random(d, 1), read=random(d, 1))),
    ("qwen3", "blocks.1.hook_attn_out", lambda d: VectorEdit(random(d))),
    ("gemma2", "blocks.0.hook_resid_pre", low),
]


@pytest.mark.parametrize(("family", "hook", "make"), CASES, ids=[f"{f}-{h}" for f, h, _ in CASES])
def test_the_folder_is_the_steered_model(family: str, hook: str, make: Any, tmp_path: Path) -> None:
    lm = with_text(family)
    edits: dict[str, Edit] = {hook: make(lm.hook_width(hook))}
    before = lm.digest()
    baked = bake(lm, edits, tmp_path / "out", include_bos=True)
    assert lm.digest() == before
    plain, expected = lm.logits(IDS), steered(lm, edits)
    assert (expected - plain).abs().max() > 0.1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-3, atol=2e-3)
    assert baked.difference < 2e-3 < baked.effect
    assert baked.changed
    record = json.loads((tmp_path / "out" / "steersman_bake.json").read_text())
    assert record == {"edits": {hook: type(edits[hook]).__name__}, "changed": list(baked.changed)}
    opened = LanguageModel.load(tmp_path / "out")
    assert opened.bos_token_id == lm.bos_token_id


def test_only_what_must_change_does(tmp_path: Path) -> None:
    lm = with_text("gpt2")
    baked = bake(lm, {"blocks.1.hook_resid_post": VectorEdit(random(D))}, tmp_path / "a", include_bos=True)
    assert baked.changed == ("transformer.h.1.mlp.c_proj.bias",)
    assert lm.model.lm_head.weight is lm.model.transformer.wte.weight
    baked = bake(lm, {"blocks.0.hook_resid_pre": VectorEdit(random(D))}, tmp_path / "b", include_bos=True)
    assert baked.changed == ("transformer.wte.weight",)  # the output layer keeps the old ones
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again.lm_head.weight, lm.model.lm_head.weight)
    assert not torch.equal(again.transformer.wte.weight, lm.model.transformer.wte.weight)
    llama = with_text("llama")
    baked = bake(llama, {"blocks.1.hook_resid_post": VectorEdit(random(D))}, tmp_path / "c", include_bos=True)
    assert baked.changed == ("model.layers.1.mlp.down_proj.bias",)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["mlp_bias"] is True


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi"])
def test_a_direction_is_gone_from_the_stream(family: str, tmp_path: Path) -> None:
    """Ablated at what writes to the stream, or at every point of it: the same weights, in which nothing writes it."""
    lm, v = with_text(family), random(D)
    bake(lm, ablate(lm, v), tmp_path / "writes", include_bos=True)
    u = v / v.norm()
    everywhere = [h for h in lm.hook_names() if "hook_resid" in h]
    projection = DirectionEdit(v, rule="scale", value=0.0)
    bake(lm, dict.fromkeys(everywhere, projection), tmp_path / "points", include_bos=True)
    baked, other = (LanguageModel.load(tmp_path / name) for name in ("writes", "points"))
    torch.testing.assert_close(baked.logits(IDS), other.logits(IDS), rtol=1e-4, atol=1e-3)
    states = baked.capture(IDS, hooks=everywhere)
    for hook, h in states.items():
        assert float((h @ u).abs().max()) < 1e-4, hook
    assert float((lm.capture(IDS, hooks=everywhere)[everywhere[-1]] @ u).abs().max()) > 0.1
    with pytest.raises(SteersmanError, match="passes by the blocks"):
        bake(lm, dict.fromkeys(everywhere[:-1], projection), tmp_path / "part", include_bos=True)
    assert not (tmp_path / "part").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("rule", list(RULES))
def test_edits_along_directions_say_whether_they_are_affine(rule: str) -> None:
    v, w = random(D), random(D)
    read: Any = v if rule == "rotate" else (w, 0.7)
    edit = DirectionEdit(read, v + w, rule=rule, value=1.5)
    found = edit.as_map(D)
    if rule not in ("add", "set", "scale", "project_out"):
        assert found is None
        return
    lm, point = with_text("llama"), "blocks.1.hook_resid_post"
    before = lm.capture(IDS, hooks=[point])[point]
    with Steerer(lm).edit(point, edit, include_bos=True):
        after = lm.capture(IDS, hooks=[point])[point]
    assert found is not None
    by_map = (before.double() if found.matrix is None else before.double() @ found.matrix.T) + found.offset
    torch.testing.assert_close(after.double(), by_map, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.1
    assert DirectionEdit(read, v + w, rule=rule, value=[1.0, 2.0]).as_map(D) is None
    if rule == "add":
        assert DirectionEdit(v, value=0.1, keep_norm=True).as_map(D) is None


@pytest.mark.parametrize(("mode", "k"), [("add", 8), ("project_out", 8), ("clamp", 8)])
def test_edits_of_features_too(mode: str, k: int) -> None:
    edit = FeatureEdit(toy_sae(k=k), {3: 2.0, 5: 0.5}, mode=mode)
    found, h = edit.as_map(D), random(4, D)
    if mode == "clamp":
        assert found is None
        return
    assert found is not None
    d = edit.sae.W_dec[[3, 5]].detach()
    if mode == "add":
        assert found.matrix is None
        torch.testing.assert_close(found.offset.float(), 2 * d[0] + 0.5 * d[1])
        return
    assert found.matrix is not None
    both = torch.linalg.lstsq(d.T, h.T).solution
    expected = h - (torch.tensor([[2.0], [0.5]]) * both).T @ d
    torch.testing.assert_close((h.double() @ found.matrix.T).float(), expected, rtol=1e-4, atol=1e-4)


def test_vectors_and_several_edits_at_once(tmp_path: Path) -> None:
    lm = with_text("llama")
    hooks = ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.2.hook_resid_pre"]
    edits: dict[str, Edit] = {
        hooks[3]: VectorEdit(random(D)), hooks[1]: full(D), hooks[0]: HeadEdit(random(2, 8)),
        hooks[2]: VectorEdit(random(D)),
    }  # fmt: skip
    bake(lm, edits, tmp_path / "a", include_bos=True)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "a")(IDS).logits
    torch.testing.assert_close(found, steered(lm, edits), rtol=1e-3, atol=2e-3)
    v = SteeringVector(directions={"blocks.0.hook_resid_post": random(D)}, model_name="llama")
    baked = bake(lm, v, tmp_path / "b", include_bos=True)
    assert "model.layers.0.mlp.down_proj.bias" in str(baked.changed)


def test_what_weights_cannot_do_is_refused(tmp_path: Path) -> None:
    lm, out, v = with_text("llama"), tmp_path / "out", VectorEdit(torch.ones(D))
    post = "blocks.1.hook_resid_post"

    def refused(said: str, edits: Any, lm: LanguageModel = lm, **options: Any) -> None:
        with pytest.raises(SteersmanError, match=said):
            bake(lm, edits, out, **{"include_bos": True, **options})
        assert not out.exists()

    refused("beginning-of-sequence token too", {post: v}, include_bos=False)
    refused("every token: an edit of scope 'generation'", {post: v}, scope="generation")
    refused("scope 'last_prompt'", EditSet(edits={post: v}, scope="last_prompt", include_bos=True))
    refused("another|was made for", EditSet(edits={post: v}, include_bos=True, model_name="gpt2"))
    refused("differs by row", {post: VectorEdit(torch.ones(2, D))})
    refused("not one affine map", {post: FunctionEdit(lambda h, _: h * 2)})
    refused("passes by the blocks", {post: full(D)})
    refused("not carried by a layer of its own", {"blocks.1.hook_mlp_in": v})
    refused("a norm or something else stands between", {"blocks.1.hook_mlp_out": v}, with_text("gemma2"))
    refused("has no bias.*mistral", {post: v}, with_text("mistral"))
    refused("has no bias.*qwen2", {post: v}, with_text("qwen2"))
    refused("not the sum of its embeddings", {"blocks.0.hook_resid_pre": v}, with_text("bloom"))
    with pytest.raises(SteersmanError, match=rf"\[{D}\] and not zero"):
        ablate(lm, torch.zeros(D))
    out.mkdir()
    (out / "x").touch()
    with pytest.raises(SteersmanError, match="not empty"):
        bake(lm, {post: v}, out, include_bos=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = with_text("llama")
    lm.model.save_pretrained(tmp_path / "llama")
    lm.tokenizer.save_pretrained(tmp_path / "llama")
    hook = "blocks.1.hook_resid_post"
    v = SteeringVector(directions={hook: random(D)}, model_name="llama")
    v.save(tmp_path / "v.safetensors")
    EditSet(edits={hook: VectorEdit(2 * v.vector)}, include_bos=True).save(tmp_path / "e.safetensors")
    model = ["bake", "--model", str(tmp_path / "llama"), "--out"]
    main([*model, str(tmp_path / "a"), "--vector", str(tmp_path / "v.safetensors"), "--scale", "2", "--include-bos"])
    assert "1 parameters changed" in capsys.readouterr().out
    main([*model, str(tmp_path / "b"), "--edits", str(tmp_path / "e.safetensors"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["changed"] == ["model.layers.1.mlp.down_proj.bias"]
    assert LanguageModel.load(tmp_path / "a").digest() == LanguageModel.load(tmp_path / "b").digest()
    for arguments, said in (
        (["--vector", str(tmp_path / "v.safetensors")], "include_bos|--include-bos"),
        ([], "either --vector or --edits"),
        (["--edits", "e", "--ablate"], "--ablate and --scale are for a --vector"),
        (["--vector", "v", "--ablate", "--scale", "2"], "leave out --scale"),
    ):
        with pytest.raises(SystemExit):
            main([*model, str(tmp_path / "c"), *arguments])
        assert re.search(said, capsys.readouterr().err)
        assert not (tmp_path / "c").exists()
