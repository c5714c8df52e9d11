"""BatchTopK (arXiv 2412.06410): the N*K largest pre-activations of a batch while training, a threshold at inference."""

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import choose, with_gradient
from steersman.sae.architectures.auxk import AuxKSAE
from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen
from steersman.sae.config import SAEConfig
from steersman.sae.training import Step, TrainingCode, TrainingState, keep_only


class BatchTopKSAE(AuxKSAE, ElementwiseSAE):
    """Trains on the batch's N*K largest; encodes by `threshold`, the mean over steps of the smallest value selected
    (sec. 3), so that a token's code does not depend on its neighbours."""

    name, saelens_name = "batch_topk", "jumprelu"
    uses_k = trainable = whole_batch = fused = True
    host_free = False
    threshold: Tensor

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        self.register_buffer("threshold", torch.tensor(-1.0))
        """A scalar; negative until training has set it."""

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        self._check_threshold()
        return choose(rows.device).threshold_encode(
            rows,
            self._encoder(features),
            chosen(self.b_enc, features),
            chosen(self._thresholds(), features),
            self.input_bias,
        )

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        rows, bias = (self.W_enc.T, self.input_bias) if W_enc is None else (W_enc, None)
        k, latents = self.whole_cfg.k, self.latents
        with torch.no_grad():
            # All that the batch selects may lie here, so a rank proposes as many as all replicas select.
            values, indices, lowest = self._proposed(x, rows, min(k * latents.n_replicas, self.cfg.d_sae), bias)
            among = latents.keep_batch_topk(values, len(x) * latents.n_replicas * k)
            if among is not None:
                kept, lowest = among
                values, indices = keep_only(values, indices, kept)
            values = self._activations(values, indices)
        bias = None if bias is None else latents.uses(bias)
        values, order = with_gradient(x, rows, self.b_enc, bias, values, indices)
        return TrainingCode(values, order, lowest)

    def _proposed(self, x: Tensor, rows: Tensor, k: int, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The N*k largest of what is selected by, as `reference.batch_topk_encode` of x [N, D] and rows [L, D]."""
        return choose(x.device).batch_topk_encode(x, rows, self.b_enc, k, bias)

    def _activations(self, values: Tensor, indices: Tensor) -> Tensor:
        """The activations [N, K] of what is selected by `values` [N, K] at latents `indices`."""
        return values

    def _thresholds(self) -> Tensor:
        """What activations are compared with at inference: a scalar, or [L]."""
        return self.threshold

    @torch.no_grad()
    def after_step(self, step: Step, state: TrainingState) -> None:
        lowest = step.code.min_selected
        if lowest is None:
            return
        usable = torch.where(lowest.isfinite(), lowest, self.threshold)
        moved = 0.99 * self.threshold + 0.01 * usable
        self.threshold.copy_(torch.where(self.threshold < 0, usable, moved))

    def _check_threshold(self) -> None:
        if bool(self.threshold < 0):
            raise SteersmanError("this BatchTopK SAE has no threshold yet: train it before encoding with it")

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_threshold()
        return choose(x.device).threshold_select(x, self.W_enc.T, self.b_enc, self._thresholds(), self.input_bias)

    def weights(self) -> dict[str, Tensor]:
        """As a JumpReLU SAE has them: the threshold for each latent."""
        return super().weights() | {"threshold": self.threshold.expand(self.cfg.d_sae)}

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        super().fold_input_scale(scale)
        self.threshold /= scale
