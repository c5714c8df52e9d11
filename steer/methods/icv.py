"""`icv` (in-context vectors): v = mean + first principal component of the paired differences, over all layers at once.

The states at all hook points are laid side by side, [L D], and the differences h+ - h- of the pairs analysed there.
Source: arXiv 2311.06668 and its authors' code, which reads the last token. Give the hook points of every layer, as the
paper does; the vector is cut into one part for each.

The component has unit length over ALL hook points together, so that beside the mean of the differences it hardly
shows: v is in effect the mean difference (the notes say the cosine of the two). The paper's text describes the
component alone, which `pca` makes. Its sign, which is arbitrary, is chosen to agree with the mean. One pair has no
component: v is its difference, which is how a vector is made for one input (VISTA, arXiv 2502.03628: the prompt with
what it is to attend to, and without). The text half of VTI (2410.15778) and the steering half of Safety Arithmetic
(2406.11801) are this vector of other contrasts. All of them add it to what the MLPs return, keeping the state's norm;
the authors read block outputs and write into MLP outputs, two spaces: name the hook points of the edit for both here.
"""

from typing import Any

import torch
from torch import Tensor

from steersman.steer.methods.base import ContrastConfig
from steersman.steer.methods.moments import SampleFile
from steersman.steer.methods.streamed import Estimator, StreamedMethod

BLOCK = 256  # differences that are multiplied with one another at a time


class MeanAndComponent(Estimator):
    """Differences of pairs, on disk; their mean and the first component about it, through their Gram matrix [n, n]."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__(config)
        self.differences = SampleFile()
        self._found: tuple[Tensor, float] | None = None

    def update(self, x: Tensor, positive: Tensor) -> None:
        super().update(x, positive)
        if len(x):
            difference = x[0::2] - x[1::2]
            self.differences.add(difference, torch.ones(len(difference)))

    def merged(self, other: Any) -> Any:
        both = super().merged(other)
        both.differences = self.differences.merged(other.differences)
        return both

    def component(self) -> tuple[Tensor, float]:
        """The unit component [D] float64 (zero where all differences are alike) and its share of their variance."""
        if self._found is None:
            self._found = self._component()
        return self._found

    def _component(self) -> tuple[Tensor, float]:
        mean = self.difference()
        rows = [part.double() - mean for part, _ in self.differences.chunks(BLOCK)]
        centred = torch.cat(rows)
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        spread = float(values.clamp(min=0).sum())
        if not float(values[-1]) > 1e-12 * len(centred) * float(mean.square().sum()):
            return torch.zeros_like(mean), 0.0
        u = centred.T @ vectors[:, -1]
        u = u / u.norm()
        return (-u if float(u @ mean) < 0 else u), float(values[-1]) / spread

    def direction(self) -> Tensor:
        return self.difference() + self.component()[0]

    def notes(self) -> dict[str, Any]:
        v, mean = self.direction(), self.difference()
        return {
            "share_of_variance": self.component()[1],
            "cosine_to_mean_difference": float(v @ mean / (v.norm() * mean.norm())),
        }


class ICV(StreamedMethod):
    """Mean and first component of paired differences, over the hook points together."""

    name = "icv"
    source = "arXiv 2311.06668"
    positions = "last"
    order = "pairs"
    estimator = MeanAndComponent
    joint = True
