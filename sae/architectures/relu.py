"""ReLU, the "standard" architecture (Bricken et al. 2023, "Towards Monosemanticity"): every positive pre-activation.
Inference only."""

import torch
from torch import Tensor

from steersman.kernels import choose, with_gradient
from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen
from steersman.sae.training import TrainingCode


class ReLUSAE(ElementwiseSAE):
    """`f = ReLU((x - b_dec) W_enc + b_enc)`."""

    name, saelens_name = "relu", "standard"

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        zero = rows.new_zeros((), dtype=self.b_enc.dtype)
        return choose(rows.device).threshold_encode(
            rows, self._encoder(features), chosen(self.b_enc, features), zero, self.input_bias
        )

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        """See `SAE.encode_training`. A subclass whose loss makes the code sparse trains with it."""
        rows, bias = self.W_enc.T if W_enc is None else W_enc, self.input_bias
        with torch.no_grad():
            values, indices = self._select(x)
        bias = None if bias is None else self.latents.uses(bias)
        values, order = with_gradient(x, rows, self.b_enc, bias, values, indices)
        return TrainingCode(values, order)
