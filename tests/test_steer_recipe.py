"""Recipes: several edits as one context, their files, their strength, and one line for each mistake."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import D, count_hooks, toy_sae, with_text

from steersman import LanguageModel, Steerer, SteeringVector
from steersman.errors import SteersmanError
from steersman.steer import Recipe, calibrate, evaluate_steering, steered
from steersman.steer.edits import EditSet, VectorEdit, gated
from steersman.steer.measures import CostMeter

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["w5 w6 w7 w8", "w9 w10 w11"]
V = SteeringVector.of(torch.randn(D, generator=torch.Generator().manual_seed(0)), hook_name=HOOK)
W = SteeringVector.of(torch.randn(D, generator=torch.Generator().manual_seed(1)), hook_name="blocks.0.hook_mlp_out")

FILE = """\
model: llama
scope: generation
edits:
  - vector: v.safetensors
    scale: 2.0
  - features: {sae: sae, ids: {3: 1.5, 7: -2}, mode: add}
    scope: all
  - edit: kept.safetensors
    schedule: diminishing:4
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    V.save(tmp_path / "v.safetensors")
    toy_sae().save(tmp_path / "sae")
    EditSet(edits={W.hook_name: VectorEdit(W.vector)}, scope="all").save(tmp_path / "kept.safetensors")
    (tmp_path / "recipe.yaml").write_text(FILE)
    return tmp_path


def text(lm: LanguageModel) -> list[int]:
    return lm.generate("w5 w6", max_new_tokens=6).tokens[0].tolist()


def logits(lm: LanguageModel) -> torch.Tensor:
    batch = lm.encode(TEXTS)
    return lm.logits(batch.input_ids, batch.attention_mask, prompt_length=2)


def test_a_recipe_is_its_edits_one_after_the_other(lm: LanguageModel, folder: Path) -> None:
    recipe = Recipe.load(folder / "recipe.yaml")
    st = Steerer(lm)
    kept = gated(VectorEdit(W.vector), 1.0, "diminishing:4")

    def by_hand(scale: float) -> tuple[Any, Any]:
        with (
            st.vector(V, scale=2.0 * scale, scope="generation"),
            st.features(toy_sae(), {3: 1.5, 7: -2.0}, scope="all", gate=scale),
            st.edit(W.hook_name, kept.scaled(scale)),
        ):
            return text(lm), logits(lm)

    for scale in (1.0, 0.5, 0.0):
        with recipe.apply(lm, scale):
            found = text(lm), logits(lm)
        expected = by_hand(scale)
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])
    assert torch.equal(logits(lm), by_hand(0.0)[1]), "scale 0 is the unsteered model, bit for bit"
    assert count_hooks(lm.model) == 0


def test_a_recipe_comes_back_from_its_file(lm: LanguageModel, folder: Path) -> None:
    recipe = Recipe.load(folder / "recipe.yaml").of(lm).times(1.5)
    recipe.save(folder / "again" / "r.yaml")
    again = Recipe.load(folder / "again" / "r.yaml")
    written = (folder / "again" / "r.yaml").read_text()
    assert "../v.safetensors" in written, "paths are relative to the recipe's folder"
    assert again.model == lm.name
    assert again.scale == 1.5
    with recipe.apply(lm), torch.no_grad():
        expected = logits(lm)
    with again.apply(lm) as steering:
        assert torch.equal(logits(lm), expected)
    assert len(steering.steerings) == 3
    assert steering.trace.count > 0
    again.save(folder / "again" / "s.yaml")
    assert (folder / "again" / "s.yaml").read_text() == written


def test_a_recipe_has_a_strength(lm: LanguageModel, folder: Path) -> None:
    recipe = Recipe.load(folder / "recipe.yaml")
    found = calibrate(recipe, lm, texts=TEXTS, target_kl=0.005)
    assert found.search.converged
    meter = CostMeter(lm, TEXTS)
    assert meter.cost("kl", lambda: steered(found.vector, lm)) == pytest.approx(found.search.value, rel=1e-4)
    assert isinstance(found.vector, Recipe)
    assert found.vector.metadata["calibration"]["budget"] == "kl"
    report = evaluate_steering(lm, recipe, TEXTS, texts=TEXTS, scale=(1.0,), max_new_tokens=3)
    assert report.vector["kinds"] == ["vector", "features", "edit"]


def test_budgets_of_a_recipe_are_met_before_it_opens(lm: LanguageModel, folder: Path) -> None:
    path = folder / "budget.yaml"
    path.write_text(
        "target_kl: 0.01\nedits:\n  - {vector: v.safetensors, target_kl: 0.004}\n  - edit: kept.safetensors\n"
    )
    recipe = Recipe.load(path)
    met = recipe.calibrated(lm, TEXTS)
    assert met.target_kl is None
    meter = CostMeter(lm, TEXTS)
    assert meter.cost("kl", lambda: steered(met, lm)) == pytest.approx(0.01, rel=0.06)
    alone = Recipe([met.edits[0]])
    assert meter.cost("kl", lambda: steered(alone, lm)) == pytest.approx(0.004, rel=0.06)
    with recipe.apply(lm):  # on texts of the model's own, and once
        first = logits(lm)
    assert recipe.calibrated(lm) is recipe.calibrated(lm)
    with recipe.apply(lm):
        assert torch.equal(logits(lm), first)


def test_a_direction_and_a_preset_are_entries(lm: LanguageModel, folder: Path) -> None:
    (folder / "d.yaml").write_text(
        "edits:\n  - direction: {read: v.safetensors, rule: cap, value: {1: 0.5}}\n"
        "  - direction: {sae: sae, feature: 3, rule: floor, value: 2}\n"
        "  - preset: {name: personality, sae: sae, features: {3: 1.5}}\n"
    )
    recipe = Recipe.load(folder / "d.yaml")
    st, sae = Steerer(lm), toy_sae()
    with (
        st.direction(read=V, rule="cap", value=0.5),
        st.features(sae, {3: 2.0}, mode="floor"),
        st.features(sae, {3: 1.5}),
    ):
        expected = logits(lm)
    with recipe.apply(lm):
        assert torch.equal(logits(lm), expected)
    recipe.save(folder / "e.yaml")
    with Recipe.load(folder / "e.yaml").apply(lm):
        assert torch.equal(logits(lm), expected)
    (folder / "d.yaml").write_text("edits:\n  - direction: {rule: cap}\n")
    with pytest.raises(SteersmanError, match="direction needs read"):
        Recipe.load(folder / "d.yaml").apply(lm)
    (folder / "d.yaml").write_text("edits:\n  - preset: {name: safety_arithmetic, base: x}\n")
    with pytest.raises(SteersmanError, match="preset 'safety_arithmetic' needs tuned"):
        Recipe.load(folder / "d.yaml").apply(lm)


WRONG = [
    ("edits: []", "holds no edit"),
    ("- a", "must hold a mapping"),
    ("edit:\n  - vector: v", "unknown key 'edit'; near it: edits"),
    ("edits:\n  - vektor: v.safetensors", "edit 1: unknown key 'vektor'; near it: vector"),
    ("edits:\n  - {vector: v.safetensors, scle: 2}", "edit 1: unknown key 'scle'; near it: scale"),
    ("edits:\n  - {scale: 2}", "edit 1 needs one kind of edit"),
    ("edits:\n  - {vector: v.safetensors, edit: kept.safetensors}", "it has vector, edit"),
    ("edits:\n  - features: {sae: sae, id: {1: 2}}", "edit 1, features: unknown key 'id'; near it: ids"),
    ("edits:\n  - features: {sae: sae}", "edit 1, features needs ids"),
    ("edits:\n  - features: sae", "it should be a mapping"),
    ("edits:\n  - {vector: v.safetensors, scale: much}", "scale is 'much', it should be"),
    ("edits:\n  - preset: {name: kast}", "unknown preset 'kast'"),
    ("edits:\n  - preset: {vector: v}", "preset needs name"),
    ("edits:\n  - vector: &v v.safetensors\n  - vector: *v", "an alias"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message for _, message in WRONG])
def test_mistakes_are_one_line_before_anything_is_opened(content: str, message: str, folder: Path) -> None:
    path = folder / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(SteersmanError) as error:
        Recipe.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_of_another_model_or_template_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load(folder / "recipe.yaml")
    with pytest.raises(SteersmanError, match="made for 'llama', not for 'gpt2'"):
        recipe.apply(with_text("gpt2"))
    with pytest.raises(SteersmanError, match="at least one edit"):
        Recipe([])
