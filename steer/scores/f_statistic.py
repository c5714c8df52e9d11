"""`f_statistic`: the one-way F of two classes of texts for each feature (SAE-SSV's choice of latents).

A text is one sample, its mean activation over the tokens that count. F has no sign: the difference of the class means,
positive minus negative, is kept as the strength. For two classes it ranks features as |r| does.

Source: arXiv 2505.16188, which takes the 128 latents of largest F.
"""

from steersman.steer.scores.base import Evidence, Score
from steersman.steer.scores.table import Column


class FStatistic(Score):
    """How far two classes lie apart, against their spread."""

    name = "f_statistic"
    source = "arXiv 2505.16188 (SAE-SSV)"
    unit = "F (1, n - 2)"
    needs = ("labelled",)
    settings = ("permutations", "pool", "seed")

    def measure(self, evidence: Evidence, at: int) -> Column:
        sums = evidence.sums(at, "mean")
        strengths = sums.difference()[:, 0]
        return evidence.permuted_column(self, at, sums.f_statistic(), n=sums.n, strengths=strengths)
