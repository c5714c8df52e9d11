"""Probes of few features: planted answers, exact truth from the grammar's labels, and labels that do not fit."""

import json
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import fails
from support.word_features import word_model, word_sae

from steersman.cli import main
from steersman.demo import CONCEPTS, stories
from steersman.demo.grammar import concept_labels
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.ranking import auroc
from steersman.sae import SAE, FeatureLabel, FeatureLabels, SAEConfig
from steersman.steer import LabelAbsorption, LabelProbe, ProbedFeatures, ProbingConfig, probe_features, read_labelled
from steersman.steer.methods.logistic import fit_logistic
from steersman.steer.probing.labels import labelled_texts
from steersman.steer.probing.probe import probe_rows
from steersman.steer.probing.rows import Codes, ProbeRows, read_rows
from steersman.steer.probing.sparse import class_differences, fit
from steersman.steer.probing.split import Parts, split
from steersman.steer.scores.reading import codes_of, states_of


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return word_model()


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    sae = word_sae(lm)
    sae.labels = FeatureLabels({3: FeatureLabel(text="the word w7")})
    return sae


def word_texts(n: int = 24) -> tuple[list[str], list[str]]:
    """Texts with w7, w8 or w9 somewhere, and which."""
    names = ["seven", "eight", "nine"]
    texts = [f"w{20 + i} {'w21 ' * (i % 3)}w{7 + i % 3} w{30 + i}" for i in range(n)]
    return texts, [names[i % 3] for i in range(n)]


def test_planted_words_are_told_by_one_feature(lm: LanguageModel, sae: SAE) -> None:
    texts, labels = word_texts()
    found: ProbedFeatures = probe_features(
        lm, sae, texts, labels, pool="max", k=(1, 5), random_draws=2, draws=20, beside={"again": sae}
    )
    assert found.classes == ["eight", "nine", "seven"]
    assert (found.n_training, found.n_heldout, found.level) == (18, 6, "text")
    first: LabelProbe = found[0]
    chosen = {one.label: one.features for one in found if (one.of, one.k) == ("sae", 1)}
    assert chosen == {"seven": (3,), "eight": (4,), "nine": (5,)}
    assert (first.auroc.mean, first.auroc.low, first.accuracy, first.f1, first.positives) == (1, 1, 1, 1, 2)
    assert found.mean("again", 1).auroc == found.mean("sae", 1).auroc
    assert found.mean("random_features", 1).auroc.mean < 0.9
    assert found.mean("raw").auroc.mean > 0.9
    assert found.mean("random_sae", 5).k == 5
    assert "the word w7" in found.to_text()
    assert "the word w7" in found._repr_html_()
    assert json.dumps(found.to_json())
    with pytest.raises(KeyError):
        found.mean("sae", 3)


def test_two_labels_are_one_question(lm: LanguageModel, sae: SAE) -> None:
    texts, labels = word_texts(16)
    yes = [label == "seven" for label in labels]
    found = probe_features(lm, sae, texts, yes, pool="max", k=(1,), raw=False, random_sae=False, random_draws=0)
    assert found.classes == ["true"]
    assert [one.features for one in found] == [(3,)]
    last = probe_features(lm, sae, texts, yes, k=(1,), raw=False, random_sae=False, random_draws=0, draws=5)
    assert last.mean("sae", 1).auroc.mean == 0.5  # w7 is never the last token


def test_tokens_and_spans_are_the_same_truth(lm: LanguageModel, sae: SAE) -> None:
    texts = [f"w20 w{7 + i % 2} w21" for i in range(10)]
    tokens = [[None, i % 2 == 0, False] for i in range(10)]
    spans = [[(4, 6, "w7")] if i % 2 == 0 else [] for i in range(10)]
    a = labelled_texts(lm, texts, tokens, "auto")
    b = labelled_texts(lm, texts, spans, "auto")
    for one, other in zip(a.texts, b.texts):
        assert torch.equal(one.has, other.has)
        assert one.known.tolist() == [False, True, True]
        assert other.known.all()
    whole = labelled_texts(lm, texts, spans, "text")
    assert [one.has.tolist() for one in whole.texts] == [[[i % 2 == 0]] for i in range(10)]
    rows = read_rows(
        lm, sae.cfg.hook_name, a, {"sae": sae}, pool="last", random_sae=False, batch_size=4, max_length=None, seed=0
    )  # fmt: skip
    assert len(rows.has) == 20
    assert torch.equal(rows.codes["sae"].columns([3])[:, 0] > 0, rows.has[:, 0])


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_a_text_is_pooled_as_is_said(lm: LanguageModel, sae: SAE, pool: Any) -> None:
    texts, labels = word_texts(5)
    given = labelled_texts(lm, texts, labels, "auto")
    rows = read_rows(
        lm, sae.cfg.hook_name, given, {"sae": sae}, pool=pool, random_sae=True, batch_size=2, max_length=None, seed=0
    )  # fmt: skip
    pooled = {"last": lambda x: x[-1], "mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[pool]
    counted = [one.text for one in given.texts]
    dense = torch.stack([pooled(code[0]) for _, code in codes_of(lm, [sae], [sae.cfg.hook_name], counted)])
    torch.testing.assert_close(rows.codes["sae"].columns(range(sae.cfg.d_sae)), dense)
    states = torch.stack([pooled(x[0]) for _, x in states_of(lm, [sae.cfg.hook_name], counted)])
    torch.testing.assert_close(rows.states[pool], states)
    assert set(rows.states) == ({"mean", "max"} if pool == "max" else {pool})
    y = torch.rand(5, 2)
    torch.testing.assert_close(rows.codes["sae"].sums(y), (y.T @ dense).double())


# Exact truth: the tokens of stories, and an SAE planted on their labels.

ABSORBED, SHARED, SPLIT = "insects", "birds", "feeling"


def planted() -> tuple[ProbeRows, SAE, dict[str, int]]:
    """Words of stories, whose states are a direction of their group and one of their concept. Of the animals, the
    feature of insects has taken over the group's direction, and that of birds half of it; feelings have no feature of
    the group, only one for each."""
    names, groups = list(CONCEPTS), sorted({one.group for one in CONCEPTS.values()})
    at = {name: i for i, name in enumerate([*names, *groups])}
    parts, unit = [], []
    for i, story in enumerate(islice(stories(11), 100)):
        words = [(m.start(), m.end()) for m in re.finditer(r"\S+", story.text)]
        parts.append(torch.from_numpy(concept_labels(story.spans, words)))
        unit.append(torch.full((len(words),), i))
    concept = torch.cat(parts)
    member = torch.tensor([[one.group == group for group in groups] for one in CONCEPTS.values()])
    of_group = (concept.float() @ member.float()) > 0
    truth = torch.cat([concept, of_group], 1).float()
    L = D = len(at)
    sae = SAE(SAEConfig(d_in=D, d_sae=L, architecture="relu"))
    decoder = torch.eye(D)
    code = truth.clone()
    decoder[at[ABSORBED], at["animal"]] = 1.0
    decoder[at[SHARED], at["animal"]] = 0.5
    code[truth[:, at[ABSORBED]] > 0, at["animal"]] = 0.0
    code[truth[:, at[SHARED]] > 0, at["animal"]] = 0.5
    code[:, at[SPLIT]] = 0.0
    for name, one in CONCEPTS.items():
        if one.group == SPLIT:
            decoder[at[name], at[SPLIT]] = 1.0
    norms = decoder.norm(dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(decoder / norms[:, None])
        sae.b_dec.zero_()
    assert torch.allclose((code * norms) @ sae.W_dec, truth)  # nothing is lost, it only stands elsewhere
    chosen = ["animal", SPLIT, "thing"]
    rows = ProbeRows(
        states={"last": truth}, codes={"sae": Codes.of(code * norms)}, has=truth[:, [at[name] for name in chosen]] > 0,
        unit=torch.cat(unit), classes=chosen,
    )  # fmt: skip
    return rows, sae, at


def test_absorption_and_splitting_are_measured_at_the_planted_rate() -> None:
    rows, sae, at = planted()
    config = ProbingConfig(
        k=(1,), absorption=True, split_rise=0.1, random_draws=0, random_sae=False, l2=(1e-3,), draws=5
    )
    found = probe_rows(rows, sae, config).absorption or []
    held = split(rows.has, rows.unit, rows.classes, config.heldout, config.seed).heldout
    animals: LabelAbsorption = found[0]
    truth = rows.states["last"][held & rows.has[:, 0]]
    share = float(truth[:, at[ABSORBED]].mean())
    assert 0.02 < share < 0.4
    assert animals.samples == len(truth)
    assert animals.features == (at["animal"],)
    assert animals.absorbed == animals.silent == pytest.approx(share)
    assert [(one.feature, one.n) for one in animals.absorbers] == [(at[ABSORBED], round(share * len(truth)))]
    assert animals.fraction == pytest.approx(share + 0.5 * float(truth[:, at[SHARED]].mean()), abs=0.03)
    things = found[2]
    assert (things.features, things.absorbed, things.fraction, things.f1) == ((at["thing"],), 0.0, 0.0, 1.0)
    of_feelings = [i for i, one in enumerate(CONCEPTS.values()) if one.group == SPLIT]
    finer = probe_rows(rows, sae, ProbingConfig(**{**vars(config), "split_rise": 0.03}))
    animals, feelings, _ = finer.absorption or []
    assert sorted(feelings.features) == of_feelings
    assert feelings.f1 == 1.0
    assert animals.features == (at["animal"], at[ABSORBED])  # what is absorbed is a split, where it is worth one
    assert animals.absorbed == 0.0
    assert "insects" not in finer.to_text()
    assert "absorbed" in finer.to_text()


def test_features_of_noise_are_chance_on_texts_that_did_not_choose_them() -> None:
    generator = torch.Generator().manual_seed(0)
    has = torch.rand(120, 2, generator=generator) > 0.5
    noise = torch.rand(120, 1500, generator=generator)
    rows = ProbeRows(
        states={"last": noise[:, :90]}, codes={"sae": Codes.of(noise)}, has=has, unit=torch.arange(120),
        classes=["a", "b"],
    )  # fmt: skip
    sae = SAE(SAEConfig(d_in=90, d_sae=1500, architecture="relu"))
    found = probe_rows(rows, sae, ProbingConfig(k=(1, 5), draws=50, random_draws=2))
    for score in found.means:
        assert score.auroc.mean == pytest.approx(0.5, abs=0.2), score
    everything = torch.ones(len(has), dtype=torch.bool)
    fooled = class_differences(rows.codes["sae"], has, everything)[0].argsort(descending=True)[:5].tolist()
    assert float(auroc(noise[:, fooled].sum(1, keepdim=True), has[:, :1])) > 0.8  # what choosing on all of them gives


def test_the_regression_by_gradients_comes_to_the_same_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 1, 12, generator=generator) + 3
    y = (x[:, 0, :3].sum(1) + torch.randn(200, generator=generator)) > 9
    exact, near = (fit_logistic(lambda: [(x, y)], l2=1e-2, by_gradients=way) for way in (False, True))
    torch.testing.assert_close(near.weight, exact.weight, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(near.bias, exact.bias, atol=2e-3, rtol=1e-3)


TEXTS = ["w7 w20"] * 4 + ["w8 w20"] * 4


@pytest.mark.parametrize(
    ("labels", "settings", "said"),
    [
        ([0, 1], {}, "8 texts and 2 labels"),
        ([1] * 8, {}, "only the label '1'"),
        ([0] * 7 + [1], {}, "too few texts for '1' \\(1 with it, 7 without\\)"),
        ([0.5] * 8, {}, "text 0: the label is 0.5"),
        (["a", ["b", "c"]] * 4, {}, "several kinds"),
        ([[0, 1]] * 7 + [[0, 1, 1]], {}, "text 7 has 2 tokens .* and 3 labels"),
        ([[(0, 9, "a")]] * 8, {}, "6 characters, and a span goes from 0 to 9"),
        ([[(0, 9, "a")]] * 8, {"level": "text"}, "6 characters, and a span goes from 0 to 9"),
        ([[(3, 2, "a")]] * 8, {}, "is no span"),
        ([[]] * 8, {}, "no label"),
        ([0, 1] * 4, {"level": "token"}, "level token needs labels of spans"),
        ([0, 1] * 4, {"absorption": True, "pool": "max"}, "the max over a text's tokens"),
        ([0, 1] * 4, {"k": (15,)}, "15 features needs more than the 14"),
        ([0, 1] * 4, {"k": (0,)}, "k must be"),
        ([0, 1] * 4, {"heldout": 1.0}, "heldout"),
    ],
)
def test_labels_that_do_not_fit_are_found_before_the_model_runs(
    lm: LanguageModel, sae: SAE, monkeypatch: pytest.MonkeyPatch, labels: list[Any], settings: Any, said: str
) -> None:
    monkeypatch.setattr(LanguageModel, "capture", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(SteersmanError, match=said):
        probe_features(lm, sae, TEXTS, labels, **settings)


@pytest.mark.parametrize(
    ("settings", "said"), [({"transcoder": True}, "transcoder"), ({"input_norm": "layer_norm"}, "normalises")]
)
def test_absorption_needs_features_in_the_units_of_the_states(
    lm: LanguageModel, sae: SAE, settings: Any, said: str
) -> None:
    cfg = replace(sae.cfg, apply_b_dec_to_input=False, **settings)
    with pytest.raises(SteersmanError, match=said):
        probe_features(lm, SAE(cfg), TEXTS, [0, 1] * 4, absorption=True)


@pytest.mark.parametrize("name", ["sae", "raw"])
def test_an_sae_beside_does_not_take_the_name_of_another(lm: LanguageModel, sae: SAE, name: str) -> None:
    with pytest.raises(SteersmanError, match=f"named '{name}'"):
        probe_features(lm, sae, TEXTS, [0, 1] * 4, beside={name: sae})


def test_one_penalty_is_measured_where_the_pooling_is_to_be_chosen() -> None:
    y = torch.arange(40) % 2 == 0
    parts = Parts(*(torch.ones(40, dtype=torch.bool) for _ in range(len(Parts._fields))))
    x = torch.stack([y.float(), torch.zeros(40)], dim=1)
    assert fit(x, y, parts, [0.1], score=True).choosing_auroc == 1.0
    assert math.isnan(fit(x, y, parts, [0.1]).choosing_auroc)


def test_the_command(lm: LanguageModel, sae: SAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm.model.save_pretrained(tmp_path / "llama")
    lm.tokenizer.save_pretrained(tmp_path / "llama")
    sae.save(tmp_path / "sae")
    lines = [{"text": text, "topic": topic} for text, topic in zip(*word_texts())]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_labelled(data, label_column="topic")[1] == word_texts()[1]
    base = ["probe", "--model", f"{tmp_path}/llama", "--sae", f"{tmp_path}/sae", "--data", str(data)]
    main([*base, "--label-column", "topic", "--pool", "max", "--k", "1", "--json", "--out", f"{tmp_path}/found.json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "found.json").read_text())
    assert [one["features"] for one in printed["probes"] if one["of"] == "sae"] == [[4], [5], [3]]
    assert "line 1 has no 'label'; it has text, topic: choose one with --label-column" in fails(capsys, *base)
    assert "no 'words'" in fails(capsys, *base, "--text-column", "words")
    data.write_text("")
    assert "holds no records" in fails(capsys, *base)
