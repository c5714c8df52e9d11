"""Labels of features: the file beside an SAE."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steersman.errors import SteersmanError
from steersman.sae import SAE, FeatureLabel, FeatureLabels, SAEConfig

LABELS = FeatureLabels({3: FeatureLabel(text="weather words", source="contexts", scores={"detection": 0.5}),
                        1: FeatureLabel(text="<b>שלום\u202e 👩‍🚀")})  # fmt: skip


def test_labels_travel_with_the_sae(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(d_in=4, d_sae=8, k=2))
    sae.labels = LABELS
    sae.save(tmp_path)
    assert SAE.load(tmp_path).labels == LABELS
    sae.labels = FeatureLabels()
    sae.save(tmp_path)
    assert not SAE.load(tmp_path).labels
    assert not (tmp_path / "labels.jsonl").exists()


def test_labels_of_another_sae_are_refused(tmp_path: Path) -> None:
    SAE(SAEConfig(d_in=4, d_sae=8, k=2)).save(tmp_path)
    FeatureLabels({8: FeatureLabel(text="x")}).save(tmp_path / "labels.jsonl")
    with pytest.raises(SteersmanError, match="feature 8, and the SAE has features 0 to 7"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "other"), [("d_sae", 16), ("d_in", 8), ("hook_name", "blocks.2.hook_resid_post"), ("model_name", "gpt2")]
)
def test_labels_say_of_which_sae_they_are(tmp_path: Path, name: str, other: object) -> None:
    cfg = SAEConfig(d_in=4, d_sae=8, k=2, hook_name="blocks.1.hook_resid_post", model_name="org/toy")
    path = tmp_path / "labels.jsonl"
    LABELS.of(cfg).save(path)
    read = FeatureLabels.load(path)
    assert read == LABELS
    read.check(replace(cfg, model_name="copies/Toy"))
    read.merged({1: FeatureLabel(text="x")}).check(cfg)
    read.check(SAEConfig(d_in=4, d_sae=8, k=2))  # records nothing that could differ
    with pytest.raises(SteersmanError, match=f"labels of another SAE: of {name}"):
        read.merged({}).check(replace(cfg, **{name: other}), str(path))


def test_what_ends_a_line_for_others_ends_none_here(tmp_path: Path) -> None:
    labels = FeatureLabels({0: FeatureLabel(text="a\u2028b\x85c\nd")})
    labels.save(tmp_path / "labels.jsonl")
    assert FeatureLabels.load(tmp_path / "labels.jsonl") == labels


def test_search_finds_every_word_in_any_case() -> None:
    assert LABELS.search("WORDS weather") == [3]
    assert LABELS.search("weather dog") == []


def test_merging_prefers_the_other() -> None:
    merged = LABELS.merged({3: FeatureLabel(text="rain")})
    assert [merged.text(3), merged.text(1)] == ["rain", LABELS.text(1)]
    assert LABELS.text(3) == "weather words"


@pytest.mark.parametrize(
    ("record", "words"),
    [([], "JSON object"), ({"label": "x"}, "feature"), ({"feature": -1, "label": "x"}, "feature"),
     ({"feature": True, "label": "x"}, "feature"), ({"feature": 1, "label": 2}, "text"),
     ({"feature": 1, "label": "x", "scores": {"a": "b"}}, "scores"),
     ({"feature": 1, "label": "x", "scores": [1]}, "scores")],
)  # fmt: skip
def test_a_line_that_is_no_label_is_named(tmp_path: Path, record: object, words: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"feature": 0, "label": "fine"}\n' + json.dumps(record) + "\n")
    with pytest.raises(SteersmanError, match=f"line 2.*{words}"):
        FeatureLabels.load(path)


def test_a_feature_has_one_label(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"feature": 0, "label": "a"}\n{"feature": 0, "label": "b"}\n')
    with pytest.raises(SteersmanError, match="line 2: a second label of feature 0"):
        FeatureLabels.load(path)
