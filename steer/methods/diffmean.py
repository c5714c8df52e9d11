"""`diffmean`: v = mean of all tokens of the positives - mean of all tokens of the negatives.

Source: arXiv 2501.17148 (AxBench), section 3.2; there unit-normalised, here at the length of the difference.
"""

from torch import Tensor

from steersman.steer.methods.reading import Part
from steersman.steer.methods.streamed import Estimator, StreamedMethod


class MeanDifference(Estimator):
    """The difference of the means and nothing else; of examples with weights, of the weighted means."""

    def observe(self, part: Part) -> None:
        for side, chosen in ((self.positive, part.positive), (self.negative, ~part.positive)):
            side.add(part.x[chosen], part.weight[chosen])

    def direction(self) -> Tensor:
        return self.difference()


class DiffMean(StreamedMethod):
    """Difference of the means over all tokens of each side."""

    name = "diffmean"
    source = "arXiv 2501.17148"
    positions = "all"
    order = "sides"
    estimator = MeanDifference
    takes_means = True
    takes_weights = True
    per_step = True
