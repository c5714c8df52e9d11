"""`SteeringVector`: arithmetic, applying it (also position by position), and its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_models import D, toy_sae, with_text

from steersman import SteeringVector
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import Steerer

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12"]
G = torch.Generator().manual_seed(1)
A, B = torch.randn(D, generator=G) * 3, torch.randn(D, generator=G) * 3
BY_POSITION = torch.randn(4, D, generator=G) * 3
V = SteeringVector.of(A, hook_name=HOOK, model_name="llama", method="diffmean", metadata={"n": 3})
W = SteeringVector.of(B, hook_name=HOOK, model_name="org/Llama", method="caa")
TWO = SteeringVector(directions={HOOK: A, OTHER: B}, model_name="llama")


def test_arithmetic() -> None:
    torch.testing.assert_close((V + W).vector, A + B)
    torch.testing.assert_close((V - W).vector, A - B)
    torch.testing.assert_close((2 * V / 4).vector, A / 2)
    assert (V * 3 * -1).metadata == {"n": 3, "factor": -3.0}
    assert V.metadata == {"n": 3}
    assert (V - W).method == "diffmean - caa"
    assert (V - W).metadata["of"][0] == V.provenance()
    assert V.norm() == pytest.approx(float(A.norm()))
    assert V.normalized().norm() == pytest.approx(1)
    assert V.cosine(W) == pytest.approx(float(torch.cosine_similarity(A, B, dim=0)), abs=1e-6)
    along = V.project(W)
    assert along.cosine(W) == pytest.approx(1 if V.dot(W) > 0 else -1)
    assert abs((V - along).cosine(W)) < 1e-6


def test_several_hook_points_are_one_vector() -> None:
    assert TWO.norm() == pytest.approx(float(torch.cat([A, B]).norm()))
    assert TWO.at(OTHER).vector.equal(B)
    both = V + SteeringVector.of(B, hook_name=OTHER)
    assert both.directions[OTHER].equal(B)
    assert both.cosine(TWO) == pytest.approx(1)
    assert V.dot(TWO) == pytest.approx(float(A @ A), rel=1e-5)
    with pytest.raises(SteersmanError, match="2 hook points"):
        _ = TWO.hook_name
    with pytest.raises(SteersmanError, match="2 hook points"):
        _ = TWO.vector
    with pytest.raises(SteersmanError, match="nothing at 'blocks.7"):
        TWO.at("blocks.7.hook_resid_post")


def test_wrong_vectors() -> None:
    with pytest.raises(SteersmanError, match="NaN or infinite"):
        SteeringVector.of(torch.tensor([1.0, float("nan")]), hook_name=HOOK)
    with pytest.raises(SteersmanError, match=r"must be \[D\]"):
        SteeringVector.of(torch.ones(2, 3, 4), hook_name=HOOK)
    with pytest.raises(SteersmanError, match="name the hook point"):
        SteeringVector.of(A, hook_name="")
    with pytest.raises(SteersmanError, match="at least one hook point"):
        SteeringVector(directions={})
    with pytest.raises(SteersmanError, match="JSON"):
        SteeringVector.of(A, hook_name=HOOK, metadata={"x": object()})
    zero = V - V
    for use in (zero.normalized, lambda: zero.cosine(V), lambda: V.project(zero)):
        with pytest.raises(SteersmanError, match="is zero, it has no direction"):
            use()
    with pytest.raises(SteersmanError, match="different widths at blocks.1.hook_resid_post: 16 and 5"):
        _ = V + SteeringVector.of(torch.ones(5), hook_name=HOOK)
    with pytest.raises(SteersmanError, match="different models: 'llama' and 'gpt2'"):
        _ = V + SteeringVector.of(A, hook_name=HOOK, model_name="gpt2")
    with pytest.raises(SteersmanError, match="share no hook point"):
        V.cosine(SteeringVector.of(A, hook_name=OTHER))
    with pytest.raises(SteersmanError, match="finite number"):
        _ = V * float("inf")
    with pytest.raises(SteersmanError, match="divided by 0"):
        _ = V / 0


def test_it_is_kept_apart_from_what_made_it() -> None:
    source, notes = A.clone(), {"list": [1]}
    v = SteeringVector.of(source, hook_name=HOOK, metadata=notes)
    source.zero_()
    notes["list"].append(2)
    assert v.vector.equal(A)
    assert v.metadata == {"list": [1]}


def test_random_like_has_the_norm_and_a_seed() -> None:
    r = TWO.random_like(3)
    assert r.at(OTHER).norm() == pytest.approx(float(B.norm()))
    assert r.directions[HOOK].equal(TWO.random_like(3).directions[HOOK])
    assert abs(r.cosine(TWO.random_like(4))) < 0.9


def test_feature_direction_equals_the_feature_edit(lm: LanguageModel) -> None:
    sae, ids = toy_sae(), torch.tensor([[0, 5, 6, 7]])
    with Steerer(lm).features(sae, {3: 2.5}):
        expected = lm.logits(ids)
    with SteeringVector.of_feature(sae, 3).apply(lm, scale=2.5):
        torch.testing.assert_close(lm.logits(ids), expected)
    with pytest.raises(SteersmanError, match="records no hook point"):
        SteeringVector.of_feature(toy_sae(hook=""), 3)


def test_apply_is_the_steerers_vector(lm: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, 6, 7]])
    with Steerer(lm).vector({HOOK: A, OTHER: B}, scale=0.7):
        expected = lm.logits(ids)
    with TWO.apply(Steerer(lm), scale=0.7):
        assert torch.equal(lm.logits(ids), expected)
    with Steerer(lm).vector([V, TWO], scale=0.7):  # one per row: row 0 has nothing at the second hook point
        both = lm.logits(ids.expand(2, -1))
    torch.testing.assert_close(both[1], expected[0])
    with Steerer(lm).vector(V, scale=0.7):
        torch.testing.assert_close(both[0], lm.logits(ids)[0])


def test_a_vector_of_another_width_model_or_hook_point(lm: LanguageModel) -> None:
    st = Steerer(lm)
    with pytest.raises(SteersmanError, match="has width 5, blocks.1.hook_resid_post of llama has width 16"):
        st.vector(SteeringVector.of(torch.ones(5), hook_name=HOOK))
    with pytest.raises(SteersmanError, match="made for 'gpt2', the model is 'llama'"):
        st.vector(SteeringVector.of(A, hook_name=HOOK, model_name="gpt2"))
    with pytest.raises(SteersmanError, match="no layer 7, the model has 3 layers"):
        st.vector(SteeringVector.of(A, hook_name="layers.7"))
    with pytest.raises(SteersmanError, match="made at 'blocks.1.hook_resid_post', not at 'blocks.2.hook_resid_post'"):
        st.vector(V, hook="layers.2")
    with pytest.raises(SteersmanError, match="row 1 of a list"):
        st.vector([V, SteeringVector.of(BY_POSITION, hook_name=HOOK)])


@pytest.mark.parametrize("scope", ["all", "prompt", "generation", "2:6"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_position_by_position(family: str, scope: str) -> None:
    """Row p at position p, whatever the padding and the cache, and nowhere else."""
    lm = with_text(family)
    st, v = Steerer(lm), SteeringVector.of(BY_POSITION, hook_name=HOOK)

    def made(prompts: list[str], **options: Any) -> tuple[list[list[int]], Any]:
        with st.vector(v, scope=scope) as context:
            out = lm.generate(prompts, max_new_tokens=6, **options)
        rows = [row[keep.bool()].tolist() for row, keep in zip(out.new_tokens, out.new_mask)]
        return rows, context.trace

    together, trace = made(PROMPTS)
    without_cache, trace_off = made(PROMPTS, use_cache=False)
    assert together == without_cache
    assert trace.pairs() == trace_off.pairs()
    assert all(1 <= position < 4 for _, position in trace.pairs())  # the BOS is out, and so is all from P on
    for i, prompt in enumerate(PROMPTS):
        assert made([prompt])[0] == [together[i]]
    ids = torch.tensor([[0, 5, 6, 7, 8, 9]])
    states = lm.capture(ids, hooks=[HOOK])[HOOK][0]
    with st.vector(v, scale=0.5):
        edited = lm.capture(ids, hooks=[HOOK])[HOOK][0]
    expected = states.clone()
    expected[1:4] += 0.5 * BY_POSITION[1:]
    torch.testing.assert_close(edited, expected)


def test_position_vectors_add_and_average() -> None:
    long = SteeringVector.of(BY_POSITION, hook_name=HOOK)
    short = SteeringVector.of(BY_POSITION[:2], hook_name=HOOK)
    assert (long + short).directions[HOOK][:2].equal(2 * BY_POSITION[:2])
    assert (long - short).directions[HOOK][2:].equal(BY_POSITION[2:])
    assert long.positions == 4
    assert V.positions is None
    first = (long - short).mean_over_positions()  # its two zero rows do not count
    torch.testing.assert_close(first.vector, BY_POSITION[2:].mean(0))
    with pytest.raises(SteersmanError, match="each of 4 positions"):
        _ = long.vector
    with pytest.raises(SteersmanError, match="position by position"):
        _ = long + V


def test_save_and_load(tmp_path: Path) -> None:
    for v in (V, TWO, SteeringVector.of(BY_POSITION, hook_name=HOOK), V - W):
        path = tmp_path / "new" / "folder" / "v.safetensors"
        v.save(path)
        back = SteeringVector.load(str(path))
        assert back.provenance() == v.provenance()
        assert list(back.directions) == sorted(v.directions)
        assert all(back.directions[hook].equal(direction) for hook, direction in v.directions.items())
        assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]


GOOD = {"format": "steersman.vector", "version": "1", "provenance": json.dumps(V.provenance())}


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({HOOK: A}, None, "no steering vector"),
        ({HOOK: A}, {**GOOD, "format": "other"}, "names 'other'"),
        ({HOOK: A}, {**GOOD, "version": "3"}, "version '3'; this program reads up to 2"),
        ({HOOK: A}, {**GOOD, "provenance": "{"}, "provenance in its header: not readable as JSON"),
        ({HOOK: A}, {**GOOD, "provenance": "{}"}, "provenance in its header cannot be read"),
        ({HOOK: A}, {**GOOD, "provenance": '{"model_name": 1, "method": "", "metadata": {}}'}, "wrong type"),
        ({HOOK: A * float("nan")}, GOOD, "v.safetensors: the steering vector at .* holds NaN"),
        ({HOOK: torch.ones(1, 2, 3)}, GOOD, r"must be \[D\]"),
        ({}, GOOD, "at least one hook point"),
    ],
)
def test_malformed_files(
    tensors: dict[str, torch.Tensor], header: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "v.safetensors"
    save_file(tensors, path, metadata=header)
    with pytest.raises(SteersmanError, match=message):
        SteeringVector.load(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    V.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SteersmanError, match="v.safetensors is (damaged|truncated)"):
        SteeringVector.load(path)
    path.write_text("hello")
    with pytest.raises(SteersmanError, match="truncated or not a safetensors file"):
        SteeringVector.load(path)
    with pytest.raises(SteersmanError, match="no such file"):
        SteeringVector.load(tmp_path / "none.safetensors")
    with pytest.raises(SteersmanError, match="is a folder; a file is expected here"):
        SteeringVector.load(tmp_path)
    with pytest.raises(SteersmanError, match="cannot be made|could not be written"):
        V.save(path / "below" / "v.safetensors")
