"""`pca`: v along the first principal component of the paired differences h+ - h-.

The components are taken about zero: subtracting the differences' mean first would remove exactly what the pairs have in
common. That equals the components of the differences with random signs, as in the source, arXiv 2310.01405 (appendix
C.1). Sign and length: see `steersman.steer.methods.base`.
"""

from typing import Any

from torch import Tensor

from steersman.steer.methods.base import ContrastConfig, Estimator, StreamedMethod
from steersman.steer.methods.moments import SecondMoment


class PairedComponent(Estimator):
    """Second moment of the differences of neighbouring samples."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__(config)
        self.moment = SecondMoment()

    def update(self, x: Tensor, positive: Tensor) -> None:
        super().update(x, positive)
        self.moment.add(x[0::2] - x[1::2])

    def merged(self, other: Any) -> Any:
        both = super().merged(other)
        both.moment = self.moment.merged(other.moment)
        return both

    def direction(self) -> Tensor:
        return self.along(self.moment.first_component()[0])

    def notes(self) -> dict[str, Any]:
        return {"share_of_variance": self.moment.first_component()[1]}


class PCA(StreamedMethod):
    """First principal component of paired differences at the last token."""

    name = "pca"
    source = "arXiv 2310.01405"
    positions = "last"
    order = "pairs"
    estimator = PairedComponent
