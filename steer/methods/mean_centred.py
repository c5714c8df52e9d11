"""`mean_centred`: v = mean(target) - mean(corpus).

The positives are texts of the target, the negatives any text the model meets; nothing is contrasted with anything.
What all states have in common, which is most of their mean, goes away. Source: arXiv 2312.03813, equation 3. The
corpus' mean may be given directly, as {hook point: mean [D]}, in place of texts.
"""

from steersman.steer.methods.diffmean import MeanDifference
from steersman.steer.methods.streamed import StreamedMethod


class MeanCentred(StreamedMethod):
    """Mean of the target's states less the mean of a corpus."""

    name = "mean_centred"
    source = "arXiv 2312.03813"
    positions = "all"
    order = "sides"
    estimator = MeanDifference
    takes_means = True
    takes_weights = True
    per_step = True
