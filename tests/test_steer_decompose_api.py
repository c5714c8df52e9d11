"""`decompose` as a whole: the planted vector, what each method computes, diagnostics, and mistakes."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import make_sae
from support.planted import ALWAYS_ON, planted
from support.tiny_models import toy_sae, with_text

from steersman import SAE, SAEConfig, SteersmanError
from steersman.sae import FeatureStats
from steersman.steer import SteeringVector
from steersman.steer.decompose import DecomposeConfig, decompose

HOOK = "blocks.1.hook_resid_post"


def in_parts(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[:30], x[30:]]


def only_once(x: torch.Tensor) -> Any:
    """Batches as a store gives them, that can be read once."""
    yield SimpleNamespace(x=x[:30])
    yield SimpleNamespace(x=x[30:])


@pytest.fixture(scope="module", params=[0, 45])
def case(request: pytest.FixtureRequest) -> Any:
    """Two plantings; in the second all three positive coefficients are small."""
    return planted(request.param)


@pytest.mark.parametrize(("method", "k"), [("omp", 6), ("omp", 16), ("lasso", 12), ("contrast", 6)], ids=str)
def test_planted_features_are_recovered(case: Any, method: str, k: int) -> None:
    data = {"positive": case.positive, "negative": case.negative} if method == "contrast" else {}
    found = decompose(case.v, case.sae, method=method, k=k, **data)
    assert case.recovered(found) == 6
    if method == "omp":
        assert len(found) == 6, "it stops when nothing is left"
        assert found.explained_variance == pytest.approx(1, abs=1e-6)
        assert not found.warnings or k == 16
        assert found.null_curve[-1] < 0.6
    if method == "contrast":
        assert found.t is not None
        assert float(found.t.abs().min()) > 10


def test_planted_encode_fails_and_says_so(case: Any) -> None:
    found = decompose(case.v, case.sae, method="encode", k=ALWAYS_ON)
    assert case.recovered(found) == 0
    assert found.zero_overlap >= 0.4
    text = " ".join(found.warnings)
    assert "for v = 0" in text
    assert "its biases decide, not v" in text
    assert "cannot express negative parts" in text
    assert "up to k = 16 features for any input" in text
    # Above (5 + 3.5) / 0.5 = 17, at which the smallest positive coefficient there can be, 0.5, outweighs the biases.
    rescaled = decompose(case.v, case.sae, method="encode", k=6, scale=20.0)
    assert 0 < case.recovered(rescaled) <= 3, "the negative half cannot be seen"
    nnls = decompose(case.v, case.sae, method="nnls", k=None, n_null=2)
    assert nnls.cosine > 0.999
    assert case.recovered(nnls) <= 3, "a cosine of 1 with the wrong features"


@pytest.mark.parametrize("method", ["omp", "lasso", "nnls", "encode"])
def test_a_batch_equals_its_vectors(case: Any, method: str) -> None:
    other = case.sae.W_dec[3].detach() * 2
    both: Any = decompose(torch.stack([case.v, other]), case.sae, method=method, k=5)
    for v, found in zip((case.v, other), both):
        alone = decompose(v, case.sae, method=method, k=5)
        assert found.features.tolist() == alone.features.tolist()
        torch.testing.assert_close(found.coefficients, alone.coefficients)
        torch.testing.assert_close(found.null_curve, alone.null_curve)
        assert found.warnings == alone.warnings


@pytest.mark.parametrize("method", ["omp", "lasso", "nnls", "encode"])
def test_the_record_is_consistent(case: Any, method: str) -> None:
    found = decompose(case.v, case.sae, method=method, k=5)
    rows = case.sae.W_dec.detach()[found.features]
    rebuilt = found.coefficients.float() @ (rows / rows.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found.reconstruction, rebuilt)
    torch.testing.assert_close(found.residual + found.reconstruction, case.v)
    assert float(found.curve[-1]) == pytest.approx(found.explained_variance, abs=1e-6)
    assert len(found.curve) == len(found.null_curve) == len(found.null_high) == len(found)
    negative = found.coefficients.clamp_max(0).square().sum() / found.coefficients.square().sum()
    assert found.negative_energy == pytest.approx(float(negative))


def test_strengths_take_out_the_length_of_decoder_rows() -> None:
    sae = SAE(SAEConfig(d_in=32, d_sae=64, k=4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 4, 64)[:, None]
    v = 3 * sae.W_dec[60].detach() - 2 * sae.W_dec[2].detach()
    found = decompose(v, sae, k=2)
    assert found.as_features() == {60: pytest.approx(3, abs=1e-5), 2: pytest.approx(-2, abs=1e-5)}
    assert float(found.coefficients[0]) == pytest.approx(3 * float(sae.W_dec[60].detach().norm()), abs=1e-4)


def test_antipodal_is_the_difference_of_two_codes() -> None:
    sae = make_sae(d_in=16, d_sae=64, k=8)
    v = torch.randn(16, generator=torch.Generator().manual_seed(1))
    found = decompose(v, sae, method="antipodal", k=None, scale=2.0)
    b = sae.b_dec.detach()
    expected = (sae.encode(b + 2 * v) - sae.encode(b - 2 * v)) / 2
    got = torch.zeros(64).index_copy_(0, found.features, found.strengths.float())
    torch.testing.assert_close(got, expected)
    assert found.negative_energy > 0
    sizes = found.coefficients.abs().tolist()
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("source", [torch.clone, in_parts, only_once])
def test_response_is_the_mean_change_of_the_code(source: Callable[[Any], Any]) -> None:
    sae = make_sae(d_in=16, d_sae=64, k=8)
    g = torch.Generator().manual_seed(1)
    v, x = torch.randn(16, generator=g), torch.randn(100, 16, generator=g)
    found = decompose(v, sae, method="response", activations=source(x), scale=0.5, k=None, rows=80)
    change = (sae.encode(x[:80] + 0.5 * v) - sae.encode(x[:80])).double() / 0.5
    got = torch.zeros(64, dtype=torch.float64).index_copy_(0, found.features, found.strengths)
    torch.testing.assert_close(got, change.mean(dim=0))
    t = change.mean(dim=0) / (change.std(dim=0) / 80**0.5)
    assert found.t is not None
    torch.testing.assert_close(found.t, t[found.features])


def test_contrast_is_the_difference_of_mean_codes_and_every_example_counts() -> None:
    sae = make_sae(d_in=16, d_sae=64, k=8)
    g = torch.Generator().manual_seed(1)
    plus, minus = torch.randn(40, 16, generator=g) + 0.3, torch.randn(30, 16, generator=g)
    v = plus.mean(dim=0) - minus.mean(dim=0)
    found = decompose(v, sae, method="contrast", positive=plus, negative=list(minus.split(7)), k=None)
    f, h = sae.encode(plus).double(), sae.encode(minus).double()
    got = torch.zeros(64, dtype=torch.float64).index_copy_(0, found.features, found.strengths)
    torch.testing.assert_close(got, f.mean(dim=0) - h.mean(dim=0))
    welch = (f.mean(dim=0) - h.mean(dim=0)) / (f.var(dim=0) / 40 + h.var(dim=0) / 30).sqrt()
    assert found.t is not None
    torch.testing.assert_close(found.t, welch[found.features])
    assert found.details["cosine_to_difference"] == pytest.approx(1)
    doubled = decompose(2 * v, sae, method="contrast", positive=plus, negative=minus, k=None)
    torch.testing.assert_close(doubled.coefficients, 2 * found.coefficients)
    without_v = decompose(None, sae, method="contrast", positive=only_once(plus), negative=minus, k=None)
    torch.testing.assert_close(without_v.vector, v)
    for i in range(0, 40, 13):
        fewer = torch.cat([plus[:i], plus[i + 1 :]])
        other = decompose(v, sae, method="contrast", positive=fewer, negative=minus, k=None)
        assert other.coefficients.shape != found.coefficients.shape or not torch.equal(
            other.coefficients, found.coefficients
        )
    askew = decompose(torch.randn(16, generator=g), sae, method="contrast", positive=plus, negative=minus)
    assert "not the difference of these texts" in " ".join(askew.warnings)


def test_contrast_of_texts_counts_each_text_once() -> None:
    lm, sae = with_text("llama"), toy_sae()
    texts = ["w5 w6", "w7 w8 w9 w10 w11 w12", "w13"]
    other = ["w20 w21", "w22 w23", "w24 w25 w26"]
    found = decompose(None, sae, method="contrast", positive=texts, negative=other, lm=lm, k=None)

    def mean_code(texts: list[str], last: bool = False) -> torch.Tensor:
        codes = []
        for text in texts:
            batch = lm.encode([text])
            h = lm.capture(batch.input_ids, hooks=[HOOK])[HOOK][0, 1:]
            codes.append(sae.encode(h[-1:] if last else h).mean(dim=0))
        return torch.stack(codes).mean(dim=0)

    got = torch.zeros(40).index_copy_(0, found.features, found.strengths.float())
    torch.testing.assert_close(got, mean_code(texts) - mean_code(other), rtol=1e-4, atol=1e-5)
    assert "are few" in " ".join(found.warnings)
    last = decompose(None, sae, method="contrast", positive=texts, negative=other, lm=lm, k=None, positions="last")
    got = torch.zeros(40).index_copy_(0, last.features, last.strengths.float())
    torch.testing.assert_close(got, mean_code(texts, last=True) - mean_code(other, last=True), rtol=1e-4, atol=1e-5)


def test_effect_reads_the_map_at_unit_length() -> None:
    sae = make_sae(d_in=8, d_sae=64, k=8)
    g = torch.Generator().manual_seed(1)
    effects: Any = SimpleNamespace(M=torch.randn(8, 64, generator=g), b=torch.randn(64, generator=g))
    v = 5 * torch.randn(8, generator=g)
    found = decompose(v, sae, method="effect", effect_map=effects, k=4)
    y = (v / v.norm()) @ effects.M + effects.b
    assert found.features.tolist() == y.abs().topk(4).indices.tolist()
    torch.testing.assert_close(found.coefficients.float(), y[found.features])
    assert "predicted changes" in found.units
    assert 0 < found.explained_variance <= 1
    assert float(found.curve[-1]) == pytest.approx(found.explained_variance)


def test_behaviour_keeps_what_the_model_sees() -> None:
    lm, sae = with_text("llama"), toy_sae()
    v = 2 * sae.W_dec[3].detach() - 1.5 * sae.W_dec[8].detach() + 0.2 * torch.randn(16)
    texts = ["w5 w6 w7 w8", "w9 w10 w11", "w30 w31 w32 w33 w34"]
    found = decompose(v, sae, method="behaviour", lm=lm, texts=texts, k=2, steps=30)
    assert found.details["kl_at_end"] >= 0
    assert set(found.features.tolist()) == {3, 8}
    assert found.as_features()[3] > 1
    assert found.as_features()[8] < -0.7


def test_labels_and_density() -> None:
    lm, sae = with_text("llama"), toy_sae()
    density = torch.linspace(0, 0.5, 40)
    sae.feature_stats = FeatureStats(
        max_act=(density > 0).float(), density=density, mean_act=density, n_tokens=10, median_norm=3.0
    )
    v = sae.W_dec[5].detach() + sae.W_dec[39].detach() - sae.W_dec[0].detach()
    found = decompose(v, sae, k=3, labels={5: "five"})
    assert found.labels[found.features.tolist().index(5)] == "five"
    assert 0 not in found.features.tolist(), "dead features are left out"
    assert 0 in decompose(v, sae, k=3, exclude_dead=False).features.tolist()
    assert "more than 10 % of all tokens" in " ".join(found.warnings)
    assert found.densities is not None
    torch.testing.assert_close(found.densities, density[found.features])
    named = decompose(v, sae, k=3, labels={5: "five"}, lm=lm)
    assert all(named.labels)
    assert "w" in named.labels[0] + named.labels[1]


def test_text_and_json(case: Any) -> None:
    found = decompose(case.v, case.sae, k=6, labels={next(iter(case.signs)): "a name"})
    text = found.to_text()
    assert "a name" in text
    assert "random directions" in text
    record = json.loads(found.to_json())
    assert [term["feature"] for term in record["terms"]] == found.features.tolist()
    assert record["settings"]["method"] == "omp"
    assert len(record["null_curve"]) == 6


def test_random_directions_are_recognised(case: Any) -> None:
    v = torch.randn(128, generator=torch.Generator().manual_seed(9))
    found = decompose(v, case.sae, k=8, n_null=64)
    assert found.explained_variance < 1.2 * float(found.null_high[-1])
    again = decompose(v, case.sae, k=8, n_null=64)
    torch.testing.assert_close(again.null_curve, found.null_curve, rtol=0, atol=0)
    assert not torch.equal(decompose(v, case.sae, k=8, n_null=64, seed=1).null_curve, found.null_curve)


def test_steering_vectors_are_checked() -> None:
    sae = toy_sae(model_name="someone/model-a")
    v = torch.randn(16)
    good = SteeringVector.of(v, hook_name=HOOK, model_name="model-a")
    assert decompose(good, sae, k=2).hook_name == HOOK
    several = SteeringVector(directions={"blocks.0.hook_resid_post": torch.ones(16), HOOK: v})
    torch.testing.assert_close(decompose(several, sae, k=2).vector, v)
    with pytest.raises(SteersmanError, match="made at 'blocks.2.hook_resid_post', the SAE at 'blocks.1"):
        decompose(SteeringVector.of(v, hook_name="blocks.2.hook_resid_post"), sae)
    with pytest.raises(SteersmanError, match="made for 'other', the SAE for 'someone/model-a'"):
        decompose(SteeringVector.of(v, hook_name=HOOK, model_name="other"), sae)


@pytest.mark.parametrize(
    ("v", "settings", "message"),
    [
        (torch.zeros(20), {}, "the vector is zero"),
        (torch.full((20,), float("nan")), {}, "the vector holds NaN"),
        ([torch.ones(20), torch.full((20,), float("inf"))], {}, "vector 1 holds NaN or infinite"),
        (torch.ones(9), {}, r"the vector has shape \[9\], the SAE has d_in 20"),
        (torch.ones(2, 9), {}, r"vector 0 has shape \[9\]"),
        ([], {}, "the list is empty"),
        ("words", {}, "no vector of numbers"),
        (None, {}, "only method 'contrast' can do without one"),
        (torch.ones(20), {"k": 0}, "k = 0 is out of range: 1 to 20"),
        (torch.ones(20), {"k": 21}, "k = 21 is out of range: 1 to 20"),
        (torch.ones(20), {"method": "encode", "k": 65}, "k = 65 is out of range: 1 to 64"),
        (torch.ones(20), {"k": None}, "method 'omp' needs a number of features"),
        (torch.ones(20), {"method": "pca"}, "unknown method 'pca'; have .*encode"),
        (torch.ones(20), {"colour": 3}, "unknown setting 'colour'"),
        (torch.ones(20), {"scale": 2.0}, "scale is a setting of"),
        (torch.ones(20), {"method": "encode", "scale": -1.0}, "scale must be a positive number"),
        (torch.ones(20), {"method": "antipodal"}, "no statistics"),
        (torch.ones(20), {"method": "contrast"}, r"'contrast' needs positive= .* and negative="),
        (torch.ones(20), {"method": "contrast", "positive": torch.ones(3, 20)}, "needs negative="),
        (torch.ones(20), {"method": "contrast", "positive": ["a"], "negative": ["b"]}, "needs the model: give lm="),
        (
            torch.ones(20),
            {"method": "contrast", "positive": torch.ones(1, 20), "negative": torch.ones(3, 20)},
            "at least 2 positive samples, got 1",
        ),
        (
            torch.ones(20),
            {"method": "contrast", "positive": torch.ones(3, 7), "negative": torch.ones(3, 20)},
            "do not fit an SAE of d_in 20",
        ),
        (torch.ones(20), {"method": "response"}, r"'response' needs activations= \(a store"),
        (torch.ones(20), {"method": "response", "activations": torch.ones(3, 9)}, "do not fit an SAE of d_in 20"),
        (torch.ones(20), {"method": "effect"}, "'effect' needs effect_map="),
        (
            torch.ones(20),
            {"method": "effect", "effect_map": SimpleNamespace(M=torch.ones(20, 3), b=torch.ones(3))},
            "effect map is of another SAE",
        ),
        (torch.ones(20), {"method": "behaviour"}, "'behaviour' needs texts= .* and lm="),
        (torch.ones(20), {"activations": torch.ones(3, 20)}, "method 'omp' does not read activations=; response would"),
    ],
)
def test_mistakes(v: Any, settings: dict[str, Any], message: str) -> None:
    sae = make_sae(d_in=20, d_sae=64)
    with pytest.raises(SteersmanError, match=message) as caught:
        decompose(v, sae, **settings)
    assert "\n" not in str(caught.value)


def test_settings_go_over_those_of_the_configuration() -> None:
    sae = make_sae(d_in=20, d_sae=64)
    found = decompose(torch.ones(20), sae, config=DecomposeConfig(method="lasso", k=3))
    assert found.method == "lasso"
    assert len(decompose(torch.ones(20), sae, DecomposeConfig(method="lasso", k=3), k=2)) == 2
