"""Feature scores: planted answers, nulls, the table and its file, and what is selected from it."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import D, V, with_text
from support.word_features import HOOK, L, word_model, word_sae
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE, SAEConfig
from steersman.steer import FeatureScores, FeatureSet, Score, Steerer, pruned, score_features, select
from steersman.steer.scores import (
    SCORES,
    Column,
    labelled_sides,
    rewarded_answers,
    rewarded_generation,
    token_change,
    vocab_projection,
)
from steersman.steer.scores.statistics import LabelSums, f_statistic, null_bound

SIGNAL = 3  # the feature of word w7


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return word_model()


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    return word_sae(lm)


def texts_with(signal: bool, n: int, seed: int = 0) -> list[str]:
    """Texts of seven words, of which the third is w7 or none is."""
    draw = random.Random(f"{signal}{seed}")
    others = [f"w{i}" for i in range(4, 40) if i != 7]
    rows = [[draw.choice(others) for _ in range(7)] for _ in range(n)]
    for row in rows:
        row[2] = "w7" if signal else row[2]
    return [" ".join(row) for row in rows]


def labelled_scores(lm: LanguageModel, sae: SAE, names: str | list[str], **settings: object) -> FeatureScores:
    return score_features(
        lm, sae, names, positive=texts_with(True, 30), negative=texts_with(False, 30), batch_size=7, **settings
    )


# Statistics


def test_sums_give_what_the_definitions_give() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=g) + 5, (torch.rand(50, generator=g) > 0.4).double()
    sums = LabelSums(y, n_features=6, permutations=3)
    for part in torch.arange(50).split(11):
        sums.add(x[part], part)
    both = torch.cat([x.double(), y[:, None]], 1).T
    torch.testing.assert_close(sums.correlation()[:, 0], torch.corrcoef(both)[-1, :-1])
    plus, minus = x[y == 1].double(), x[y == 0].double()
    torch.testing.assert_close(sums.difference()[:, 0], plus.mean(0) - minus.mean(0))
    within = (plus - plus.mean(0)).square().sum(0) + (minus - minus.mean(0)).square().sum(0)
    between = len(plus) * (plus.mean(0) - x.double().mean(0)).square()
    between = between + len(minus) * (minus.mean(0) - x.double().mean(0)).square()
    f = between / (within / 48)
    torch.testing.assert_close(sums.f_statistic()[:, 0], f)
    torch.testing.assert_close(f_statistic(x, y), f)
    r = sums.correlation()
    torch.testing.assert_close(sums.f_statistic(), r.square() * 48 / (1 - r.square()))
    assert (r[:, 1:] != r[:, :1]).all()
    torch.testing.assert_close(sums.success_mean(), plus.mean(0))


def test_a_constant_feature_has_no_correlation_and_labels_must_differ() -> None:
    sums = LabelSums(torch.tensor([1.0, 0.0, 1.0]), n_features=1)
    sums.add(torch.full((3, 1), 0.1), torch.arange(3))
    assert sums.correlation().tolist() == [[0.0]]
    assert sums.f_statistic().tolist() == [[0.0]]
    with pytest.raises(SteersmanError, match="not all the same"):
        LabelSums(torch.ones(4), n_features=1)
    half = LabelSums(torch.tensor([1.0, 0.5, 0.0]), n_features=1)
    with pytest.raises(SteersmanError, match="of the 3 labelled samples"):
        half.correlation()
    half.add(torch.zeros(3, 1), torch.arange(3))
    with pytest.raises(SteersmanError, match="0 or 1"):
        half.difference()


# CorrSteer, SAE-SSV, LF-Steering


def test_the_planted_feature_is_found_by_each_score_and_is_above_its_null(lm: LanguageModel, sae: SAE) -> None:
    table = labelled_scores(lm, sae, ["correlation", "f_statistic", "contrast"])
    for name in table:
        (best,) = table.top(name, 1)
        assert (best.feature, best.above_null) == (SIGNAL, True), name
    assert table["correlation"].values[SIGNAL] == 1
    assert table["correlation"].strengths is not None
    assert float(table["correlation"].strengths[SIGNAL]) == 2.0
    torch.testing.assert_close(table["contrast"].values[SIGNAL], torch.tensor(2 / 7))  # one of seven tokens
    assert table["correlation"].about["bound"] == pytest.approx(null_bound(L, 60))
    # A feature that is not planted stays inside the null of the best of all: that is what the null is of.
    over = [f for f in table.top("correlation", L, sign="both") if f.above_null]
    assert [f.feature for f in over] == [SIGNAL]


@pytest.mark.parametrize("seed", range(4))
def test_permuted_labels_stay_below_the_bound(lm: LanguageModel, sae: SAE, seed: int) -> None:
    both = texts_with(True, 60) + texts_with(False, 60)
    random.Random(seed).shuffle(both)
    table = score_features(lm, sae, "correlation", positive=both[:60], negative=both[60:], batch_size=60)
    assert abs(float(table["correlation"].values[SIGNAL])) < null_bound(L, 120)
    assert not any(found.above_null for found in table.top("correlation", L, sign="both"))


def test_swapped_labels_flip_every_sign(lm: LanguageModel, sae: SAE) -> None:
    one = labelled_scores(lm, sae, ["contrast", "correlation"])
    other = score_features(
        lm, sae, ["contrast", "correlation"], positive=texts_with(False, 30), negative=texts_with(True, 30)
    )
    torch.testing.assert_close(one["contrast"].values, -other["contrast"].values)
    torch.testing.assert_close(one["correlation"].values, -other["correlation"].values)
    strengths = other["correlation"].strengths
    assert strengths is not None
    assert float(strengths[SIGNAL]) == 0


def test_batches_and_cuts_change_nothing_and_pooling_is_what_it_says(lm: LanguageModel, sae: SAE) -> None:
    one, other = (labelled_scores(lm, sae, "contrast", pool="max"), labelled_scores(lm, sae, "contrast"))
    assert float(one["contrast"].values[SIGNAL]) == 2.0
    rows = score_features(
        lm, sae, "contrast", positive=texts_with(True, 30), negative=texts_with(False, 30), batch_size=1
    )
    torch.testing.assert_close(rows["contrast"].values, other["contrast"].values, rtol=1e-6, atol=1e-7)


def test_of_answers_only_the_generated_tokens_count(lm: LanguageModel, sae: SAE) -> None:
    sides = labelled_sides(lm, [("w4 w7", " w9 w10")], [("w4 w5", " w7 w10")])
    table = score_features(lm, sae, "contrast", rewarded=[*sides, *sides])
    assert float(table["contrast"].values[SIGNAL]) == pytest.approx(-1.0)
    text = lm.generate(["w7 w5", "w6 w7 w8"], max_new_tokens=4)
    found = rewarded_generation(text, [1.0, 0.0])
    assert [entry.first for entry in found] == [3, 4]
    assert [entry.label for entry in found] == [1.0, 0.0]
    assert list(found[0].tokens[3:]) == text.new_tokens[0].tolist()[: len(found[0].tokens) - 3]
    with pytest.raises(SteersmanError, match="2 generated rows and 1 rewards"):
        rewarded_generation(text, [1.0])
    answers = rewarded_answers(
        lm, ["w5", "w6 w7"], lambda _, answer: float("w7" in answer), samples=3, max_new_tokens=3
    )
    assert len(answers) == 6
    assert {entry.label for entry in answers} <= {0.0, 1.0}


# Output and input scores, lists of tokens


def reaching_model() -> tuple[LanguageModel, SAE]:
    """At the last hook point feature 0 writes the token w20, and feature 1 what no token reads."""
    lm = with_text("llama")
    hook = "blocks.2.hook_resid_post"
    with torch.no_grad():
        head = lm.model.lm_head.weight
        head[:, -1] = 0  # no token reads the last dimension
        head *= 12 / head.norm(dim=1, keepdim=True)
        lm.model.model.norm.weight.fill_(1.0)
        sae = SAE(SAEConfig(d_in=D, d_sae=8, architecture="relu", hook_name=hook), torch.Generator().manual_seed(1))
        sae.W_dec[0] = head[20] / head[20].norm()
        sae.W_dec[1] = torch.eye(D)[-1]
    return lm, sae


def test_the_output_score_is_1_where_a_feature_writes_its_token_and_nothing_where_no_token_reads_it() -> None:
    lm, sae = reaching_model()
    table = score_features(lm, sae, "output", factor=1000.0, units="raw", null_directions=16)
    values = table["output"].values
    assert values[0] > 0.99
    assert values[1] < 2 / V
    assert table.top("output", 1)[0].feature == 0
    assert table["output"].about["factor"] == 1000.0
    assert table["output"].about["units"] == "raw"
    off = score_features(lm, sae, "output", factor=0.0, units="raw", null_directions=0, n_tokens=1)["output"]
    assert off.values[0] < 0.5
    assert math.isnan(off.null_max)


def test_the_output_score_does_not_see_what_shares_its_pass_and_averages_over_prompts() -> None:
    lm, sae = reaching_model()
    prompts = ("w5", "w6 w7 w8 w9")
    given = {"factor": 3.0, "units": "raw", "null_directions": 0}
    both = score_features(lm, sae, "output", prompts=prompts, **given)["output"].values
    each = [score_features(lm, sae, "output", prompts=(p,), batch_size=1, **given)["output"].values for p in prompts]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    assert not torch.equal(each[0], each[1])
    some = score_features(lm, sae, "output", prompts=prompts, feature=(2, 5), **given)["output"].values
    torch.testing.assert_close(some[[2, 5]], both[[2, 5]])
    assert int(some.isnan().sum()) == 6


def test_dead_features_have_no_output_score_in_units_of_their_largest_activation(lm: LanguageModel, sae: SAE) -> None:
    values = score_features(lm, sae, "output", null_directions=4)["output"].values
    assert values.isnan().tolist() == [False] * 12 + [True] * 2


def test_the_input_score_is_the_share_of_activating_tokens_that_a_feature_writes(lm: LanguageModel, sae: SAE) -> None:
    own = SAE(sae.cfg)
    own.load_state_dict(sae.state_dict())
    W_U, norm = lm.unembed()
    assert norm is not None
    gain: Any = norm.weight
    with torch.no_grad():
        own.W_dec[SIGNAL] = W_U[:, 7] / gain
        own.W_dec[4] = -W_U[:, 8] / gain
        own.normalize_decoder()
    table = score_features(lm, own, "input", texts=texts_with(True, 20), n_tokens=8, permutations=20)
    values = table["input"].values
    assert float(values[SIGNAL]) == 1.0
    assert float(values[4]) == 0.0
    assert values[-2:].isnan().all()  # what no token activates is not known
    assert table["input"].n == 140


def test_projection_and_change_name_the_token_that_a_feature_writes() -> None:
    lm, sae = reaching_model()
    (projected,) = vocab_projection(lm, sae, [0], n_tokens=5)
    assert projected.raised[0] == "w20"
    assert len(projected.raised) == len(projected.lowered) == 5
    assert projected.raised_by[0] == max(projected.raised_by)
    assert projected.lowered_by[0] < 0
    texts = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
    up, down = (token_change(lm, sae, [0], texts, value=value)[0] for value in (50.0, -50.0))
    assert up.raised[0] == "w20"
    assert down.lowered[0] == "w20"
    assert up.raised_by[0] > 0 > down.lowered_by[0]
    assert "w20" in up.to_text(3)
    with pytest.raises(SteersmanError, match="out of range"):
        token_change(lm, sae, [99], texts)


# The table


def test_a_table_comes_back_from_its_file_and_knows_its_sae(lm: LanguageModel, sae: SAE, tmp_path: Path) -> None:
    table = labelled_scores(lm, sae, ["correlation", "contrast"]).merged(
        score_features(lm, sae, "output", null_directions=0)
    )
    table.save(tmp_path / "scores.safetensors")
    again = FeatureScores.load(tmp_path / "scores.safetensors")
    assert list(again) == sorted(table) or list(again) == list(table)
    for name in table:
        for part in ("values", "null", "strengths"):
            a, b = getattr(table[name], part), getattr(again[name], part)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert again[name].about == {**table[name].about, **_tuples_as_lists(table[name].about)}
        assert (again[name].unit, again[name].n) == (table[name].unit, table[name].n)
    again.check_sae(sae)
    assert again.to_text(3) == table.to_text(3)
    assert str(SIGNAL) in table.to_text(3)
    assert "*" in table.to_text(3)
    other = SAE(sae.cfg, torch.Generator().manual_seed(5))
    with pytest.raises(SteersmanError, match="another SAE"):
        again.check_sae(other)
    with pytest.raises(SteersmanError, match="not of one SAE"):
        again.merged(score_features(lm, other, "output", feature=(0,), factor=1.0, units="raw"))
    with pytest.raises(SteersmanError, match="no score 'outptu'"):
        again.top("outptu")


def _tuples_as_lists(about: object) -> dict[str, object]:
    assert isinstance(about, dict)
    return {key: list(value) for key, value in about.items() if isinstance(value, tuple)}


def test_a_damaged_table_is_refused(lm: LanguageModel, sae: SAE, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    labelled_scores(lm, sae, "contrast").save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SteersmanError, match="checksum"):
        FeatureScores.load(path)
    sae.save(tmp_path / "sae")
    with pytest.raises(SteersmanError, match="holds no feature scores"):
        FeatureScores.load(tmp_path / "sae" / "sae_weights.safetensors")


def test_a_score_from_outside_is_found_by_its_name(lm: LanguageModel, sae: SAE) -> None:
    class Biased(Score):
        name, source, unit = "test_bias", "a test", "bias"

        def measure(self, evidence: object, at: int) -> Column:
            return evidence.column(self, at, sae.b_enc, n=1)  # pyright: ignore[reportAttributeAccessIssue]

    assert SCORES["test_bias"] is Biased
    assert score_features(lm, sae, "test_bias")["test_bias"].values.tolist() == [-1.0] * L


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scores": "corelation"}, "unknown score 'corelation'"),
        ({"scores": "correlation"}, "positive= and negative="),
        ({"scores": "input"}, "texts to read"),
        ({"scores": "flow"}, "several hook points"),
        ({"scores": []}, "at least one score"),
        ({"scores": "contrast", "positive": ["w5"]}, "both positive and negative"),
        ({"scores": "output", "levle": 0.9}, "unknown setting 'levle'"),
        ({"scores": "output", "level": 2.0}, "level must lie"),
    ],
)
def test_what_a_score_lacks_is_said_at_once(lm: LanguageModel, sae: SAE, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        score_features(lm, sae, **given)


# Selection


def column(values: list[float], strengths: list[float] | None = None) -> Column:
    x = torch.tensor(values)
    return Column(
        values=x, null=torch.full_like(x, 0.3), null_max=0.5, unit="r", n=10, level=0.95,
        strengths=None if strengths is None else torch.tensor(strengths),
    )  # fmt: skip


def tables() -> list[FeatureScores]:
    first = {"correlation": column([0.2, 0.9, -0.8], [1.0, 2.0, -3.0]), "output": column([0.5, 0.01, 0.4])}
    second = {"correlation": column([0.6, float("nan"), 0.1], [4.0, 5.0, 6.0]), "output": column([0.2, 0.9, 0.9])}
    return [
        FeatureScores.of(columns, model_name="toy", hook_name=hook, sae={"d_sae": 3, "hash": hook})
        for columns, hook in ((first, "blocks.0.hook_resid_post"), (second, "blocks.1.hook_resid_post"))
    ]


def test_selection_over_several_saes() -> None:
    a, b = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    assert dict(select(tables(), "correlation")) == {a: {1: 2.0}}  # CorrSteer's S
    assert dict(select(tables(), "correlation", per_hook=True)) == {a: {1: 2.0}, b: {0: 4.0}}  # its A
    assert dict(select(tables(), "correlation", 3, sign="both")) == {a: {1: 2.0, 2: -3.0}, b: {0: 4.0}}
    assert dict(select(tables(), "correlation", sign="negative", strength=7)) == {a: {2: -7.0}}
    assert dict(select(tables(), "correlation", 5, above_null=True)) == {a: {1: 2.0}, b: {0: 4.0}}
    assert dict(select(tables(), "correlation", 5, where={"output": 0.3})) == {a: {0: 1.0}, b: {2: 6.0}}
    assert dict(select(tables()[0], "output", 1, strength=2.0)) == {a: {0: 2.0}}
    with pytest.raises(SteersmanError, match="how strong"):
        select(tables(), "output")
    with pytest.raises(SteersmanError, match="no feature is left"):
        select(tables(), "correlation", where={"output": 2.0})
    with pytest.raises(SteersmanError, match="unknown sign"):
        select(tables(), "correlation", sign="up")
    with pytest.raises(SteersmanError, match="one hook point"):
        select([tables()[0], tables()[0]], "correlation", 2)


def test_pruning_keeps_what_helps_on_validation() -> None:
    chosen = select(tables(), "correlation", per_hook=True)

    def measure(features: FeatureSet | None) -> float:
        return 0.5 if features is None else 0.5 + 0.1 * ("blocks.1.hook_resid_post" in features)

    assert dict(pruned(chosen, measure)) == {"blocks.1.hook_resid_post": {0: 4.0}}
    with pytest.raises(SteersmanError, match="none of the 2 features"):
        pruned(chosen, lambda _: 1.0)


def test_a_window_that_ends_before_the_prompts_end_steers_nothing_else(lm: LanguageModel, sae: SAE) -> None:
    """The tokens that a hook which passes over passes of one token reaches under a cache (arXiv
    2410.10863). A random direction of equal length stands beside the feature."""
    chosen, st = FeatureSet(strengths={HOOK: {1: 200.0}}), Steerer(lm)
    prompts = ["w5 w6 w7 w8", "w9 w10"]
    texts = []
    for cache in (True, False):
        with chosen.steer(st, sae, scope="0:-1") as steering:
            texts.append(lm.generate(prompts, max_new_tokens=4, use_cache=cache).tokens)
        if cache:
            assert sorted(steering.trace.pairs()) == [(0, 1), (0, 2), (0, 3), (1, 1)]
    assert torch.equal(*texts)
    random = torch.randn(D, generator=torch.Generator().manual_seed(0))
    ids = lm.encode(prompts[0]).input_ids
    h = lm.capture(ids, hooks=[HOOK])[HOOK]
    moved = []
    for direction in (sae.W_dec[1].detach(), random / random.norm()):
        with st.vector(direction, scale=200.0, hook=HOOK, scope="0:-1"):
            moved.append((lm.capture(ids, hooks=[HOOK])[HOOK] - h).norm(dim=-1))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-3)
    assert (moved[0][0] > 1).tolist() == [False, True, True, True, False]


def test_a_set_takes_gates_and_schedules_and_the_tokens_that_choose_the_answer(lm: LanguageModel, sae: SAE) -> None:
    chosen, st = FeatureSet(strengths={HOOK: {1: 4.0}}), Steerer(lm)
    with chosen.steer(st, sae, scope="last_prompt+generation") as steering:
        lm.generate("w5 w6 w7", max_new_tokens=3)
    assert sorted(steering.trace.pairs())[0] == (0, 3)
    ids = lm.encode("w5 w6 w7").input_ids
    with chosen.steer(st, sae, gate=0.0):
        off = lm.logits(ids)
    with chosen.steer(st, sae, schedule=[0.0, 0.0]):
        scheduled = lm.logits(ids)
    assert torch.equal(off, lm.logits(ids))
    assert torch.equal(scheduled, off)


def test_a_set_steers_at_all_its_hook_points_in_one_context(lm: LanguageModel, sae: SAE) -> None:
    later = SAE(
        SAEConfig(d_in=D, d_sae=6, architecture="relu", hook_name="blocks.1.hook_resid_post"),
        torch.Generator().manual_seed(2),
    )
    chosen = FeatureSet(strengths={HOOK: {1: 2.0, 2: -1.0}, "blocks.1.hook_resid_post": {4: 3.0}})
    st, ids = Steerer(lm), lm.encode(["w5 w6 w7", "w8 w9"])

    def logits() -> Tensor:
        return lm.logits(ids.input_ids, ids.attention_mask)

    with chosen.steer(st, [later, sae]):
        together = logits()
    with st.features(sae, chosen[HOOK]), st.features(later, chosen["blocks.1.hook_resid_post"]):
        one_by_one = logits()
    assert torch.equal(together, one_by_one)
    with chosen.scaled(0.0).steer(st, [later, sae]):
        assert torch.equal(logits(), logits())
        off = logits()
    assert torch.equal(off, logits())
    with pytest.raises(SteersmanError, match="no SAE of that hook point"):
        chosen.steer(st, sae)
    scored = select(score_features(lm, sae, "output", null_directions=0), "output", 2)
    assert scored.n_features == 2
    assert len(scored.singles()) == 2
    with scored.steer(st, sae, scope="generation"):
        lm.generate("w5", max_new_tokens=2)
    with pytest.raises(SteersmanError, match="another SAE"):
        scored.steer(st, SAE(sae.cfg, torch.Generator().manual_seed(9)))
    with pytest.raises(SteersmanError, match="nothing to steer"):
        FeatureSet(strengths={HOOK: {}})
    with pytest.raises(SteersmanError, match="are factors"):
        FeatureSet(strengths={HOOK: {1: 0.0}}, mode="scale").scaled(2)
