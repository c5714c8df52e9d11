"""`lat` (linear artificial tomography): v along the first component of normalised differences of random pairs.

All examples of both sides are put in one seeded random order and neighbours are subtracted; each difference is scaled
to norm 1, so that none outweighs another. The sides are used only for sign and length (see
`steersman.steer.methods.streamed`). Source: arXiv 2310.01405, section 3.1. An odd example at the end is left out.
"""

from typing import Any

import torch
from torch import Tensor

from steersman.steer.methods.pca import PairedComponent
from steersman.steer.methods.streamed import StreamedMethod


class RandomPairComponent(PairedComponent):
    """Second moment of the normalised differences of neighbours."""

    def update(self, x: Tensor, positive: Tensor) -> None:
        super(PairedComponent, self).update(x, positive)
        whole = len(x) // 2 * 2
        difference = x[0:whole:2] - x[1:whole:2]
        norm = difference.norm(dim=1, keepdim=True)
        self.moment.add(torch.where(norm > 0, difference / norm, 0.0))

    def notes(self) -> dict[str, Any]:
        return super().notes() | {"seed": self.config.seed}


class LAT(StreamedMethod):
    """First component of normalised differences of random pairs at the last token."""

    name = "lat"
    source = "arXiv 2310.01405"
    positions = "last"
    order = "shuffled"
    estimator = RandomPairComponent
