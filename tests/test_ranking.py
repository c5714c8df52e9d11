"""AUROC, which several reports share: by counting pairs, and to the last bit whatever the order of the samples."""

import pytest
import torch

from steersman.ranking import auroc, weighted_auroc
from steersman.steer.methods.diagnostics import Projections

G = torch.Generator().manual_seed(0)


def test_it_is_the_share_of_pairs_in_the_right_order() -> None:
    scores = torch.randint(0, 4, (60, 3), generator=G).float()
    labels = torch.rand(60, 2, generator=G) > 0.7
    got = auroc(scores, labels)
    for score in range(3):
        for label in range(2):
            positive = scores[labels[:, label], score]
            negative = scores[~labels[:, label], score]
            above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
            assert float(got[score, label]) == pytest.approx(float(above.mean()))
    order = torch.randperm(60, generator=G)
    assert torch.equal(auroc(scores[order], labels[order]), got)
    assert auroc(scores, torch.zeros(60, 1, dtype=torch.bool)).isnan().all()


def test_weights_that_count_repeat_the_samples() -> None:
    """Weighting a sample by 2 is having it twice, and by 0 leaving it out."""
    scores, labels = torch.randint(0, 5, (50,), generator=G).float(), torch.rand(50, generator=G) > 0.6
    counts = torch.randint(0, 3, (50, 4), generator=G)
    got = weighted_auroc(scores, labels, counts.float())
    for draw in range(4):
        drawn = torch.arange(50).repeat_interleave(counts[:, draw])
        assert float(got[draw]) == pytest.approx(float(auroc(scores[drawn, None], labels[drawn, None])))
    assert weighted_auroc(scores, labels, labels[:, None].float()).isnan().all()


def test_a_vector_and_a_feature_are_scored_alike() -> None:
    """The same numbers as projections on a vector and as activations of a feature give the same figure."""
    x = torch.randn(41, 1, generator=G)
    positive = torch.rand(41, generator=G) > 0.6
    projections = Projections(torch.ones(1), None)
    projections.add(x, positive, torch.arange(41))
    assert projections.figures(paired=False)["auroc"] == float(auroc(x.double(), positive[:, None]))
