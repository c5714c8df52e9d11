"""Anything that has a strength is calibrated and evaluated: a vector, edits at hook points, a function of the scale."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.tiny_models import D, toy_sae

from steersman import LanguageModel, Steerer, SteeringVector, SteersmanError
from steersman.steer import EditSet, FeatureSet, calibrate, evaluate_steering
from steersman.steer.edits import AttentionBiasEdit, Edit, FunctionEdit, LogitsEdit, VectorEdit
from steersman.steer.measures import CostMeter

HOOK = "blocks.1.hook_resid_post"
DIRECTION = torch.randn(D, generator=torch.Generator().manual_seed(0))
VECTOR = SteeringVector.of(DIRECTION, hook_name=HOOK)
TEXTS = ["w5 w6 w7 w8", "w9 w10 w11"]


def ways(lm: LanguageModel) -> dict[str, Any]:
    """The same steering as a vector, as edits and as a function."""
    steerer = Steerer(lm)

    @contextmanager
    def steer(scale: float) -> Iterator[None]:
        with steerer.vector(VECTOR, scale=scale):
            yield

    return {"vector": VECTOR, "edits": {HOOK: VectorEdit(DIRECTION)}, "function": steer}


@pytest.mark.parametrize("way", ["edits", "function"])
def test_calibration_finds_the_scale_of_anything(lm: LanguageModel, way: str) -> None:
    what = ways(lm)[way]
    calibration = calibrate(what, lm, texts=TEXTS, target_kl=0.02)
    assert calibration.search.converged
    reference = calibrate(VECTOR, lm, texts=TEXTS, target_kl=0.02)
    assert calibration.search.scale == pytest.approx(reference.search.scale, rel=0.05)
    again = calibrate(calibration.vector, lm, texts=TEXTS, target_kl=calibration.search.value, tolerance=0.01)
    assert again.search.scale == pytest.approx(1, rel=0.01), "what is returned is already scaled"
    with pytest.raises(SteersmanError, match="target_norm is for vectors"):
        calibrate(what, lm, target_norm=0.5)


def test_evaluation_measures_the_same_for_anything(lm: LanguageModel) -> None:
    settings: dict[str, Any] = {"scale": (1.0, 2.0), "max_new_tokens": 4}
    reports = {name: evaluate_steering(lm, what, TEXTS, texts=TEXTS, **settings) for name, what in ways(lm).items()}
    for name in ("edits", "function"):
        assert set(reports[name].arms) == {"unsteered", "vector"}
        assert "no vector" in reports[name].missing["random"]
        for a, b in zip(reports[name].arms["vector"].points, reports["vector"].arms["vector"].points):
            assert a.texts == b.texts
            assert a.forced["heldout_loss"].tolist() == pytest.approx(b.forced["heldout_loss"].tolist())
        assert reports[name].to_json()["arms"]["vector"]["norm"] is None
        assert "vector" in reports[name].to_text()


@pytest.mark.parametrize(
    ("hook", "edit"),
    [
        ("logits", LogitsEdit({7: 1.0, 30: -2.0})),
        ("logits", FunctionEdit(lambda logits, fwd: logits.flip(-1))),
        ("blocks.1.hook_attn_mask", AttentionBiasEdit(1.0, keys=[(1, 3)], heads=[1])),
        ("blocks.1.attn.hook_z", VectorEdit(torch.linspace(-1, 1, D))),
    ],
    ids=["tokens", "function", "attention", "heads"],
)
def test_what_is_no_residual_vector_is_calibrated_and_evaluated(lm: LanguageModel, hook: str, edit: Edit) -> None:
    """By KL, at the logits too, where there is neither a width nor a norm of the residual stream."""
    calibration = calibrate({hook: edit}, lm, texts=TEXTS, target_kl=0.001)
    assert calibration.search.converged, str(calibration)
    meter = CostMeter(lm, TEXTS, batch_size=16, max_length=128, seed=0)
    scaled = calibration.vector[hook]
    assert meter.cost("kl", lambda: Steerer(lm).edit(hook, scaled)) == pytest.approx(calibration.search.value, rel=1e-4)
    report = evaluate_steering(lm, {hook: edit}, TEXTS, texts=TEXTS, words=["w7"], scale=(1.0, 4.0), max_new_tokens=3)
    losses = [point.forced["heldout_loss"] for point in report.arms["vector"].points]
    assert len(losses) == 3
    assert not (losses[0] == losses[2]).all()


def test_a_token_made_likelier_is_written_more_often(lm: LanguageModel) -> None:
    report = evaluate_steering(
        lm, {"logits": LogitsEdit({7: 1.0})}, TEXTS, words=["w7"], scale=(50.0,), max_new_tokens=4
    )
    rates = {point.scale: float(point.values["word_rate"].mean()) for point in report.arms["vector"].points}
    assert rates[50.0] > 50 > rates[0.0]


def test_sets_of_features_and_edits_of_files_go_through_both(lm: LanguageModel) -> None:
    """Edits of a file act in the scope that they are meant for, unless another is asked for."""
    chosen = FeatureSet(strengths={HOOK: {3: 2.0, 7: -1.0}})
    with pytest.raises(SteersmanError, match=r"give \.edits\(saes\)"):
        calibrate(chosen, lm, texts=TEXTS, target_kl=0.01)  # pyright: ignore
    edits = chosen.edits(toy_sae(HOOK))
    found = calibrate(edits, lm, texts=TEXTS, target_kl=0.002)
    assert found.search.converged
    evaluate_steering(lm, edits, TEXTS, scale=(1.0,), max_new_tokens=2)
    kept = EditSet(edits=edits, scope="1:2", model_name=lm.name)
    own, wide = (calibrate(kept, lm, texts=TEXTS, target_kl=0.0005, scope=scope) for scope in (None, "all"))
    assert own.search.scale > 1.05 * wide.search.scale, "one token in place of all"
    report = evaluate_steering(lm, own.vector, TEXTS, scale=(1.0,), max_new_tokens=2)
    assert report.vector["method"] in ("edits", "")
