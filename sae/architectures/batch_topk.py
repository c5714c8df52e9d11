"""BatchTopK (arXiv 2412.06410): the N*K largest pre-activations of a batch while training, a threshold at inference."""

from typing import ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import choose, with_gradient
from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen
from steersman.sae.base import TrainingCode
from steersman.sae.config import SAEConfig


class BatchTopKSAE(ElementwiseSAE):
    """Trains on the batch's N*K largest; encodes by `threshold`, the mean over steps of the smallest value selected
    (sec. 3), so that a token's code does not depend on its neighbours."""

    activation: ClassVar[str] = "batch_topk"
    threshold: Tensor

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        self.register_buffer("threshold", torch.tensor(-1.0))
        """A scalar; negative until training has set it."""

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        self._check_threshold()
        return choose(rows.device).threshold_encode(
            rows, self._encoder(features), chosen(self.b_enc, features), self.threshold, self.encoder_bias_in
        )

    def training_code(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        rows = self.W_enc.T if W_enc is None else W_enc
        with torch.no_grad():
            values, indices, smallest = choose(x.device).batch_topk_encode(
                x, rows, self.b_enc, self.cfg.k, self.encoder_bias_in
            )
        values, order = with_gradient(x, rows, self.b_enc, self.encoder_bias_in, values, indices)
        return TrainingCode(values, order, smallest)

    def _check_threshold(self) -> None:
        if bool(self.threshold < 0):
            raise SteersmanError("this BatchTopK SAE has no threshold yet: train it before encoding with it")

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_threshold()
        return choose(x.device).threshold_select(x, self.W_enc.T, self.b_enc, self.threshold, self.encoder_bias_in)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        super().fold_input_scale(scale)
        self.threshold /= scale
