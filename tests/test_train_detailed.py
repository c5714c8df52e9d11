"""Features in full: contexts of every level with the activation of each token, against the dense code."""

import logging
from pathlib import Path

import pytest
import torch
from support.sites import LENGTH, Planted, planted_site

from steersman.errors import SteersmanError
from steersman.lm.pieces import Pieces
from steersman.sae.features import Details
from steersman.train import ActivationStore, DetailedReport, FeatureDetail, detail_features
from steersman.train.reports.features import read_features
from steersman.train.reports.label_examples import label_examples
from steersman.train.reports.summary_file import load_summary, save_summary


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_site(tmp_path_factory.mktemp("detailed"))


@pytest.fixture(scope="module")
def report(site: Planted) -> DetailedReport:
    return detail_features(site.sae, site.store, site.lm, contexts=3)


def test_contexts_hold_the_stores_tokens_and_their_activations(site: Planted, report: DetailedReport) -> None:
    seen = 0
    for detail in report:
        F = site.dense[:, detail.feature.id]
        for group in detail.groups:
            for context in group.contexts:
                row = context.document * LENGTH + context.position - 1
                low = max(context.document * LENGTH, row - 10)
                high = min((context.document + 1) * LENGTH, row + 11)
                assert [token.text for token in context.tokens] == site.tokens[low:high]
                assert context.centre == row - low
                values = torch.tensor([token.value for token in context.tokens])
                torch.testing.assert_close(values, F[low:high], rtol=1e-3, atol=1e-6)
                assert context.value == pytest.approx(float(F[row]), rel=1e-6)
                seen += 1
    assert seen > 800


def test_groups_are_the_largest_and_then_each_interval(site: Planted, report: DetailedReport) -> None:
    below = missed = 0
    for detail in report:
        F = site.dense[:, detail.feature.id]
        active = F[F > 0]
        if not len(active):
            assert (detail.groups, detail.count, sum(detail.histogram)) == ([], 0, 0)
            continue
        largest, *intervals = detail.groups
        assert largest.share is None
        assert len(largest.contexts) == min(3, len(active))
        assert largest.contexts[0].value == pytest.approx(float(active.max()))
        assert [group.low for group in intervals] == sorted((group.low for group in intervals), reverse=True)
        where = [(one.document, one.position) for group in detail.groups for one in group.contexts]
        assert len(set(where)) == len(where), "a context is shown twice"
        for group in intervals:
            inside = active[(active > group.low) & (active <= group.high * (1 + 1e-6))]
            assert group.share == pytest.approx(len(inside) / len(active), abs=0.05 + 1.5 / len(active))
            assert all(group.low < one.value <= group.high * (1 + 1e-6) for one in group.contexts)
            below += group.high < 0.7 * float(active.max())
        shown = torch.tensor([one.value for one in largest.contexts])
        others = active[~torch.isin(active, shown)]
        fifths = (others / float(active.max()) * 5).ceil().unique()
        missed += len(fifths) - len(intervals)
    assert below > 100, "only the largest are shown"
    assert 0 <= missed <= 10, "levels are drawn from, and an interval that ends within one may come off badly"


def test_one_feature_is_the_same_alone(report: DetailedReport) -> None:
    one = report.detail(7)
    assert isinstance(one, FeatureDetail)
    assert one == list(report)[7]
    assert one.neighbours[0].cosine >= one.neighbours[-1].cosine
    assert 7 not in [near.feature for near in (*one.neighbours, *one.partners)]


def test_a_summary_is_read_where_it_fits(
    site: Planted, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, file = read_features(site.sae, site.store, Details(per_level=1)), tmp_path / "features.safetensors"
    save_summary(file, summary, {"sae": "a"})
    found = load_summary(file, {"sae": "a"})
    assert found is not None
    assert found.details is not None
    assert summary.details is not None
    assert found.details.n_ordinary == site.store.n_rows
    for name in ("example_windows", "sample_rows", "histogram", "counts"):
        assert torch.equal(getattr(found.details, name), getattr(summary.details, name))
    assert all(map(torch.equal, found.details.partners, summary.details.partners))
    assert torch.equal(found.stats.density, summary.stats.density)
    assert load_summary(file, {"sae": "b"}) is None
    assert load_summary(tmp_path / "none", {"sae": "a"}) is None
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert load_summary(file, {"sae": "a"}) is None
    assert "are found anew" in caplog.text


def test_what_does_not_belong_together_is_refused(site: Planted, tmp_path: Path) -> None:
    other = ActivationStore.from_tensors([torch.randn(9, 8)], tmp_path / "acts", "blocks.1.hook_resid_post")
    with pytest.raises(SteersmanError, match="width"):
        detail_features(site.sae, other, site.lm)


class Bytes:
    """A tokenizer of bytes, as byte-level BPE falls back to, that leaves out the space before a text."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace").lstrip(" ")


def test_tokens_that_share_a_character_are_one_piece() -> None:
    text = " é🙂 a"
    found = Pieces(Bytes())(list(text.encode()))
    assert [piece.text for piece in found] == [" ", "é", "🙂", " ", "a"]
    assert [(piece.start, piece.stop) for piece in found] == [(0, 1), (1, 3), (3, 7), (7, 8), (8, 9)]
    (broken,) = Pieces(Bytes())([0xF0])
    assert broken.text == "\ufffd"


def test_examples_for_a_label_are_texts_in_which_the_feature_fires_and_others(site: Planted) -> None:
    found = label_examples(site.sae, site.store, site.lm, [3, 125], active=6, inactive=4)
    assert len(found[3].active) == 6
    strongest = [max(values) for _, values in found[3].active]
    assert strongest == sorted(strongest, reverse=True)
    assert strongest[0] == pytest.approx(float(site.dense[:, 3].max()), rel=1e-3)
    assert all(max(values) == 0 for _, values in found[3].inactive)
    assert found[125].active == [], "it never fires"
    assert len(found[125].inactive) == 4
