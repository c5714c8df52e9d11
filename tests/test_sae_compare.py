"""Which features of several SAEs are the same: planted correspondences, and what cannot be compared."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steersman.errors import SteersmanError
from steersman.sae import SAE, FeatureLabel, FeatureLabels, FeatureMatching, SAEComparison, SAEConfig, compare_saes
from steersman.sae import matching as inside

D, L, M = 32, 40, 60


def sae_of(rows: torch.Tensor, encoder: torch.Tensor | None = None, architecture: str = "topk", **cfg: Any) -> SAE:
    made = SAE(SAEConfig(d_in=rows.shape[1], d_sae=len(rows), k=2, architecture=architecture, **cfg))
    with torch.no_grad():
        made.W_dec.copy_(rows)
        made.W_enc.copy_((rows if encoder is None else encoder).T)
    return made


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(M, M, generator=torch.Generator().manual_seed(1))).Q


@pytest.fixture(scope="module")
def order() -> torch.Tensor:
    return torch.randperm(M, generator=torch.Generator().manual_seed(2))


def test_an_sae_is_itself(rows: torch.Tensor) -> None:
    sae = sae_of(rows)
    found = compare_saes(sae, sae)
    assert found.mcc == pytest.approx(1.0)
    assert found[0, 1].mean_max == pytest.approx((1.0, 1.0))
    assert found[0, 1].pairs[:, 0].equal(found[0, 1].pairs[:, 1])
    assert (found[0, 1].shared, found[0, 1].unmatched(0)) == (1.0, [])
    chance = found[0, 1].chance
    assert chance is not None
    assert 0 < chance < 0.7


def test_planted_features_are_matched_and_the_others_named(rows: torch.Tensor, order: torch.Tensor) -> None:
    """b is a with its rows in another order and of other lengths, the first ten of them turned by 60 degrees."""
    turned = rows.clone()
    turned[:10] = 0.5 * rows[:10] + 0.75**0.5 * rows[-10:]
    a, b = sae_of(rows[:L]), sae_of(3 * turned[:L][order[order < L]])
    a.labels = FeatureLabels({3: FeatureLabel(text="a word")})
    found = compare_saes(a, b)
    one = found[0, 1]
    assert isinstance(one, FeatureMatching)
    assert one.mcc == pytest.approx((30 + 10 * 0.5) / L, abs=1e-5)
    assert (one.n_shared, one.shared) == (30, 0.75)
    assert [left.feature for left in sorted(one.unmatched(0), key=lambda left: left.feature)] == list(range(10))
    assert all(left.similarity == pytest.approx(0.5, abs=1e-5) for left in one.unmatched(1))
    there = {int(i): int(j) for i, j in one.pairs}
    assert all(int(order[order < L][there[i]]) == i for i in range(L))
    assert "a word" in found.to_text(shown=20)
    assert compare_saes(a, b, threshold=0.4)[0, 1].shared == 1.0
    record = found.to_json()["pairs"][0]
    assert {one["feature"]: one["label"] for one in record["unmatched"][0]}[3] == "a word"


def test_a_wider_sae_has_all_of_a_narrower_one(rows: torch.Tensor) -> None:
    one = compare_saes(sae_of(rows[:L]), sae_of(rows))[0, 1]
    assert (one.mcc, one.shared) == (pytest.approx(1.0), 1.0)
    assert one.mean_max == pytest.approx((1.0, L / M), abs=1e-5)
    assert {left.feature for left in one.unmatched(1)} == set(range(L, M))


def test_the_matching_is_the_best_one_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both features of a are nearest to b's first; together they do best apart. Blocks change nothing."""
    a = sae_of(torch.tensor([[1.0, 0.0], [0.8, 0.6]]))
    b = sae_of(torch.tensor([[1.0, 0.1], [0.9, -0.5]]))
    one = compare_saes(a, b)[0, 1]
    assert one.nearest[0].tolist() == [0, 0]
    assert sorted(one.pairs.tolist()) == [[0, 1], [1, 0]]
    monkeypatch.setattr(inside, "_ENTRIES", 2)
    again = compare_saes(a, b)[0, 1]
    assert again.mcc == pytest.approx(one.mcc)
    assert again.nearest[1].tolist() == one.nearest[1].tolist() == [0, 0]


def test_signs_mean_nothing_where_activations_may_be_negative(rows: torch.Tensor) -> None:
    assert compare_saes(sae_of(rows, architecture="abs_topk"), sae_of(-rows)).mcc == pytest.approx(1.0)
    assert (compare_saes(sae_of(rows), sae_of(-rows)).mcc or 0.0) < 0.1


def test_what_is_read_and_what_is_written(rows: torch.Tensor) -> None:
    a, b = sae_of(rows), sae_of(rows, rows.flip(0))
    assert (
        compare_saes(a, b, by="encoder")[0, 1]
        .pairs[:, 0]
        .equal(M - 1 - compare_saes(a, b, by="encoder")[0, 1].pairs[:, 1])
    )
    assert compare_saes(a, b, by="both").mcc == pytest.approx(0.5)


def test_three_saes_and_too_many_pairs(rows: torch.Tensor) -> None:
    saes = [sae_of(rows), sae_of(rows.flip(0)), sae_of(rows[:L])]
    found = compare_saes(*saes, names=["one", "two", "three"])
    assert isinstance(found, SAEComparison)
    assert set(found.matchings) == {(0, 1), (0, 2), (1, 2)}
    assert [row[0] for row in found.matrix()] == pytest.approx([1.0, 1.0, 1.0])
    assert all(name in found.to_text() for name in ("one two", "MCC", "in two and not in three"))
    assert "one" in found._repr_html_()
    large = compare_saes(*saes, max_pairs=M * M - 1)
    assert (large.mcc, large[0, 1].mcc, large[0, 1].n_shared) == (None, None, M)
    assert (large[0, 2].mcc or 0.0) == pytest.approx(1.0)
    assert large.to_json()["pairs"][0]["mcc"] is None


def test_a_feature_is_followed_through_saes_in_their_order(rows: torch.Tensor) -> None:
    found = compare_saes(sae_of(rows), sae_of(rows.flip(0)), sae_of(rows.roll(5, 0)))
    assert [(step.sae, step.feature) for step in found.along(7)] == [(0, 7), (1, M - 8), (2, 12)]
    assert [(step.sae, step.feature) for step in found.along(12, start=2)] == [(0, 7), (1, M - 8), (2, 12)]
    middle = found.along(M - 8, start=1)
    assert [(step.sae, step.feature) for step in middle] == [(0, 7), (1, M - 8), (2, 12)]
    assert all(step.similarity == pytest.approx(1.0) for step in middle)
    assert found.along_to_text(middle).splitlines()[2] == "B       52       1.000"
    for feature, start in ((M, 0), (0, 3)):
        with pytest.raises(SteersmanError, match="out of range|no SAE 3"):
            found.along(feature, start)


class Rows:
    """A store of two hook points, as far as comparing needs one."""

    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        self.parts = parts

    def hook_of(self, sae: SAE) -> str:
        return sae.cfg.hook_name

    def width(self, hook: str | None = None) -> int:
        return self.parts[hook or ""].shape[1]

    def stats(self, hook: str | None = None) -> Any:
        return SimpleNamespace(large_norm=100.0)

    def n_batches(self, batch_size: int, **options: Any) -> int:
        return 2

    def batches(self, batch_size: int, *, hook: list[str], **options: Any) -> Iterator[Any]:
        together = torch.cat([self.parts[name] for name in hook], dim=1)
        yield from (SimpleNamespace(x=part) for part in together.split(200))


def test_activations_of_saes_of_other_widths_are_correlated(
    rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    code = torch.rand(300, L, generator=g) * (torch.rand(300, L, generator=g) < 0.1)
    code[7] *= 1e4  # a row of huge norm, which is passed over
    wide, narrow = rows[:L], torch.randn(L, 16, generator=g)
    a = sae_of(wide, hook_name="a", architecture="relu")
    b = sae_of(narrow, hook_name="b", architecture="relu")
    store = Rows({"a": code @ wide, "b": code.flip(1) @ narrow})
    one = compare_saes(a, b, store=store)[0, 1]
    kept = torch.ones(300, dtype=torch.bool)
    kept[7] = False
    codes = [a.encode(store.parts["a"][kept]).double(), b.encode(store.parts["b"][kept]).double()]
    expected = torch.corrcoef(torch.cat(codes, dim=1).T)[:L, L:].nan_to_num()
    torch.testing.assert_close(one.similarity[0].double(), expected.max(dim=1).values, atol=1e-4, rtol=1e-4)
    assert one.mcc is not None
    assert one.chance is None
    assert compare_saes(a, a, store=store, tokens=250).mcc == pytest.approx(1.0, abs=1e-4)
    monkeypatch.setattr(inside, "_PRODUCTS", 100_000)
    torch.testing.assert_close(compare_saes(a, b, store=store)[0, 1].similarity[1], one.similarity[1])
    with pytest.raises(SteersmanError, match="cannot be compared by decoder: their rows are of widths 60 and 16"):
        compare_saes(a, b)
    with pytest.raises(SteersmanError, match="more than max_pairs"):
        compare_saes(a, b, store=store, max_pairs=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "logits"}, "not by 'logits'"),
        ({"by": "activations"}, "rows of a store"),
        ({"names": ["one"]}, "1 names for 2 SAEs"),
    ],
)
def test_wrong_questions(rows: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteersmanError, match=message):
        compare_saes(sae_of(rows), sae_of(rows), **options)


def test_rows_of_other_widths_and_broken_ones(rows: torch.Tensor) -> None:
    with pytest.raises(SteersmanError, match="A and B cannot be compared by both: their rows are of widths 60 and 20"):
        compare_saes(sae_of(rows), sae_of(rows[:, :20]), by="both")
    with pytest.raises(SteersmanError, match="weights that are not finite"):
        compare_saes(sae_of(rows), sae_of(rows / rows.abs().clamp_max(0)))
