"""Features against annotations of tokens: planted answers, base rates, halves of whole families."""

import random

import pytest
import torch
from support.word_features import word_model, word_sae

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer import Annotated, annotation_table, select
from steersman.steer.analysis.annotations import halves

SIGNAL = 3


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return word_model()


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    return word_sae(lm)


def sequences(lm: LanguageModel, n: int = 40, families: int = 8) -> list[Annotated]:
    """Texts of twelve words; `site` marks w7, `noise` a third of all tokens at random, `rare` almost none."""
    draw, found = random.Random(0), []
    for i in range(n):
        tokens = lm.token_ids(" ".join(f"w{draw.randrange(4, 14)}" for _ in range(12)), bos=True)
        noise = [draw.random() < 0.3 for _ in tokens]
        found.append(
            Annotated(
                tokens=tuple(tokens),
                annotations={"site": [t == 7 for t in tokens], "noise": noise, "rare": [i == 0] * len(tokens)},
                family=str(i % families),
            )
        )
    return found


def test_a_planted_annotation_has_precision_and_recall_1_and_noise_its_base_rate(lm: LanguageModel, sae: SAE) -> None:
    table = annotation_table(lm, sae, sequences(lm), min_tokens=10)
    site, noise = table.findings
    assert (site.annotation, site.feature, site.precision, site.recall, site.relevant) == ("site", SIGNAL, 1, 1, True)
    assert site.null_f1 < 0.5
    assert site.searched_f1 == 1.0
    assert not noise.relevant
    assert abs(noise.precision - noise.base_rate) < 0.25
    assert noise.f1 < noise.searched_f1 + 0.1
    assert noise.f1 < 0.5
    assert table.left_out == {"rare": 12}
    assert table.n_tokens == (240, 240)
    assert int(table.annotated[1, 1]) == site.n_tokens
    assert "site" in table.to_text()
    assert "relevant" in table.to_text()
    assert table.precision(1).shape == table.recall(1).shape == (3, 14, 2)
    assert dict(select(table.scores(), "annotation:site", strength=2.0)) == {sae.cfg.hook_name: {SIGNAL: 2.0}}


def test_thresholds_may_be_fractions_of_the_largest_activation(lm: LanguageModel, sae: SAE) -> None:
    below, above = (annotation_table(lm, sae, sequences(lm), min_tokens=10, units="max_act", thresholds=(at,))
                    for at in (0.9, 1.1))  # fmt: skip
    assert below.findings[0].f1 == 1.0
    assert int(above.active.sum()) == 0
    bare = SAE(sae.cfg)
    with pytest.raises(SteersmanError, match="statistics"):
        annotation_table(lm, bare, sequences(lm), min_tokens=10, units="max_act")


def test_counts_are_what_a_loop_over_tokens_counts(lm: LanguageModel, sae: SAE) -> None:
    given = sequences(lm, 12, families=3)
    table = annotation_table(lm, sae, given, min_tokens=1, thresholds=(0.5,), batch_size=5)
    side, at = halves(given, 0), table.names.index("noise")
    hits = torch.zeros(2, 14, dtype=torch.int64)
    for entry, half in zip(given, side):
        ids = torch.tensor([entry.tokens])
        code = sae.encode(lm.capture(ids, hooks=[sae.cfg.hook_name])[sae.cfg.hook_name][0])
        for t in range(1, len(entry.tokens)):
            hits[half] += (code[t] > 0.5) & entry.annotations["noise"][t]
    assert torch.equal(table.hits[:, 0, :, at], hits)


def test_families_are_never_cut_and_halves_are_alike(lm: LanguageModel) -> None:
    given = sequences(lm, 40, families=7)
    side = halves(given, 1)
    by_family: dict[str | None, set[int]] = {}
    for entry, half in zip(given, side):
        by_family.setdefault(entry.family, set()).add(half)
    assert all(len(found) == 1 for found in by_family.values())
    assert abs(sum(side) - 20) <= 6
    assert halves(given, 1) == side
    with pytest.raises(SteersmanError, match="at least two families"):
        halves(given[::7], 0)


def test_spans_of_characters_find_their_tokens(lm: LanguageModel) -> None:
    entry = Annotated.of_spans(lm, "w5 w7 w9 w11", [(3, 5, "site"), (6, 12, "tail")])
    assert entry.annotations == {
        "site": [False, False, True, False, False], "tail": [False, False, False, True, True]
    }  # fmt: skip


def test_bad_annotations_are_refused(lm: LanguageModel, sae: SAE) -> None:
    with pytest.raises(SteersmanError, match=r"13 tokens \(BOS included\) and 3 labels for 'site'"):
        annotation_table(
            lm, sae, [Annotated(tokens=tuple(range(13)), annotations={"site": [True] * 3}), *sequences(lm, 4)]
        )
    with pytest.raises(SteersmanError, match="no annotation has 100000 tokens"):
        annotation_table(lm, sae, sequences(lm), min_tokens=100000)
    with pytest.raises(SteersmanError, match="thresholds"):
        annotation_table(lm, sae, sequences(lm), thresholds=())
