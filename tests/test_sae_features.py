"""Feature summaries against brute force over the dense code."""

import torch
from support.helpers import make_sae

from steersman.sae.features import Rows, summarize_features


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
