"""ReLU, the "standard" architecture (Bricken et al. 2023, "Towards Monosemanticity"): every positive pre-activation.
Inference only."""

from typing import ClassVar

from torch import Tensor

from steersman.kernels import choose
from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen


class ReLUSAE(ElementwiseSAE):
    """`f = ReLU((x - b_dec) W_enc + b_enc)`."""

    activation: ClassVar[str] = "relu"

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        zero = rows.new_zeros((), dtype=self.b_enc.dtype)
        return choose(rows.device).threshold_encode(
            rows, self._encoder(features), chosen(self.b_enc, features), zero, self.encoder_bias_in
        )
