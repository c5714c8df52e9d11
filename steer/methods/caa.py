"""`caa` (contrastive activation addition): v = mean over pairs of h+ - h- at the answer's token.

The two texts of a pair are one prompt with two answers. Source: arXiv 2312.06681, equation 1. An answer of several
tokens is read at their mean.
"""

from steersman.steer.methods.diffmean import MeanDifference
from steersman.steer.methods.streamed import StreamedMethod


class CAA(StreamedMethod):
    """Mean of the paired differences at the answer."""

    name = "caa"
    source = "arXiv 2312.06681"
    positions = "answer"
    order = "pairs"
    estimator = MeanDifference  # the mean of the differences is the difference of the means
    takes_weights = True
    per_step = True
