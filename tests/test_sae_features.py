"""Feature summaries against brute force over the dense code."""

from typing import Any

import pytest
import torch
from support.helpers import make_sae

from steersman.sae import coactivation
from steersman.sae.base import SparseCode
from steersman.sae.coactivation import CoActivity
from steersman.sae.features import Details, FeatureDetails, FeatureSummary, Rows, summarize_features


def test_summary_equals_brute_force() -> None:
    sae = make_sae()
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    batches = [Rows(part, rows) for part, rows in zip(x.split(90), torch.arange(1000).split(90))]
    summary = summarize_features(sae, batches, median_norm=3.0, n_examples=7)
    F = sae.encode(x)
    values, rows = F.topk(7, dim=0)
    torch.testing.assert_close(summary.example_values, values.T)
    found = summary.example_values > 0
    assert torch.equal(summary.example_rows[found], rows.T[found])
    assert (summary.example_rows[~found] == -1).all()
    torch.testing.assert_close(summary.stats.max_act, F.max(0).values)
    torch.testing.assert_close(summary.stats.density, (F > 0).float().mean(0))


def test_percentile_is_within_one_bin() -> None:
    sae = make_sae(d_sae=16, k=4)
    x = torch.randn(5000, 8, generator=torch.Generator().manual_seed(1))
    summary = summarize_features(sae, [Rows(x, torch.arange(5000))], median_norm=3.0, n_examples=2)
    F = sae.encode(x)
    for feature in range(16):
        active = F[:, feature][F[:, feature] > 0]
        if len(active) == 0:
            assert summary.p999[feature] == 0
            continue
        exact = float(active.sort().values[min(len(active) - 1, int(0.999 * len(active)))])
        assert exact / 1.05 <= float(summary.p999[feature]) <= exact * 1.05


def test_a_single_token_in_many_batches() -> None:
    sae = make_sae()
    batches = [Rows(torch.randn(1, 8), torch.tensor([i])) for i in range(5)]
    summary = summarize_features(sae, batches, median_norm=1.0, n_examples=3)
    assert summary.stats.n_tokens == 5
    assert int(summary.example_rows.max()) <= 4


def detailed(**settings: Any) -> tuple[torch.Tensor, FeatureSummary, FeatureDetails]:
    """The dense code of 1000 rows in two stretches, with rows of huge norm, and its summary with details."""
    sae = make_sae()
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    x[::97] *= 50
    rows = torch.arange(1000) + 1000 * (torch.arange(1000) >= 500)
    batches = [Rows(part, where) for part, where in zip(x.split(90), rows.split(90))]
    summary = summarize_features(sae, batches, 3.0, 5, max_norm=20.0, details=Details(reach=3, **settings))
    assert summary.details is not None
    return sae.encode(x), summary, summary.details


def test_windows_are_what_the_feature_does_around_a_token() -> None:
    F, summary, details = detailed()
    rows = torch.arange(1000) + 1000 * (torch.arange(1000) >= 500)
    place = {int(row): i for i, row in enumerate(rows)}
    seen = 0
    for at, windows in ((summary.example_rows, details.example_windows), (details.sample_rows, details.sample_windows)):
        for feature, kept in (at >= 0).nonzero().tolist():
            row = int(at[feature, kept])
            around = [F[place[r], feature] if r in place else 0.0 for r in range(row - 3, row + 4)]
            torch.testing.assert_close(windows[feature, kept].float(), torch.tensor(around), rtol=1e-3, atol=1e-6)
            seen += 1
    assert seen > 800


def test_samples_cover_all_levels_and_no_row_of_huge_norm() -> None:
    F, _, details = detailed(per_level=2)
    ordinary = torch.ones(1000, dtype=torch.bool)
    ordinary[::97] = False
    for feature in range(64):
        active = F[ordinary, feature][F[ordinary, feature] > 0]
        drawn = details.sample_values[feature][details.sample_rows[feature] >= 0]
        assert set(drawn.tolist()) <= set(active.tolist())
        assert len(set(details.sample_rows[feature].tolist()) - {-1}) == len(drawn)
        level = ((active / (3.0 / 8**0.5)).log2() * 3).floor()
        of_drawn = ((drawn / (3.0 / 8**0.5)).log2() * 3).floor()
        for one in level.unique()[-15:]:
            if one > level.max() - 15:
                assert int((of_drawn == one).sum()) == min(2, int((level == one).sum()))


def test_the_histogram_holds_every_activation_within_a_bin() -> None:
    F, _, details = detailed(bins=10)
    F[::97] = 0
    for feature in range(64):
        active = F[:, feature][F[:, feature] > 0]
        assert int(details.histogram[feature].sum()) == len(active) == int(details.counts[feature])
        if len(active) < 50:
            continue
        exact = torch.histc(active, 10, 0.0, float(active.max()))
        off = (details.histogram[feature].cumsum(0) - exact.cumsum(0)).abs()
        assert int(off.max()) <= 2 + 0.05 * len(active)


@pytest.mark.parametrize("sparse", [0, 10**6])  # by sorting, by counting in place
def test_partners_equal_the_counts_of_the_dense_code(sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "_SPARSE", sparse)
    monkeypatch.setattr(coactivation, "_BLOCK_PAIRS", 500)
    F, _, details = detailed(partners=6)
    on = F > 0
    on[::97] = False
    together = on.T.double() @ on.double()
    counts = together.diagonal().clone()
    cosine = together / (counts[:, None] * counts).sqrt().clamp_min(1)
    cosine.fill_diagonal_(0)
    torch.testing.assert_close(details.partners.cosine.double(), cosine.topk(6).values, rtol=1e-5, atol=1e-6)
    for feature in range(64):
        for one in details.partners.of(feature, details.counts):
            assert (one.together, one.count) == (together[feature, one.feature], counts[one.feature])
    assert (details.share, details.n_ordinary) == (1.0, int((~torch.zeros(1000, dtype=torch.bool)).sum()) - 11)


def test_tokens_are_drawn_where_pairs_are_too_many() -> None:
    _, _, exact = detailed()
    _, _, details = detailed(max_pairs=8000)
    assert details.share == 0.25
    assert torch.equal(details.counts, exact.counts), "who fires how often is counted on all tokens"
    first = [row.index(best) for row, best in zip(details.partners.features.tolist(), exact.partners.features[:, 0])
             if best in row]  # fmt: skip
    assert len(first) > 40, "the best partner is mostly among the best of the sample"


def test_named_features_are_counted_alone_and_exactly() -> None:
    sae = make_sae()
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    code = sae.encode_sparse(x)
    every, few = CoActivity(64), CoActivity(64, [3, 9], max_pairs=9000)
    for activity in (every, few):
        for part in range(0, 1000, 100):
            activity.add(SparseCode(code.values[part : part + 100], code.indices[part : part + 100]))
    assert few.share == 1.0
    for one, other in zip(every.nearest([9, 3], 5), few.nearest([9, 3], 5)):
        assert torch.equal(one, other)
