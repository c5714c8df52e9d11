"""TopK with a supervised latent (SCAR, arXiv 2411.07122): latent 0 learns to tell a label of the text.

The loss is that of TopK and, with z_0 the pre-activation of latent 0 and y the label of a token,

    coefficient * mean over labelled tokens of BCE(sigmoid(a z_0), y)

beside the squared error as a fraction of the variance. Decoder rows are unit vectors here, and of any length in the
paper, whose z_0 so is a z_0 of ours with the learned gain a = 1/|d_0|: without it z_0 would have to be log-odds and the
size of a direction at once. Tokens without a label (-1) take no part in that mean: turned
into "no", as the authors' code does, they would teach the latent that what nobody looked at is absent. Latent 0 is kept
out of the competition for K and always there: it neither crowds out another latent nor is missing where the steering
looks for it. So a token has up to K + 1 active latents, and f_0 = ReLU(z_0).

Labels are of texts, copied to each of their tokens, or of tokens. Steering by it is `features({0: a}, mode="scale")`,
which keeps the reconstruction's error, so that a = 1 changes nothing (the authors replace the activations by the
reconstruction, and a = 1 does not).

Another program reads its files as TopK, where latent 0 competes for one of the K places.

Shape letters: N tokens, L latents, D width, K active latents a token beside latent 0.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steersman.errors import SteersmanError
from steersman.kernels import choose, with_gradient
from steersman.sae.architectures.auxk import AuxKSAE
from steersman.sae.architectures.topk import TopKSAE
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig
from steersman.sae.training import Step, TrainingCode, TrainingState

LOGIT_SCALE = "logit_scale"
"""Entry of the metadata: what z_0 is multiplied by to be the log-odds that were trained."""


class SupervisedTopKSAE(TopKSAE):
    """`f = (ReLU(z_0), ReLU(TopK(z_1 ... z_L-1)))`, `z = (x - b_dec) W_enc + b_enc`.

    >>> sae = SAE(SAEConfig(d_in=6, d_sae=32, k=4, architecture="supervised_topk"))
    >>> x = torch.randn(5, 6)
    >>> sae.encode_sparse(x).values.shape, sae.label_logits(x).shape
    (torch.Size([5, 5]), torch.Size([5]))
    """

    name, saelens_name = "supervised_topk", "topk"
    supervised = "topk"
    fused = exact_k = False
    defaults: ClassVar[Mapping[str, Any]] = {"coefficient": 1.0, "positive_weight": 1.0}
    """`coefficient` is the weight of the label's loss; `positive_weight` how many tokens of label 0 one of label 1
    counts."""
    encode_features = SAE.encode_features

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, generator)
        if LOGIT_SCALE not in cfg.metadata:  # it is still to be trained
            self.log_gain = nn.Parameter(torch.zeros(1))

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        super().check(cfg)
        if cfg.k >= cfg.d_sae:
            raise SteersmanError(f"k = {cfg.k} of the {cfg.d_sae - 1} latents beside the supervised one: lower k")
        for name in cls.defaults:
            value = {**cls.defaults, **cfg.options}.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise SteersmanError(f"option {name} must be a number of 0 or more, got {value!r}")

    def _pre_activation(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """z_0 [N] fp32 of x [N, D], with rows [L, D] of the encoder."""
        centred = x.float() if bias is None else x.float() - bias.float()
        return centred @ rows[0].float() + self.b_enc[0].float()

    def _with_first(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The code [N, K + 1], largest first: the K largest of latents 1 on, and latent 0."""
        encode = choose(x.device).topk_encode
        values, indices = encode(x, rows[1:], self.b_enc[1:], self.cfg.k, bias)
        first = self._pre_activation(x, rows, bias).relu()[:, None]
        values, indices = torch.cat([values, first], 1), torch.cat([indices + 1, torch.zeros_like(indices[:, :1])], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, order)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._with_first(x, self.W_enc.T, self.input_bias)

    @torch.no_grad()
    def label_logits(self, x: Tensor) -> Tensor:
        """The log-odds [N] that the label of x [N, D] is 1: z_0, before its activation, in the scale of training."""
        rows, _ = self._rows(x)
        return self._pre_activation(rows, self.W_enc.T, self.input_bias) * self._gain()

    def _gain(self) -> Tensor | float:
        """What z_0 is multiplied by to be log-odds: a, or once it is trained what became of it."""
        return self.log_gain.exp() if hasattr(self, "log_gain") else self.cfg.metadata[LOGIT_SCALE]

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        rows, bias = (self.W_enc.T, self.input_bias) if W_enc is None else (W_enc, None)
        with torch.no_grad():
            values, indices = self._with_first(x, rows, bias)
        values, order = with_gradient(x, rows, self.b_enc, bias, values, indices)
        return TrainingCode(values, order)

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        step = AuxKSAE.training_step(self, x, target, state)
        if state.labels is None:
            raise SteersmanError(f"{self.name} trains on labels of its rows, and got none")
        bias = self.input_bias
        z = self._gain() * self._pre_activation(x, self.W_enc.T, None if bias is None else bias.detach())
        known = state.labels >= 0
        weight = torch.tensor(float(self.options["positive_weight"]), device=z.device)
        loss = F.binary_cross_entropy_with_logits(z, known * state.labels.float(), reduction="none", pos_weight=weight)
        # Losses are sums over tokens and widths, of which the squared error is one: so is a mean, times their number.
        mean = torch.where(known, loss, torch.zeros_like(loss)).sum() / known.sum().clamp_min(1)
        losses = {**step.losses, "label": self.options["coefficient"] * target.numel() * mean}
        return Step(step.code, losses, step.logged)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """See `SAE.fold_input_scale`; z_0 is divided by the scale, which its gain makes good. From then on the gain is
        a number of the configuration's metadata, so that files hold the tensors of a TopK SAE."""
        super().fold_input_scale(scale)
        self.cfg.metadata[LOGIT_SCALE] = float(self._gain()) * scale
        if hasattr(self, "log_gain"):
            del self.log_gain
