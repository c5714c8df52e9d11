"""`correlation`: how a feature's largest activation over a text goes with the text's reward (CorrSteer).

r_j is Pearson's correlation of max over tokens of f_j with the reward, from sums in float64. The strength is the mean
of that maximum over the successes (reward above 1/2), with the sign of r: where r is negative, what successes lack is
taken away. Of answers the generated tokens count, not the prompt's.

Traps: the strength averages MAXIMA and is then added at every token; among thousands of features chance alone gives a
largest |r| of about sqrt(2 ln L / n) (recorded as `bound`, beside the null by permutation); and where the model's
success goes with the topic, so do the features found.

Source: arXiv 2508.12535, with its authors' code; added at `resid_pre` of a layer there, which is `resid_post` of the
layer before, at the last token of every step.
"""

import torch

from steersman.steer.scores.base import Evidence, Score
from steersman.steer.scores.statistics import null_bound
from steersman.steer.scores.table import Column


class Correlation(Score):
    """Pearson's r of max-pooled activations with a reward."""

    name = "correlation"
    source = "arXiv 2508.12535 (CorrSteer)"
    unit = "Pearson r with the reward"
    needs = ("labelled",)
    settings = ("permutations", "pool", "seed")

    def measure(self, evidence: Evidence, at: int) -> Column:
        sums = evidence.sums(at, "max")
        r = sums.correlation()
        success = sums.success_mean()
        strengths = torch.where(r[:, 0] < 0, -success.abs(), success)
        bound = null_bound(len(r), sums.n)
        return evidence.permuted_column(self, at, r, n=sums.n, strengths=strengths, bound=bound)
