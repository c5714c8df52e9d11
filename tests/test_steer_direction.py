"""`DirectionEdit`: each rule is its formula, and keeps what it promises, for vectors, probes and features."""

from typing import Any

import pytest
import torch
from support.tiny_models import D, toy_sae, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer import RULES, DirectionEdit, Feature, Probe, Projection, Steerer, Steering, SteeringVector

HOOK = "blocks.1.hook_resid_post"
IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])
G = torch.Generator().manual_seed(11)
V, W, U = torch.randn(3, D, generator=G)
UNIT = V / V.norm()
INF = float("inf")


def states(lm: LanguageModel, steering: Steering | None = None) -> Tensor:
    if steering is None:
        return lm.capture(IDS, hooks=[HOOK])[HOOK]
    with steering:
        return lm.capture(IDS, hooks=[HOOK])[HOOK]


def steered(lm: LanguageModel, **settings: Any) -> Tensor:
    """The states without the BOS, edited."""
    return states(lm, Steerer(lm).direction(HOOK, **settings))[:, 1:]


def coefficient(rule: str, rho: Tensor, s: float, m: float) -> Tensor:
    """Straight from the definitions."""
    zero = torch.zeros_like(rho)
    return {
        "add": zero + s,
        "set": s - rho,
        "floor": torch.maximum(s - rho, zero),
        "cap": -torch.maximum(rho - s, zero),
        "scale": (s - 1) * rho,
        "project_out": -s * rho,
        "positive_clamp": s - torch.maximum(rho, zero),
        "mirror": 2 * s * torch.maximum(m - rho, zero),
        "set_if_below": torch.where(rho < m, s - rho, zero),
        "probe": s * torch.maximum(rho, zero),
    }[rule]


PLAIN = [rule for rule in RULES if rule != "rotate"]


@pytest.mark.parametrize("rule", PLAIN)
@pytest.mark.parametrize("kind", ["vector", "probe", "feature"])
def test_each_rule_is_its_formula(lm: LanguageModel, rule: str, kind: str) -> None:
    h = states(lm)[:, 1:]
    sae = toy_sae()
    j = int((sae.encode(h) > 0).float().mean((0, 1)).argmax())
    read: Any = {"vector": V, "probe": (W, 1.5), "feature": Feature(sae, j)}[kind]
    rho = {"vector": h @ UNIT, "probe": h @ W + 1.5, "feature": sae.encode(h)[..., j]}[kind]
    default = {"vector": UNIT, "probe": W / W.norm() ** 2, "feature": sae.W_dec[j].detach()}[kind]
    rho_sorted = rho.flatten().sort().values
    middle = float(rho_sorted[4] + rho_sorted[5]) / 2 if kind != "feature" else float(rho_sorted[-1]) / 2
    threshold = middle if RULES[rule].thresholds else 0.0
    s = 0.7 if RULES[rule].plain else middle
    for write, u in ((None, default), (U, U)):
        got = steered(lm, read=read, write=write, rule=rule, value=s, threshold=threshold)
        expected = h + coefficient(rule, rho, s, threshold)[..., None] * u
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, h)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("gate", [0.0, [0.0, 0.0]])
def test_a_gate_of_zero_changes_no_bit(lm: LanguageModel, rule: str, gate: Any) -> None:
    write = W if rule == "rotate" else None
    assert torch.equal(steered(lm, read=V, write=write, rule=rule, value=0.5, gate=gate), states(lm)[:, 1:])
    edit = DirectionEdit(V, write, rule=rule, value=-0.5, threshold=1.0 if RULES[rule].thresholds else 0.0)
    with Steerer(lm).edit(HOOK, edit.scaled([0.0, 1.0])):
        got = lm.capture(IDS, hooks=[HOOK])[HOOK]
    assert torch.equal(got[0], states(lm)[0])
    assert not torch.equal(got[1], states(lm)[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "floor", "value": -INF},
        {"rule": "cap", "value": INF},
        {"rule": "scale", "value": 1.0},
        {"rule": "add", "value": 0.0},
        {"rule": "mirror", "value": 0.0, "threshold": 100.0},
        {"rule": "mirror", "value": 2.0, "threshold": -INF},
        {"rule": "set_if_below", "value": 5.0, "threshold": -INF},
        {"rule": "floor", "value": -1e6},
        {"rule": "cap", "value": 1e6},
        {"rule": "add", "value": 0.0, "keep_norm": True},
    ],
)
def test_what_can_change_nothing_changes_no_bit(lm: LanguageModel, settings: dict[str, Any]) -> None:
    assert torch.equal(steered(lm, read=V, **settings), states(lm)[:, 1:])


@pytest.mark.parametrize("rule", ["floor", "cap", "set", "project_out"])
def test_edits_that_are_done_once(lm: LanguageModel, rule: str) -> None:
    """A second application, nested in the first, changes nothing beyond rounding."""
    st, value = Steerer(lm), 1.0 if rule == "project_out" else 0.4
    once = states(lm, st.direction(HOOK, read=V, rule=rule, value=value))
    with st.direction(HOOK, read=V, rule=rule, value=value):
        twice = states(lm, st.direction(HOOK, read=V, rule=rule, value=value))
    torch.testing.assert_close(twice, once, rtol=0, atol=2e-6)


def test_what_is_asked_for_is_reached(lm: LanguageModel) -> None:
    h = states(lm)[:, 1:]
    rho = h @ UNIT
    torch.testing.assert_close(
        steered(lm, read=V, rule="set", value=3.0) @ UNIT, torch.full_like(rho, 3.0), rtol=0, atol=1e-5
    )
    logits = steered(lm, read=(W, -0.5), rule="set", value=1.5) @ W - 0.5
    torch.testing.assert_close(logits, torch.full_like(rho, 1.5), rtol=0, atol=1e-4)
    capped, floored = (steered(lm, read=V, rule=rule, value=0.2) @ UNIT for rule in ("cap", "floor"))
    torch.testing.assert_close(capped, rho.clamp(max=0.2), rtol=0, atol=1e-5)
    torch.testing.assert_close(floored, rho.clamp(min=0.2), rtol=0, atol=1e-5)


def test_capping_touches_no_token_below_the_limit(lm: LanguageModel) -> None:
    h = states(lm)[:, 1:]
    rho = h @ UNIT
    limit = float(rho.flatten().quantile(0.6))
    got = steered(lm, read=V, rule="cap", value=limit)
    below = rho <= limit
    assert torch.equal(got[below], h[below])
    assert int((got != h).any(-1).sum()) == int((~below).sum()) == 4


def test_mirror(lm: LanguageModel) -> None:
    """Strength 1/2 lands on the threshold, strength 1 on the other side; what is above it stays as it is."""
    h = states(lm)[:, 1:]
    rho = h @ UNIT
    m = float(rho.median())
    half, whole = (steered(lm, read=V, rule="mirror", value=s, threshold=m) for s in (0.5, 1.0))
    below = rho < m
    torch.testing.assert_close((half @ UNIT)[below], torch.full_like(rho[below], m), rtol=0, atol=1e-5)
    torch.testing.assert_close((whole @ UNIT)[below], 2 * m - rho[below], rtol=0, atol=1e-5)
    for got in (half, whole, steered(lm, read=V, rule="set_if_below", value=9.0, threshold=m)):
        assert torch.equal(got[~below], h[~below])
    assert 0 < int(below.sum()) < below.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keep_norm", [True, "opposed"])
@pytest.mark.parametrize("value", [0.3, -0.3, 4.0])
def test_keep_norm_keeps_the_norm(dtype: torch.dtype, keep_norm: Any, value: float) -> None:
    lm = LanguageModel(with_text("llama").model.to(dtype))
    h = states(lm)[:, 1:]
    got = steered(lm, read=V, value=value, keep_norm=keep_norm)
    assert not torch.equal(got, h)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.float().norm(dim=-1), h.float().norm(dim=-1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_keep_norm_is_the_formula_of_each_paper(lm: LanguageModel, sign: float) -> None:
    h = states(lm)[:, 1:]
    length = h.norm(dim=-1, keepdim=True)
    x = h / length
    second = W / W.norm()

    def renormed(push: Tensor) -> Tensor:
        new = x + push
        return length * new / new.norm(dim=-1, keepdim=True)

    vti = steered(lm, read=V, value=0.08 * sign, keep_norm=True)
    torch.testing.assert_close(vti, renormed(0.08 * sign * UNIT), rtol=1e-5, atol=1e-6)
    weight = 1 + (x @ (-sign * UNIT)).clamp(min=0)[..., None]
    one = steered(lm, read=V, value=0.1 * sign, keep_norm="opposed")
    torch.testing.assert_close(one, renormed(sign * 0.1 * weight * UNIT), rtol=1e-5, atol=1e-6)
    # Several vectors are averaged, each with its own strength (ICV).
    other = 1 + (x @ -second).clamp(min=0)[..., None]
    first = 1 + (x @ -UNIT).clamp(min=0)[..., None]
    both = steered(lm, read=Projection.span([V, W]), value=torch.tensor([[[0.1, 0.2]]]), keep_norm="opposed")
    torch.testing.assert_close(both, renormed((0.1 * first * UNIT + 0.2 * other * second) / 2), rtol=1e-5, atol=1e-6)


def test_small_and_large_pushes_at_a_kept_norm(lm: LanguageModel) -> None:
    h = states(lm)[:, 1:]
    length = h.norm(dim=-1, keepdim=True)
    x = h / length
    tangent = UNIT - (x @ UNIT)[..., None] * x
    errors = []
    for lam in (0.02, 0.01):
        got = steered(lm, read=V, value=lam, keep_norm=True)
        errors.append(float((got - h - lam * length * tangent).norm()))
    assert 3.5 < errors[0] / errors[1] < 4.5  # what is left is of second order
    far = steered(lm, read=V, value=1e6, keep_norm=True)
    torch.testing.assert_close(far, length * UNIT.expand_as(h), rtol=1e-4, atol=1e-4)
    edit = DirectionEdit(h[0, 2], value=0.5, keep_norm=True)
    with Steerer(lm).edit(HOOK, edit):  # a multiple of h has no effect
        torch.testing.assert_close(lm.capture(IDS, hooks=[HOOK])[HOOK][0, 3], h[0, 2], rtol=1e-5, atol=1e-5)


def test_a_gate_multiplies_the_strength_where_the_norm_is_kept(lm: LanguageModel) -> None:
    half = steered(lm, read=V, value=0.8, keep_norm=True, gate=0.5)
    assert torch.equal(half, steered(lm, read=V, value=0.4, keep_norm=True))


def angles(h: Tensor) -> Tensor:
    second = W - (W @ UNIT) * UNIT
    return torch.rad2deg(torch.atan2(h @ (second / second.norm()), h @ UNIT)) % 360


@pytest.mark.parametrize("degrees", [0.0, 30.0, 200.0, -45.0])
def test_rotation_in_the_plane_of_two_vectors(lm: LanguageModel, degrees: float) -> None:
    h = states(lm)[:, 1:]
    got = steered(lm, read=V, write=W, rule="rotate", value=degrees)
    off = (angles(got) - degrees + 180) % 360 - 180
    assert off.abs().max() < 0.01
    torch.testing.assert_close(got.norm(dim=-1), h.norm(dim=-1), rtol=1e-5, atol=0)
    plane = torch.linalg.qr(torch.stack([V, W], 1)).Q
    torch.testing.assert_close(got - (got @ plane) @ plane.T, h - (h @ plane) @ plane.T, rtol=1e-4, atol=1e-5)
    half = steered(lm, read=V, write=W, rule="rotate", value=degrees, gate=0.5)
    torch.testing.assert_close(half.norm(dim=-1), h.norm(dim=-1), rtol=1e-5, atol=0)
    turn = (degrees - angles(h) + 180) % 360 - 180
    off = (angles(half) - angles(h) - turn / 2 + 180) % 360 - 180
    assert off.abs().max() < 0.01


def test_several_vectors_at_once(lm: LanguageModel) -> None:
    """Each reading is moved and leaves the others alone, also where the vectors overlap."""
    span = Projection.span([V, W, U])
    units = torch.stack([V, W, U])
    units = units / units.norm(dim=1, keepdim=True)
    assert (units @ units.T - torch.eye(3)).abs().max() > 0.1
    h = states(lm)[:, 1:]
    gone = steered(lm, read=span, rule="project_out")
    assert (gone @ units.T).abs().max() < 1e-5
    torch.testing.assert_close(gone, steered(lm, read=span, rule="scale", value=0.0), rtol=0, atol=1e-6)
    basis = torch.linalg.qr(units.T).Q
    torch.testing.assert_close(gone, h - (h @ basis) @ basis.T, rtol=1e-4, atol=1e-5)
    capped = steered(lm, read=span, rule="cap", value=torch.tensor([[[0.1, INF, 0.3]]]))
    limits = torch.tensor([0.1, INF, 0.3])
    torch.testing.assert_close(capped @ units.T, torch.minimum(h @ units.T, limits), rtol=0, atol=1e-5)


def test_everything_may_differ_per_row(lm: LanguageModel) -> None:
    h = states(lm)[:, 1:]
    both = steered(
        lm, read=torch.stack([V, W]), write=torch.stack([U, V]), rule="floor", value=[0.5, 1.5], gate=[1.0, 2.0]
    )
    for row, (read, write, value, gate) in enumerate(((V, U, 0.5, 1.0), (W, V, 1.5, 2.0))):
        alone = steered(lm, read=read, write=write, rule="floor", value=value, gate=gate)
        torch.testing.assert_close(both[row], alone[row], rtol=1e-6, atol=1e-6)
    probes = steered(lm, read=Probe(torch.stack([V, W]), [0.5, -0.5]), rule="probe", write=U)
    expected = h[1] + (h[1] @ W - 0.5).relu()[:, None] * U
    torch.testing.assert_close(probes[1], expected, rtol=1e-5, atol=1e-5)
    kept = steered(lm, read=torch.stack([V, W]), value=[0.5, 0.2], keep_norm=True)
    torch.testing.assert_close(kept[1], steered(lm, read=W, value=0.2, keep_norm=True)[1], rtol=1e-6, atol=1e-6)


def test_modes_of_a_vector(lm: LanguageModel) -> None:
    st, h = Steerer(lm), states(lm)[:, 1:]
    v = SteeringVector.of(V, hook_name=HOOK, model_name="llama")
    assert (states(lm, st.vector(v, mode="project_out"))[:, 1:] @ UNIT).abs().max() < 1e-5
    capped = states(lm, st.vector(v, mode="cap", scale=[0.1, INF]))[:, 1:]
    torch.testing.assert_close(capped[0] @ UNIT, (h[0] @ UNIT).clamp(max=0.1), rtol=0, atol=1e-5)
    assert torch.equal(capped[1], h[1])
    assert torch.equal(capped, steered(lm, read=v, rule="cap", value=[0.1, INF]))
    two = SteeringVector(directions={HOOK: V, "blocks.2.hook_resid_post": W}, model_name="llama")
    steering = st.direction(read=two, rule="cap", value={HOOK: 0.1, "layers.2": 0.2})
    assert [float(steering.edits[name].value) for name in two.hook_names] == pytest.approx([0.1, 0.2])  # pyright: ignore


def test_strength_by_generated_step(lm: LanguageModel) -> None:
    """Column t is that of step t: the last prompt token is step 0, what comes before it takes column 0 too."""
    st = Steerer(lm)
    table = torch.tensor([[1.0, 0.0, 3.0]])
    seen = lm.generate("w5 w6 w7", max_new_tokens=5)
    with st.direction(HOOK, read=V, value=table):
        got = lm.capture(seen.tokens, hooks=[HOOK], prompt_length=seen.prompt_length)[HOOK]
    plain = lm.capture(seen.tokens, hooks=[HOOK])[HOOK]
    change = ((got - plain) @ UNIT)[0, 1:]
    length = int(seen.prompt_length[0])
    expected = [1.0] * (length - 1) + [0.0] + [3.0] * (len(change) - length)
    assert change.tolist() == pytest.approx(expected, abs=1e-5)
    rows = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    got = states(lm, st.direction(HOOK, read=V, value=rows))[:, 1:]
    torch.testing.assert_close(
        got, states(lm)[:, 1:] + torch.tensor([1.0, 3.0])[:, None, None] * UNIT, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"read": V, "rule": "boost"}, "unknown rule 'boost': use one of add, set"),
        ({"read": V[:5]}, "a vector has width 5, blocks.1.hook_resid_post of llama has width 16"),
        ({"read": (W[:5], 0.0)}, "a probe has width 5"),
        ({"read": V, "write": U[:5]}, "what is written has width 5"),
        ({"read": Probe(W, model_name="gpt2")}, "a probe was made for 'gpt2', the model is 'llama'"),
        ({"read": Probe(W, hook_name="layers.2")}, "a probe was made at 'layers.2', not at 'blocks.1.hook_resid_post'"),
        ({"read": SteeringVector.of(V, hook_name=HOOK, model_name="gpt2")}, "this vector was made for 'gpt2'"),
        ({"read": torch.zeros(D)}, "zero or not finite"),
        ({"read": (torch.zeros(D), 1.0)}, "the weight of a probe is zero"),
        ({"read": V, "value": INF}, "value must be finite"),
        ({"read": V, "rule": "cap", "value": -INF}, "value must be finite"),
        ({"read": V, "rule": "floor", "threshold": 2.0}, "'floor' has no threshold"),
        ({"read": V, "rule": "mirror", "threshold": INF}, "threshold must be finite"),
        ({"read": V, "rule": "set", "keep_norm": True}, "keep_norm is for rule 'add', not 'set'"),
        ({"read": (W, 0.0), "keep_norm": True}, "keep_norm adds the vectors that are read"),
        ({"read": V, "keep_norm": "always"}, "keep_norm must be True, False or 'opposed'"),
        ({"read": V, "rule": "rotate"}, "give both, as read= and write="),
        ({"read": V, "write": 2 * V, "rule": "rotate"}, "these are parallel"),
        ({"read": V, "value": torch.zeros(1, 1, 3)}, r"\[R, T, 1\], got \(1, 1, 3\)"),
        ({"read": V, "value": [1.0, 2.0, 3.0], "gate": [1.0, 0.0]}, "rows disagree: value has 3, gate has 2"),
        ({"read": V, "value": {"layers.2": 1.0}}, "value has nothing for blocks.1.hook_resid_post"),
        ({"read": "north"}, "a vector is a tensor"),
    ],
)
def test_wrong_settings(lm: LanguageModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        Steerer(lm).direction(HOOK, **settings)


def test_where_it_can_stand(lm: LanguageModel) -> None:
    st = Steerer(lm)
    with pytest.raises(SteersmanError, match="is an attention mask and holds no states"):
        st.edit("blocks.1.hook_attn_mask", DirectionEdit(torch.ones(4)))
    with pytest.raises(SteersmanError, match="a probe records no hook point"):
        st.direction(read=(W, 0.0))
    with pytest.raises(SteersmanError, match="name the hook point of the vector"):
        st.direction(read=V)
    with pytest.raises(SteersmanError, match=r"made at 'blocks\.1\.hook_resid_post', not at 'blocks\.2"):
        st.direction("layers.2", read=Feature(toy_sae(), 3))
    assert list(st.direction(read=Probe(W, hook_name="layers.1")).edits) == [HOOK]
