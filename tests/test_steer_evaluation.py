"""`evaluate_steering`: every measure by hand, baselines, the choice of a scale on other prompts, intervals, files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import D, count_hooks, toy_sae

from steersman import LanguageModel, Steerer, SteeringVector, evaluate_steering
from steersman.errors import SteersmanError
from steersman.steer import EvaluationConfig, SteeringEvaluation
from steersman.steer.evaluation import bootstrap
from steersman.steer.evaluation.forced import slopes
from steersman.steer.evaluation.report import ArmReport, Point, choose_scale
from steersman.steer.evaluation.rollouts import effect_measures

HOOK = "blocks.1.hook_resid_post"
V = SteeringVector.of(torch.randn(D, generator=torch.Generator().manual_seed(1)) * 2, hook_name=HOOK)
PROMPTS = ["w5 w6 w7", "w9", "w10 w11", "w12 w13", "w5"]
ITEMS = [("w5 w6", " w7 w8", " w9"), ("w10", " w11", " w12 w13"), ("w20 w21", " w22", " w23")]
CONFIG = EvaluationConfig(scale=(0.5, 2.0), max_new_tokens=6, temperature=0.0, batch_size=3, max_nll_rise=100.0)


@pytest.fixture(scope="module")
def found(lm: LanguageModel) -> SteeringEvaluation:
    return evaluate_steering(
        lm,
        V,
        PROMPTS,
        words=["w30", "w31", "w32", "w33", "w34", "w35"],
        texts=["w5 w6 w7 w8", "w9 w10"],
        continuations=ITEMS,
        positive=["w40 w41", "w40 w42"],
        negative=["w50 w51", "w52"],
        sae=toy_sae(),
        features=[3],
        judge=lambda text, criterion: float(criterion in text),
        criterion="w30",
        config=CONFIG,
    )


def test_all_baselines_are_in_the_report(found: SteeringEvaluation) -> None:
    assert list(found.arms) == ["unsteered", "vector", "random", "diffmean", "prompt"]
    assert found.missing == {}
    assert found.prompt_prefix == "w40 w41 "
    for name in ("vector", "random", "diffmean"):
        assert [p.scale for p in found.arms[name].points] == [0.0, 0.5, 2.0]
        assert found.arms[name].norm == pytest.approx(V.norm(), rel=1e-5)
    assert set(found.chosen) == set(found.arms)
    assert found.objective == "judge"


def test_generated_text_measured_by_hand(lm: LanguageModel, found: SteeringEvaluation) -> None:
    point = found.arms["vector"].points[2]
    sae = toy_sae()
    for i, prompt in enumerate(PROMPTS):
        with Steerer(lm).vector(V, scale=2.0):
            out = lm.generate(prompt, max_new_tokens=6)
            steered = lm.logits(out.tokens)[0].log_softmax(-1)
        n = int(out.new_mask.sum())
        base = lm.logits(out.tokens)[0].log_softmax(-1)
        first = out.prompt_columns
        kl = (steered.exp() * (steered - base)).sum(-1)[first - 1 : first - 1 + n]
        nll = -base[first - 1 : -1].gather(1, out.tokens[0, first:, None])[:n, 0]
        assert point.texts[i] == out.completions[0]
        assert point.values["kl"][i] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert point.values["kl_p95"][i] == pytest.approx(float(kl.quantile(0.95)), rel=1e-3)
        assert point.values["nll"][i] == pytest.approx(float(nll.mean()), rel=1e-3)
        words = out.completions[0].split()
        hits = sum(word in {"w30", "w31", "w32", "w33", "w34", "w35"} for word in words)
        assert point.values["word_rate"][i] == pytest.approx(100 * hits / len(words))
        assert point.values["has_word"][i] == float(hits > 0)
        assert point.values["judge"][i] == float("w30" in prompt + out.completions[0])
        h = lm.capture(out.tokens, hooks=[HOOK])[HOOK][0, first : first + n]
        assert point.activations is not None
        np.testing.assert_allclose(point.activations[i], sae.encode(h).detach().mean(0).numpy(), rtol=1e-3, atol=1e-4)
    plain = found.arms["unsteered"].points[0]
    assert plain.activations is not None
    assert point.activations is not None
    rise = point.activations[:, 3] - plain.activations[:, 3]
    np.testing.assert_allclose(point.values["target_rise"], rise, rtol=1e-4, atol=1e-5)
    assert not plain.values["kl"].any()


def test_effects() -> None:
    effect = np.array([[3.0, -1.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    got = effect_measures(effect, [3])
    assert got["target_rise"].tolist() == [4.0, 0.0]
    assert got["side_effects"].tolist() == [4.0, 0.0]
    assert got["specificity"][0] == pytest.approx(4 / 26**0.5)
    assert np.isnan(got["specificity"][1])
    assert set(effect_measures(effect, [])) == {"side_effects"}


def test_forced_measures_by_hand(lm: LanguageModel, found: SteeringEvaluation) -> None:
    def logp(text: str, answer: str, scale: float) -> float:
        ids = torch.tensor([lm.token_ids(text + answer, bos=True)])
        n = len(lm.token_ids(answer)) if answer else ids.shape[1] - 1
        with Steerer(lm).vector(V, scale=scale):
            p = lm.logits(ids)[0].log_softmax(-1)
        return float(p[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum())

    margin = {}
    for point in found.arms["vector"].points:
        margin[point.scale] = [logp(p, a, point.scale) - logp(p, b, point.scale) for p, a, b in ITEMS]
        np.testing.assert_allclose(point.forced["margin"], margin[point.scale], rtol=1e-3, atol=1e-3)
        loss = [-logp("w5 w6 w7 w8", "", point.scale) / 4, -logp("w9 w10", "", point.scale) / 2]
        np.testing.assert_allclose(point.forced["heldout_loss"], loss, rtol=1e-3)
    expected = np.polyfit([0.0, 0.5, 2.0], np.array([margin[s] for s in (0.0, 0.5, 2.0)]), 1)[0]
    chosen = found.chosen["vector"]
    assert chosen.slope is not None
    assert chosen.slope.mean == pytest.approx(float(expected.mean()), rel=1e-2, abs=1e-3)
    assert chosen.reversed_share == pytest.approx(float((expected < 0).mean()))
    assert slopes([0.0, 1.0], np.array([[1.0], [3.0]])).tolist() == [2.0]


def test_the_prompting_baseline_counts_only_what_it_wrote(lm: LanguageModel, found: SteeringEvaluation) -> None:
    point = found.arms["prompt"].points[0]
    out = lm.generate("w40 w41 " + PROMPTS[0], max_new_tokens=6)
    assert point.texts[0] == out.completions[0]
    new = out.new_tokens[0][out.new_mask[0].bool()]
    ids = torch.cat([torch.tensor(lm.token_ids(PROMPTS[0], bos=True)), new])[None]
    p = lm.logits(ids)[0].log_softmax(-1)
    nll = -p[-len(new) - 1 : -1].gather(1, new[:, None]).mean()
    assert point.values["nll"][0] == pytest.approx(float(nll), rel=1e-3)
    assert point.values["kl"].min() > 0


def test_the_scale_is_chosen_on_one_half_and_reported_on_the_other() -> None:
    def point(scale: float, rate: list[float], nll: list[float]) -> Point:
        return Point(scale=scale, values={"word_rate": np.array(rate), "nll": np.array(nll)}, forced={}, texts=[])

    plain = point(0.0, [0, 0, 0, 0], [1, 1, 1, 1])
    weak = point(1.0, [2, 50, 4, 60], [1.5, 9, 1.5, 9])
    strong = point(2.0, [9, 1, 9, 1], [1.9, 1, 1.9, 1])
    ruinous = point(4.0, [90, 2, 90, 2], [5, 1, 5, 1])
    arm = ArmReport(name="vector", points=[plain, weak, strong, ruinous], norm=1.0)
    chosen = choose_scale(arm, plain, "word_rate", 1.0)
    assert chosen.scale == 2.0, "the odd prompts must not choose, nor a scale that costs too much"
    assert chosen.estimates["word_rate"].mean == 1.0, "the even prompts must not report"
    assert chosen.estimates["word_rate"].n == 2
    assert choose_scale(arm, plain, "word_rate", 10.0).scale == 4.0
    assert choose_scale(arm, plain, "scale", 1.0).scale == 2.0


def test_bootstrap() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    got = bootstrap(x)
    assert got is not None
    assert got.mean == pytest.approx(x.mean())
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.1)
    again, without = bootstrap(x), bootstrap([np.nan, 1.0, 2.0])
    assert again == got
    assert without is not None
    assert without.n == 2
    assert bootstrap([np.nan]) is bootstrap([]) is None


def test_files_and_table(found: SteeringEvaluation, tmp_path: Path) -> None:
    found.save(tmp_path / "report")
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "curves.png",
        "evaluation.json",
        "evaluation.txt",
    ]
    data = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert data["vector"]["norm"] == pytest.approx(V.norm())
    assert len(data["arms"]["vector"]["points"][1]["per_prompt"]["kl"]) == len(PROMPTS)
    assert data["config"]["scale"] == [0.5, 2.0]
    table = found.to_text()
    assert all(name in table for name in ("unsteered", "vector", "random", "diffmean", "prompt", "kl_p95", "margin"))
    assert (tmp_path / "report" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_little_is_enough(lm: LanguageModel) -> None:
    config = EvaluationConfig(scale=(1.0,), max_new_tokens=3, samples=2, seed=4)
    got = evaluate_steering(lm, V, PROMPTS[:2], config=config)
    assert set(got.missing) == {"diffmean", "prompt"}
    assert got.objective == "scale"
    assert len(got.arms["vector"].points[1].texts) == 4
    assert "not measured, no positive and negative examples" in got.to_text()
    again = evaluate_steering(lm, V, PROMPTS[:2], config=config)
    assert again.to_json() == got.to_json()
    assert count_hooks(lm.model) == 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": ["w5"]}, "at least 2 prompts"),
    ({"prompts": ["w5", " "]}, "prompt 1 is empty"),
    ({"texts": [""]}, "text 0 is empty"),
    ({"vector": V - V}, "is zero"),
    ({"vector": SteeringVector.of(torch.ones(5), hook_name=HOOK)}, "of llama has width 16"),
    ({"vector": SteeringVector.of(torch.ones(D), hook_name=HOOK, model_name="gpt2")}, "made for 'gpt2'"),
    ({"features": [3]}, "need the SAE"),
    ({"sae": toy_sae(), "features": [400]}, "400"),
    ({"sae": toy_sae(model_name="gpt2")}, "this SAE was made for 'gpt2'"),
    ({"continuations": ["w5"]}, "continuation 0 must have"),
    ({"continuations": [("w5", " w6", "")]}, "continuation 0 is empty on one side"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[w[1] for w in WRONG])
def test_wrong_input(lm: LanguageModel, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"vector": V, "prompts": PROMPTS, **options}
    with pytest.raises(SteersmanError, match=message):
        evaluate_steering(lm, arguments.pop("vector"), arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (1.0, 1.0)}, "a scale is repeated"),
        ({"samples": 0}, "at least 1"),
        ({"temperature": 0.0, "samples": 2}, "greedy"),
        ({"temperature": -1.0}, "greedy"),
        ({"scale": (float("nan"),)}, "finite"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        EvaluationConfig(**options)
