"""`contrast`: delta_j = mean f_j(positive) - mean f_j(negative), which is also the strength to steer by (LF-Steering).

Positive are, say, answers that agree with those to the same question put in other words, negative those that do not;
swapping them flips every sign. The mean is over the tokens that count of a text, then over texts.

Trap: "more consistent" is also reached by one answer to everything: report accuracy and the entropy of the answers
beside it. The published edit adds delta_j only where f_j is active.

Source: arXiv 2501.11036.
"""

from steersman.steer.scores.base import Evidence, Score
from steersman.steer.scores.table import Column


class Contrast(Score):
    """The difference of mean activations of two classes."""

    name = "contrast"
    source = "arXiv 2501.11036 (LF-Steering)"
    unit = "difference of mean activations"
    needs = ("labelled",)
    settings = ("permutations", "pool", "seed")

    def measure(self, evidence: Evidence, at: int) -> Column:
        sums = evidence.sums(at, "mean")
        difference = sums.difference()
        return evidence.permuted_column(self, at, difference, n=sums.n, strengths=difference[:, 0])
