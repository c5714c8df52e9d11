"""Calibration: the search on known curves, and a vector to a KL, a loss or a norm on a real model."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steersman import LanguageModel, Steerer, SteeringVector
from steersman.demo import MODEL_PATH, texts
from steersman.errors import SteersmanError
from steersman.steer import calibrate, search_scale
from steersman.steer.measures import CostMeter, median_norms, own_texts

HOOK = "blocks.2.hook_resid_post"
LIMITS: dict[str, Any] = {"start": 0.5, "low": 1e-3, "high": 8.0}

CURVES: dict[str, Callable[[float], float]] = {
    "square": lambda s: 2 * s * s,
    "linear": lambda s: 1.2 * s,
    "saturates": lambda s: 12 * s**4 / (0.5 + s**4),
    "quiet, then steep": lambda s: 0.01 * s * s + 3 * s**5 / (1 + s**5),
    "overflows": lambda s: s * s if s < 1.5 else float("inf"),
    "not a number": lambda s: s * s if s < 1.5 else float("nan"),
}


@pytest.mark.parametrize("target", [0.05, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", CURVES)
def test_search_meets_the_budget_in_eight_evaluations(name: str, target: float) -> None:
    for stretch in (0.3, 1.0, 3.0):
        cost, seen = CURVES[name], []

        def measured(s: float, cost: Callable[[float], float] = cost, stretch: float = stretch) -> float:
            seen.append(s)  # noqa: B023
            return cost(s * stretch)

        found = search_scale(measured, target, **LIMITS)
        assert found.converged, (stretch, found)
        assert found.value == pytest.approx(target, rel=0.05)
        assert found.value == measured(found.scale)
        assert [s for s, _ in found.evaluations] == seen[:-1]
        assert len(found.evaluations) <= 8


def test_target_already_exceeded() -> None:
    found = search_scale(lambda s: 5 + s, 1.0, **LIMITS)
    assert (found.reason, found.converged, found.scale) == ("exceeded", False, LIMITS["low"])
    assert found.value == 5 + LIMITS["low"]
    assert len(found.evaluations) <= 8


@pytest.mark.parametrize("cost", [lambda s: s / (1 + s), lambda s: 0.0, lambda s: -s])
def test_target_unreachable(cost: Callable[[float], float]) -> None:
    found = search_scale(cost, 1.0, **LIMITS)
    assert (found.reason, found.converged, found.scale) == ("unreachable", False, LIMITS["high"])
    assert found.value == cost(LIMITS["high"])
    assert len(found.evaluations) <= 8


def test_a_jump_over_the_budget_is_not_called_converged() -> None:
    found = search_scale(lambda s: 0.1 if s < 1 else 3.0, 1.0, **LIMITS)
    assert (found.reason, found.converged) == ("evaluations", False)
    assert len(found.evaluations) == 8
    assert found.value == (0.1 if found.scale < 1 else 3.0), "what is reported was measured there"


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_wrong_budgets(target: float) -> None:
    with pytest.raises(SteersmanError, match="a budget must be a number above 0"):
        search_scale(lambda s: s, target, **LIMITS)


def test_wrong_limits() -> None:
    with pytest.raises(SteersmanError, match="0 < lowest <= highest"):
        search_scale(lambda s: s, 1.0, start=1.0, low=2.0, high=1.0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(str(MODEL_PATH), device="cpu")


@pytest.fixture(scope="module")
def v(lm: LanguageModel) -> SteeringVector:
    snow = [f"{name} saw the snow and the frost ." for name in ("Anna", "Tom", "Mia", "Ben")]
    fog = [f"{name} saw the fog and the mist ." for name in ("Anna", "Tom", "Mia", "Ben")]
    return SteeringVector.contrast(lm, snow, fog, hook=HOOK)


@pytest.mark.parametrize("budget", ["kl", "loss"])
def test_a_vector_to_a_budget(lm: LanguageModel, v: SteeringVector, budget: str) -> None:
    held = texts(12, seed=3)
    goal: dict[str, Any] = {f"target_{budget}": 0.4}
    found = calibrate(v, Steerer(lm), texts=held, **goal)
    assert found.search.converged
    assert len(found.search.evaluations) <= 8
    total, n = 0.0, 0
    for text in held:  # by hand, a text at a time
        ids = lm.encode([text]).input_ids
        base = lm.logits(ids)[0, :-1].log_softmax(-1)
        with Steerer(lm).vector(found.vector):
            steered = lm.logits(ids)[0, :-1].log_softmax(-1)
        if budget == "kl":
            total += float((steered.exp() * (steered - base)).sum())
        else:
            total += float((base - steered).gather(1, ids[0, 1:, None]).sum())
        n += ids.shape[1] - 1
    assert total / n == pytest.approx(found.search.value, rel=1e-3)
    assert total / n == pytest.approx(0.4, rel=0.05)
    assert found.vector.cosine(v) == pytest.approx(1)
    record = found.vector.metadata["calibration"]
    assert (record["budget"], record["converged"], record["n_tokens"]) == (budget, True, n)
    assert found.vector.metadata["n_positive"] == 4, "provenance is kept"
    assert v.calibrate(lm, texts=held, **goal).vector.equal(found.vector.vector)


def test_a_share_of_the_norm(lm: LanguageModel, v: SteeringVector) -> None:
    held = texts(8, seed=3)
    states = lm.capture(*(lambda b: (b.input_ids, b.attention_mask))(batch := lm.encode(held)), hooks=[HOOK])[HOOK]
    real = batch.attention_mask.bool() & (batch.input_ids != lm.bos_token_id)
    median = float(states.norm(dim=-1)[real].median())
    assert median_norms(lm, held, [HOOK], batch_size=3) == {HOOK: pytest.approx(median)}
    found = calibrate(v, lm, texts=held, target_norm=0.25)
    assert found.vector.norm() == pytest.approx(0.25 * median, rel=1e-4)
    assert found.search.evaluations == []


def test_without_texts_the_model_writes_its_own(lm: LanguageModel, v: SteeringVector) -> None:
    state = torch.random.get_rng_state()
    one, two = own_texts(lm, 1), own_texts(lm, 1)
    assert torch.equal(one.input_ids, two.input_ids)
    assert not torch.equal(one.input_ids, own_texts(lm, 2).input_ids)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert calibrate(v, Steerer(lm), target_kl=0.3).search.converged


def test_scope_counts(lm: LanguageModel, v: SteeringVector) -> None:
    meter = CostMeter(lm, texts(4, seed=3))
    st = Steerer(lm)
    assert (
        meter.cost("kl", lambda: st.vector(v, scale=3.0))
        > meter.cost("kl", lambda: st.vector(v, scale=3.0, scope="2:5"))
        > 0
    )
    assert meter.cost("kl", lambda: st.vector(v, scale=0.0)) == 0


def test_budgets_out_of_reach(lm: LanguageModel, v: SteeringVector, caplog: pytest.LogCaptureFixture) -> None:
    held = texts(4, seed=3)
    with caplog.at_level(logging.WARNING):
        found = calibrate(v, lm, texts=held, target_kl=100.0)
    assert found.search.reason == "unreachable"
    assert found.vector.metadata["calibration"]["converged"] is False
    assert "NOT converged (unreachable)" in caplog.text
    with pytest.raises(SteersmanError, match="the kl budget of 100 is not reached: at scale .* it is"):
        v.calibrate(lm, texts=held, target_kl=100.0)
    assert calibrate(v, lm, texts=held, target_loss=1e-9).search.reason in ("exceeded", "evaluations")
    with pytest.raises(SteersmanError, match="the kl budget of 1e-12 is exceeded at every scale"):
        v.calibrate(lm, texts=held, target_kl=1e-12)
    few = calibrate(v, lm, texts=held, target_kl=0.5, max_evaluations=1)
    assert few.search.reason == "evaluations"
    assert not few.search.converged


def test_wrong_calibrations(lm: LanguageModel, v: SteeringVector) -> None:
    wrong: list[dict[str, Any]] = [{}, {"target_kl": 0.5, "target_norm": 0.5}]
    for options in wrong:
        with pytest.raises(SteersmanError, match="exactly one budget"):
            v.calibrate(lm, **options)
    with pytest.raises(SteersmanError, match="target_kl must be a number above 0"):
        v.calibrate(lm, target_kl=0.0)
    with pytest.raises(SteersmanError, match="unknown setting 'kl'"):
        v.calibrate(lm, kl=1.0)
    with pytest.raises(SteersmanError, match="is zero"):
        (v - v).calibrate(lm, target_kl=0.5)
    with pytest.raises(SteersmanError, match="made for 'gpt2'"):
        SteeringVector.of(v.vector, hook_name=HOOK, model_name="gpt2").calibrate(lm, target_kl=0.5)
    with pytest.raises(SteersmanError, match="text 1 is empty"):
        v.calibrate(lm, texts=["Once", " "], target_kl=0.5)
    with pytest.raises(SteersmanError, match="no texts to measure on"):
        v.calibrate(lm, texts=[], target_kl=0.5)
    with pytest.raises(SteersmanError, match="tolerance"):
        v.calibrate(lm, target_kl=0.5, tolerance=0.0)
