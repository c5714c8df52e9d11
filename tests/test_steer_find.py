"""Features found from texts that should and should not activate them, and by words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.word_features import word_model, word_sae

from steersman import SAE, LanguageModel
from steersman.errors import SteersmanError
from steersman.sae import FeatureLabel, FeatureLabels
from steersman.steer import FindConfig, FoundFeature, FoundFeatures, find_features
from steersman.steer.analysis.find import _held_out, _ranked
from steersman.train import WordMatch, search_features
from steersman.train.reports.search import read_feature_records

POSITIVE = [f"w{i} w7 w{i + 1} w9" for i in range(20, 28)]
NEGATIVE = [f"w{i} w6 w{i + 1} w9" for i in range(20, 28)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return word_model()


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    made = word_sae(lm)
    made.labels = FeatureLabels({3: FeatureLabel(text="the word w7")})
    return made


def test_the_planted_feature_is_found_with_its_scores(lm: LanguageModel, sae: SAE) -> None:
    found: FoundFeatures = find_features(lm, sae, POSITIVE, NEGATIVE)
    assert [one.feature for one in found] == [3]  # of the others none is more active on the positive texts
    best: FoundFeature = found[0]
    assert (best.auroc, best.difference, best.label) == (1.0, 2.0, "the word w7")
    assert found[0].output is not None
    assert found.output_by_chance is not None
    assert "the word w7" in found.to_text()
    assert "the word w7" in found._repr_html_()
    assert find_features(lm, sae, NEGATIVE, POSITIVE, output=False)[0].feature == 2


def test_the_bos_takes_no_part(lm: LanguageModel, sae: SAE) -> None:
    """A feature of the BOS is as strong in both sides, and would be in a text's mean."""
    found = find_features(lm, sae, ["w7"] * 4, ["w6 w20 w20"] * 4, pool="mean", output=False)
    assert [one.feature for one in found] == [3]
    assert found[0].difference == 2.0


def test_without_an_output_score_it_is_said_why(lm: LanguageModel, sae: SAE) -> None:
    stats, sae.feature_stats = sae.feature_stats, None
    try:
        found = find_features(lm, sae, POSITIVE, NEGATIVE)
    finally:
        sae.feature_stats = stats
    assert found[0].output is None
    assert found.no_output
    assert found.no_output in found.to_text()


def test_nothing_to_find(lm: LanguageModel, sae: SAE) -> None:
    found = find_features(lm, sae, ["w20"] * 3, ["w21"] * 3)
    assert len(found) == 0
    assert "no feature is more active" in found.to_text()


@pytest.mark.parametrize(
    ("positive", "negative", "settings", "said"),
    [
        (["w7"], ["w6", "w8"], {}, "at least 2"),
        (["w7", "w7"], ["w6", " "], {}, "empty"),
        (["w7", "w7"], ["w6", "w8"], {"top": 0}, "top must be"),
        (["w7", "w7"], ["w6", "w8"], {"tops": 1}, "tops"),
    ],
)
def test_refused(
    lm: LanguageModel, sae: SAE, positive: list[str], negative: list[str], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SteersmanError, match=said):
        find_features(lm, sae, positive, negative, **settings)


def test_the_half_that_chooses_a_feature_does_not_measure_it() -> None:
    """Of 4000 features of noise, the best looks perfect on the texts it was chosen on, and is chance on the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 4000, generator=generator)
    labels = torch.arange(40) < 20
    known = _held_out(x, labels, FindConfig())
    chosen = known != 0.5
    assert 20 <= int(chosen.sum()) <= 40
    assert float(known[chosen].mean()) == pytest.approx(0.5, abs=0.06)
    x[labels, 7] += 1.0  # and a feature that knows is first
    assert _ranked(x, labels, FindConfig())[0][0] == 7


def test_of_features_that_all_separate_the_clearest_is_first() -> None:
    labels = torch.arange(20) < 10
    x = torch.zeros(20, 3)
    x[labels, 0] = torch.linspace(0.1, 10, 10)  # loud on some
    x[labels, 1] = 1.0  # the same on all
    x[labels, 2] = 5.0
    x[10, 2] = 5.0  # and on one that should not
    assert _ranked(x, labels, FindConfig())[0] == [1, 2, 0]


FEATURES = [
    {"id": 1, "fires_on": [" snow", " ice"], "promotes": [" cold"], "contexts": []},
    {
        "id": 2,
        "fires_on": [" the"],
        "promotes": [],
        "contexts": [{"before": "and", "token": " the", "after": " Snow fell"}] * 2,
    },
    {"id": 3, "fires_on": [" dog"], "promotes": [" snow"], "contexts": [{"before": "", "token": "dog", "after": ""}]},
]


def test_words_are_found_in_labels_then_tokens_then_contexts() -> None:
    labels = FeatureLabels({9: FeatureLabel(text="SNOW and ice"), 3: FeatureLabel(text="pets")})
    found = search_features("snow", FEATURES, labels)
    assert [(match.feature, match.where) for match in found] == [
        (9, ("label",)),
        (1, ("fires_on",)),
        (2, ("contexts",)),
        (3, ("promotes",)),
    ]
    assert isinstance(found[2], WordMatch)
    assert found[2].context == "and« the» Snow fell"
    assert [match.feature for match in search_features("snow ice", FEATURES, labels)] == [9, 1]
    assert [match.feature for match in search_features("the snow", FEATURES)] == [2]  # across the token that fires
    assert search_features("snow", FEATURES, labels, 1) == found[:1]
    with pytest.raises(SteersmanError, match="no words"):
        search_features("  ", FEATURES)


@pytest.mark.parametrize(
    "content",
    [
        {"id": 1},
        [[1]],
        [{"id": "1"}],
        [{"id": 1, "fires_on": [2]}],
        [{"id": 1, "contexts": [{"token": "a", "after": "b"}]}],
        [{"id": 1, "contexts": 3}],
    ],
)
def test_a_file_that_holds_no_features_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "features.json").write_text(json.dumps(content))
    with pytest.raises(SteersmanError, match="features.json: not a list of features"):
        read_feature_records(tmp_path / "features.json")
