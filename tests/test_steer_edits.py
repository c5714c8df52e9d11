"""The edit modes against their formulas, with rows that differ, in every dtype."""

from typing import Any

import pytest
import torch
from support.helpers import make_sae
from support.tiny_models import D, toy_sae, with_text
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae.base import FeatureStats
from steersman.steer import Steerer, Steering
from steersman.steer.edits import MODES, VectorEdit, feature_rows

HOOK = "blocks.1.hook_resid_post"
IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])


def states(lm: LanguageModel, steering: Steering | None = None) -> Tensor:
    if steering is None:
        return lm.capture(IDS, hooks=[HOOK])[HOOK]
    with steering:
        return lm.capture(IDS, hooks=[HOOK])[HOOK]


def active_features(lm: LanguageModel) -> tuple[int, int]:
    """Two features that fire on the text, so that the modes that read them have something to read."""
    density = (toy_sae().encode(states(lm)[:, 1:]) > 0).float().mean((0, 1))
    first, second = density.topk(2).indices.tolist()
    return first, second


def formula(mode: str, h: Tensor, j: int, s: float, m: float = 0.0) -> Tensor:
    """STEP BY STEP from the definitions, one feature, h [..., D]."""
    sae = toy_sae()
    d, f = sae.W_dec[j].detach(), sae.encode(h)[..., j, None]
    return {
        "add": h + s * d,
        "clamp": h + (s - f) * d,
        "floor": h + (s - f).clamp(min=0) * d,
        "cap": h - (f - s).clamp(min=0) * d,
        "scale": h + (s - 1) * f * d,
        "positive_clamp": h + (s - f) * d,
        "mirror": h + 2 * s * (m - f).clamp(min=0) * d,
        "set_if_below": torch.where(f < m, h + (s - f) * d, h),
        "project_out": h - s * (h @ d)[..., None] * d / d.norm() ** 2,
    }[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [1.0, 0.0, 2.5, -1.0])
def test_each_mode_is_its_formula(lm: LanguageModel, mode: str, strength: float) -> None:
    h, (j, _) = states(lm), active_features(lm)
    expected = h.clone()
    expected[:, 1:] = formula(mode, h[:, 1:], j, strength)
    got = states(lm, Steerer(lm).features(toy_sae(), {j: strength}, mode=mode))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[:, 0], h[:, 0])  # the BOS, bit for bit


@pytest.mark.parametrize("mode", ["mirror", "set_if_below"])
def test_modes_with_a_threshold(lm: LanguageModel, mode: str) -> None:
    h, (j, _) = states(lm), active_features(lm)
    level = float(toy_sae().encode(h[:, 1:])[..., j].median())
    got = states(lm, Steerer(lm).features(toy_sae(), {j: 1.5}, mode=mode, threshold=level))
    torch.testing.assert_close(got[:, 1:], formula(mode, h[:, 1:], j, 1.5, level), rtol=1e-5, atol=1e-5)
    above = toy_sae().encode(h)[..., j] >= level
    assert torch.equal(got[above], h[above])
    assert not torch.equal(got[:, 1:], h[:, 1:])


@pytest.mark.parametrize("mode", [m for m in MODES if m != "project_out"])
def test_several_features_at_once_are_edited_from_the_same_h(lm: LanguageModel, mode: str) -> None:
    h, (i, j) = states(lm)[:, 1:], active_features(lm)
    expected = h + (formula(mode, h, i, 1.5) - h) + (formula(mode, h, j, -0.5) - h)
    got = states(lm, Steerer(lm).features(toy_sae(), {i: 1.5, j: -0.5}, mode=mode))[:, 1:]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_projecting_several_directions_out_removes_their_span(lm: LanguageModel) -> None:
    got = states(lm, Steerer(lm).features(toy_sae(), {3: 1.0, 9: 1.0, 11: 1.0}, mode="project_out"))[:, 1:]
    directions = toy_sae().W_dec[[3, 9, 11]].detach()
    assert (directions[0] @ directions[1]).abs() > 0.02  # they overlap, so one by one would leave a rest
    assert (got @ directions.T).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_two_rows_two_features(lm: LanguageModel, mode: str) -> None:
    """Each row is edited as if it were alone: ids and strengths do not leak."""
    h, (i, j) = states(lm), active_features(lm)
    got = states(lm, Steerer(lm).features(toy_sae(), [{i: 2.0}, {j: 3.0}], mode=mode))
    torch.testing.assert_close(got[0, 1:], formula(mode, h[0, 1:], i, 2.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1, 1:], formula(mode, h[1, 1:], j, 3.0), rtol=1e-5, atol=1e-5)
    half = states(lm, Steerer(lm).features(toy_sae(), [{i: 2.0}, {}], mode=mode))
    torch.testing.assert_close(half[0], got[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(half[1], h[1])


@pytest.mark.parametrize("mode", MODES)
def test_gate_multiplies_the_change_per_row(lm: LanguageModel, mode: str) -> None:
    h, (j, _) = states(lm), active_features(lm)
    full = states(lm, Steerer(lm).features(toy_sae(), {j: 2.0}, mode=mode))
    got = states(lm, Steerer(lm).features(toy_sae(), {j: 2.0}, mode=mode, gate=[0.0, 0.5]))
    assert torch.equal(got[0], h[0])
    torch.testing.assert_close(got[1], h[1] + 0.5 * (full[1] - h[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_dtype_of_h_is_kept_and_the_arithmetic_is_fp32(mode: str, dtype: torch.dtype) -> None:
    lm = LanguageModel(with_text("llama").model.to(dtype))
    h, j = states(lm), 7
    got = states(lm, Steerer(lm).features(toy_sae(), {j: 2.0}, mode=mode))
    assert got.dtype == h.dtype == dtype
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-6}[dtype]
    expected = formula(mode, h[:, 1:].float(), j, 2.0)
    torch.testing.assert_close(got[:, 1:].float(), expected, rtol=tolerance, atol=1e-3 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize(("mode", "neutral"), [("add", 0.0), ("scale", 1.0), ("project_out", 0.0)])
def test_neutral_strength_changes_no_bit(lm: LanguageModel, mode: str, neutral: float) -> None:
    assert torch.equal(states(lm, Steerer(lm).features(toy_sae(), {7: neutral}, mode=mode)), states(lm))


def test_vectors_per_row(lm: LanguageModel) -> None:
    h, v = states(lm), torch.randn(2, D, generator=torch.Generator().manual_seed(3))
    st = Steerer(lm)
    got = states(lm, st.vector(v, scale=[2.0, 0.0], hook="layers.1"))
    torch.testing.assert_close(got[0, 1:], h[0, 1:] + 2 * v[0])
    assert torch.equal(got[1], h[1])
    torch.testing.assert_close(states(lm, st.vector(v[0], hook=HOOK, gate=[0, 3]))[1, 1:], h[1, 1:] + 3 * v[0])
    both = states(lm, st.vector({"blocks.1.hook_resid_post": v[0], "blocks.2.hook_resid_post": v[1]}))
    torch.testing.assert_close(both[:, 1:], h[:, 1:] + v[0])


def test_gradients_reach_the_vector(lm: LanguageModel) -> None:
    v = torch.zeros(D, requires_grad=True)
    with Steerer(lm).vector(v, hook=HOOK):
        for _ in range(2):  # the product is formed anew in each pass: one graph would be used up by the first
            lm.model(IDS).logits[:, -1, 5].sum().backward()
    assert v.grad is not None
    assert v.grad.abs().max() > 0
    lm.model.zero_grad()


def stats(median: float = 4.0) -> FeatureStats:
    largest = torch.arange(40, dtype=torch.float32)  # feature 0 is dead
    return FeatureStats(max_act=largest, density=largest / 40, mean_act=largest / 2, n_tokens=1000, median_norm=median)


def test_units(lm: LanguageModel) -> None:
    sae, st, h = toy_sae(), Steerer(lm), states(lm)
    with torch.no_grad():
        sae.W_dec[6] *= 2
    sae.feature_stats = stats()
    d = sae.W_dec[6].detach()
    by_max = states(lm, st.features(sae, {6: 0.5}, units="max_act"))
    torch.testing.assert_close(by_max[:, 1:], h[:, 1:] + 3.0 * d)
    by_norm = states(lm, st.features(sae, {6: 0.5}, units="norm_frac"))
    torch.testing.assert_close((by_norm - h)[:, 1:].norm(dim=-1), torch.full((2, 5), 2.0))
    clamped = states(lm, st.features(sae, {6: 0.5}, units="max_act", mode="clamp"))
    torch.testing.assert_close(clamped, states(lm, st.features(sae, {6: 3.0}, mode="clamp")))


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ({40: 1.0}, {}, "feature 40 is out of range: this SAE has features 0 to 39"),
        ({-1: 1.0}, {}, "feature -1 is out of range"),
        ({0: 1.0}, {"units": "max_act"}, "feature 0 is dead"),
        ({1: 1.0}, {"units": "furlongs"}, "unknown units 'furlongs'"),
        ({1: 1.0}, {"mode": "boost"}, "unknown mode 'boost'"),
        ({1: 2.0}, {"mode": "scale", "units": "max_act"}, "takes a plain factor"),
        ({1: 2.0}, {"mode": "floor", "threshold": 1.0}, "'floor' has no threshold"),
        ({1: float("nan")}, {}, "strength of feature 1 must be a number, got nan"),
        ({1: 1e308}, {}, "finite numbers"),
        ({1: 10**400}, {}, "must be a number"),
        ({1: 1.0}, {"gate": float("inf")}, "gate must be finite"),
        ([{1: 1.0}] * 3, {"gate": [1.0, 0.0]}, "rows disagree: features has 3, gate has 2"),
        ({}, {}, "no feature to steer by"),
        ([], {}, "features must be"),
    ],
)
def test_wrong_features(lm: LanguageModel, features: Any, options: dict[str, Any], message: str) -> None:
    sae = toy_sae()
    sae.feature_stats = stats()
    with pytest.raises(SteersmanError, match=message):
        Steerer(lm).features(sae, features, **options)


def test_a_feature_of_sinks_is_not_called_dead(lm: LanguageModel) -> None:
    sae = toy_sae()
    sae.feature_stats = stats()
    sae.feature_stats.density[0] = 0.02
    message = r"0 is active on rows of huge norm alone \(attention sinks; 2 % of 1,000 tokens\).*use units='raw'"
    with pytest.raises(SteersmanError, match=message):
        Steerer(lm).features(sae, {0: 1.0}, units="max_act")
    Steerer(lm).features(sae, {0: 1.0})


@pytest.mark.parametrize("units", ["max_act", "norm_frac"])
def test_units_without_statistics(lm: LanguageModel, units: str) -> None:
    sae = toy_sae()
    with pytest.raises(SteersmanError, match="has none: run `steersman features`"):
        Steerer(lm).features(sae, {1: 1.0}, units=units)
    sae.feature_stats = stats(median=0.0)
    if units == "norm_frac":
        with pytest.raises(SteersmanError, match="need the median norm"):
            Steerer(lm).features(sae, {1: 1.0}, units=units)


def test_wrong_vectors() -> None:
    with pytest.raises(SteersmanError, match=r"\[D\] or \[B, D\]"):
        VectorEdit(torch.zeros(2, 3, 4))
    with pytest.raises(SteersmanError, match="NaN or infinite"):
        VectorEdit(torch.tensor([1.0, float("nan")]))
    with pytest.raises(SteersmanError, match="vector has 2, scale has 3"):
        VectorEdit(torch.ones(2, 4), [1, 2, 3])


def test_feature_rows() -> None:
    assert feature_rows({3: 1}) == [{3: 1.0}]
    assert feature_rows([{3: 1}, {}]) == [{3: 1.0}, {}]


@pytest.mark.parametrize("input_norm", ["layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_directions_of_a_normalised_sae_have_the_scale_of_the_token(
    lm: LanguageModel, activation: str, input_norm: str
) -> None:
    sae = make_sae(activation, d_in=D, input_norm=input_norm, hook_name=HOOK)
    h = states(lm)[:, 1:]
    j = int((sae.encode(h) > 0).float().mean((0, 1)).argmax())
    d, f, scale = sae.W_dec[j].detach(), sae.encode(h)[..., j, None], sae.token_scale(h.reshape(-1, D))
    assert scale is not None
    scale = scale.view(*h.shape[:-1], 1)
    steerer = Steerer(lm)
    for mode, coefficient in {"add": 2.0, "clamp": 2.0 - f, "floor": (2.0 - f).relu(), "scale": f}.items():
        got = states(lm, steerer.features(sae, {j: 2.0}, mode=mode))[:, 1:]
        torch.testing.assert_close(got, h + coefficient * scale * d, rtol=1e-5, atol=1e-5)
    # Decoding the edited code gives the same change as editing the state.
    edited = sae.encode(h)
    edited[..., j] = 2.0
    change = sae.decode(edited, like=h) - sae.decode(sae.encode(h), like=h)
    torch.testing.assert_close(
        states(lm, steerer.features(sae, {j: 2.0}, mode="clamp"))[:, 1:], h + change, rtol=1e-4, atol=1e-4
    )
    sae.feature_stats = stats()
    with pytest.raises(SteersmanError, match="scales them per token"):
        steerer.features(sae, {j: 1.0}, units="norm_frac")


def test_what_cannot_steer_says_so(lm: LanguageModel) -> None:
    mask = make_sae("relu", d_in=2, hook_name="blocks.1.hook_attn_mask")
    with pytest.raises(SteersmanError, match="blocks.1.hook_attn_mask holds no hidden states"):
        Steerer(lm).features(mask, {0: 1.0})
