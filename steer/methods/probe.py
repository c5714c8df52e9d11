"""`probe`: v along the weight of a logistic regression of the side on the state (`steersman.steer.methods.logistic`).

The samples are in a temporary file, which the regression goes over in chunks. Source: arXiv 2501.17148 (AxBench),
section 3.2, which uses Adam. Sign and length: see `steersman.steer.methods.streamed`.
"""

from typing import Any

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.examples import Examples
from steersman.steer.methods.logistic import Logistic, fit_logistic
from steersman.steer.methods.moments import SampleFile
from steersman.steer.methods.streamed import Estimator, StreamedMethod


class LogisticWeight(Estimator):
    """Keeps the samples in a file and fits the regression at the end."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__(config)
        self.samples = SampleFile()

    def update(self, x: Tensor, positive: Tensor) -> None:
        super().update(x, positive)
        self.samples.add(x, positive)

    def merged(self, other: Any) -> Any:
        both = super().merged(other)
        both.samples = self.samples.merged(other.samples)
        return both

    def direction(self) -> Tensor:
        return self.along(self.fit().weight[0])

    def fit(self) -> Logistic:
        """The regression, a problem of its own."""
        return fit_logistic(lambda: ((x[:, None], side) for x, side in self.samples.chunks()), l2=self.config.l2)


class Probe(StreamedMethod):
    """Logistic regression over all tokens of each side."""

    name = "probe"
    source = "arXiv 2501.17148"
    positions = "all"
    order = "sides"
    estimator = LogisticWeight

    def check(self, examples: Examples, config: ContrastConfig, *, has_means: bool = False) -> None:
        super().check(examples, config, has_means=has_means)
        if not config.l2 > 0:
            raise SteersmanError(
                f"l2 must be above 0, got {config.l2}: separable examples have no finite weight without"
            )
