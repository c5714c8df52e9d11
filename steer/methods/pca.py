"""`pca`: v along the first principal component of the paired differences h+ - h-.

The components are taken about zero: subtracting the differences' mean first would remove exactly what the pairs have in
common. That equals the components of the differences with random signs, as in the source, arXiv 2310.01405 (appendix
C.1). With `centre="corpus"` it is the first component of all states about their mean, sides unlooked at. Sign and
length: see `steersman.steer.methods.streamed`.
"""

from typing import Any

import torch
from torch import Tensor

from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.moments import SecondMoment
from steersman.steer.methods.streamed import Estimator, StreamedMethod


class PairedComponent(Estimator):
    """Second moment of the differences of neighbouring samples, or of all of them about their mean."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__(config)
        self.moment = SecondMoment()

    def update(self, x: Tensor, positive: Tensor) -> None:
        super().update(x, positive)
        self.moment.add(x if self.config.centre == "corpus" else x[0::2] - x[1::2])

    def component(self) -> tuple[Tensor, float]:
        """The unit component [D] float64, and its share of the trace."""
        if self.config.centre != "corpus" or self.moment.total is None:
            return self.moment.first_component()
        everything = self.positive.merged(self.negative)
        return SecondMoment(
            self.moment.total - everything.n * torch.outer(everything.mean, everything.mean)
        ).first_component()

    def merged(self, other: Any) -> Any:
        both = super().merged(other)
        both.moment = self.moment.merged(other.moment)
        return both

    def direction(self) -> Tensor:
        return self.along(self.component()[0])

    def notes(self) -> dict[str, Any]:
        return {"share_of_variance": self.component()[1]}


class PCA(StreamedMethod):
    """First principal component of paired differences at the last token."""

    name = "pca"
    source = "arXiv 2310.01405"
    positions = "last"
    order = "pairs"
    estimator = PairedComponent
    centres = ("pair", "corpus")
