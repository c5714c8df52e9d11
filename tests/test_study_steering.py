"""The comparison of ways to steer: its measures, what is written under many vectors at once, its rows and its page."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steersman import LanguageModel, Steerer, SteeringVector
from steersman.steer import repetition_rate
from study import measures, steering, writer
from study.common import Study
from study.report import markdown
from study.steering_page import page

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load("steersman-demo", device="cpu")


def random_vector(lm: LanguageModel, seed: int) -> SteeringVector:
    direction = torch.randn(lm.hook_width(HOOK), generator=torch.Generator().manual_seed(seed))
    return SteeringVector.of(direction, hook_name=HOOK, model_name=lm.name)


def test_a_classifier_tells_texts_by_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "PACKAGE", "no_such_package")
    embed = measures.Embedder()
    assert embed.name == "hashed words"
    told = measures.Classifier.fit(embed, [["a red ball"], ["the red kite"]], [["a blue ball"], ["the blue kite"]])
    red, blue = told(["red shoes", "blue shoes"])
    assert red > 0.6 > 0.4 > blue
    assert told.auroc(["red"], ["blue"]) == 1.0


def test_scores_are_those_of_the_page() -> None:
    assert measures.overall(2.0, 1.0) == pytest.approx(4 / 3)
    assert measures.overall(0.0, 2.0) == measures.overall(2.0, 0.0) == 0
    assert measures.fluency(1.0, 3.0, 0.0) == 2.0
    assert measures.fluency(3.0 + math.log(2), 3.0, 0.5) == pytest.approx(0.5)
    assert repetition_rate([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(0.6)
    assert measures.lexical_rate("Red, red wine and a RED hat", ["red"]) == pytest.approx(300 / 7)
    assert measures.characteristic_words(["the red ball", "a red kite"], ["the blue ball", "a blue kite"])[0] == "red"


def test_many_vectors_at_once_write_what_each_writes_alone(lm: LanguageModel) -> None:
    prompts = ["One day Tom", "The dog ran to the"]
    v = random_vector(lm, 1)
    sizes = torch.tensor([0.0, 15.0])
    wrote = writer.Writer(lm, HOOK, 6).write(prompts, sizes[:, None] * v.vector / v.norm(), chat=False)
    for row, size in enumerate(sizes.tolist()):
        with Steerer(lm).vector(v / v.norm(), scale=size, scope="last_prompt+generation"):
            alone = lm.generate(prompts, max_new_tokens=6)
        assert [text.strip() for text in wrote.texts[row]] == [text.strip() for text in alone.completions]
    assert wrote.kl[0] == pytest.approx([0, 0], abs=1e-6)
    assert min(wrote.kl[1]) > 0.01
    assert wrote.texts[0] != wrote.texts[1]


def test_a_run_resumes_and_has_a_page(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(_study: Study, topic: Any, method: str) -> SteeringVector:
        return random_vector(lm, sum(map(ord, method + topic.name)))

    monkeypatch.setattr(measures, "PACKAGE", "no_such_package")
    monkeypatch.setattr(steering, "GROUPS", {"": ("prompting",), "vectors": ("caa",), "targeted": ("sae_ts", "fgaa")})
    monkeypatch.setattr(steering, "vector", made)
    monkeypatch.setattr(steering, "has_effects", lambda _study, _times: True)
    monkeypatch.setattr(steering, "best_features", lambda _study, _topic: [0])
    monkeypatch.setattr(steering, "fgaa_targets", lambda *_args: {0: 1.0})
    monkeypatch.setattr(Study, "sae", lambda _study: None)
    monkeypatch.setattr(Study, "targeted", lambda _study, _targets, method="fgaa": random_vector(lm, len(method)))
    config = steering.Config(
        small=True, work=tmp_path, concepts=1, goals=1, budgets=(0.3,), prompts=2, new_tokens=4, items=1, neutral=2
    )
    steering.main(config)
    path = tmp_path / "results" / "steering.json"
    whole = json.loads(path.read_text())
    assert set(whole["planned"]) == {name for name in whole["rows"] if name != "about"}
    points = [p for name in ("goal 00 vectors", "concept 00 targeted") for p in whole["rows"][name]["methods"].values()]
    assert all(point[0][1] == pytest.approx(0.3, rel=0.1) for point in points)
    part = whole | {"rows": {k: v for k, v in whole["rows"].items() if k != "concept 00 vectors"}}
    path.write_text(json.dumps(part))
    steering.main(config)
    assert json.loads(path.read_text())["rows"] == whole["rows"]
    path.unlink()
    # what was written is kept, for measures that change
    monkeypatch.setattr(writer.Writer, "write", lambda *_given, **_more: pytest.fail("written again"))
    steering.main(config)
    assert json.loads(path.read_text())["rows"] == whole["rows"]
    assert "1 goals and 1 concepts" in markdown(page(whole), whole)


@pytest.mark.parametrize(("gap", "said"), [(0.5, "beats the plain feature at every KL"), (-0.5, "does not beat")])
def test_the_pages_words_follow_its_figures(gap: float, said: str) -> None:
    def point(budget: float | None, score: float) -> list[Any]:
        figures = dict.fromkeys(steering.COLUMNS, score) | {"budget": budget, "kl": budget, "each": [score]}
        return [figures[name] for name in steering.COLUMNS]

    rows: dict[str, Any] = {"about": {
        "columns": steering.COLUMNS, "embedding": "words", "natural_nll": 2.0, "median_norm": 1.0, "neutral_tokens": 9,
    }}  # fmt: skip
    for i in range(6):
        score = 1 + i / 100
        base = {"name": str(i), "auroc": 0.9, "auroc_others": 0.8, "asked": [1], "unsteered": point(None, 0.1)}
        rows[f"goal {i:02}"] = base | {
            "methods": {"prompting": [point(None, score)]},
        }
        rows[f"goal {i:02} vectors"] = {"methods": {"feature": [point(0.3, score)]}, "missing": {"probe": "none"}}
        rows[f"goal {i:02} targeted"] = {"methods": {"sae_ts": [point(0.3, score + gap)]}, "missing": {}}
    settings = {"budgets": [0.3], "prompts": 2, "new_tokens": 4, "items": 1, "item_tokens": 4, "layer": 2, "seed": 0}
    made = page({"part": "steering", "rows": rows, "settings": settings})
    assert said in made.answer
    assert made.not_run == ["probe on 6 of 6 topics, which gave it no vector"]
