"""ReLU, the "standard" architecture (Bricken et al. 2023, "Towards Monosemanticity"): every positive pre-activation.

The loss is the squared error plus, with inputs of unit variance per dimension in D dimensions,

    coefficient * sqrt(D) * sum_i phi(f_i),

phi one of (option `penalty`)

- `l1`: f. Decoder rows are unit vectors throughout, so this is also the L1 norm weighted by the decoder's norms.
- `tanh`: s tanh(f / s), s = `tanh_scale` sqrt(D): an L1 norm that ends to grow where a feature is plainly active
  (arXiv 2407.14435, app. B; Anthropic's update of January 2025).
- `p_annealed`: s (f / s)^p, s = sqrt(D), p falling from 1 to `p_end` over the run (arXiv 2408.00113, sec. 4.2).

The coefficient rises over the first `penalty_warmup` of the run; with `target_l0` there is no such rise, and it is
multiplied by exp(c + 10 m), c and m as in `steered_l0`. Dead latents learn by AuxK, as those of TopK do.

Shape letters: N tokens, L latents, D width, K active latents of the fullest token.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import choose, with_gradient
from steersman.sae.architectures.auxk import AuxKSAE
from steersman.sae.architectures.elementwise import ElementwiseSAE, chosen
from steersman.sae.architectures.steered_l0 import SteeredL0SAE
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig
from steersman.sae.training import Step, TrainingCode, TrainingState

PENALTIES = ("l1", "tanh", "p_annealed")
_PROPORTIONAL = 10.0
"""What m, by how much the last batch missed the target, counts in the logarithm of the coefficient."""
_SMALL = 1e-3
"""Added to f / s before the power p below 1, which has no finite slope at 0."""


class PenalisedSAE(SteeredL0SAE, AuxKSAE, ElementwiseSAE):
    """What ReLU and Gated SAEs share: a penalty on the size of a code, and where its coefficient comes from."""

    trainable = True
    host_free = False
    target_l0 = "optional"
    gain = 0.4
    defaults: ClassVar[Mapping[str, Any]] = {
        "penalty": "l1", "coefficient": 0.1, "penalty_warmup": 0.1, "tanh_scale": 0.1, "p_end": 0.2,
    }  # fmt: skip
    gate_bias: ClassVar[str] = "b_enc"
    """The bias that decides what is active."""

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        super().check(cfg)
        if not cls.penalised():
            return
        options = {**cls.defaults, **cfg.options}
        if options["penalty"] not in PENALTIES:
            raise SteersmanError(f"option penalty = {options['penalty']!r} must be one of {', '.join(PENALTIES)}")
        for name, largest in (("coefficient", 1e9), ("tanh_scale", 1e9), ("penalty_warmup", 1), ("p_end", 1)):
            value, lowest = options[name], 0 if name == "penalty_warmup" else 1e-9
            known = isinstance(value, int | float) and not isinstance(value, bool)
            if not (known and lowest <= value <= largest):
                what = "between 0 and 1" if largest == 1 else "above 0"
                raise SteersmanError(f"option {name} = {value!r} must be a number {what}")

    @classmethod
    def penalised(cls) -> bool:
        """Whether the penalty is in the loss: not of a subclass whose settings are its own."""
        return "coefficient" in cls.defaults

    def begin_training(self, x: Tensor, config: Any) -> None:
        """One negative bias for all latents, with which `target_l0` of them are active a token, or d_in / 4."""
        if not self.penalised():
            return
        k = max(1, min(self.whole_cfg.d_sae, round(config.target_l0 or self.cfg.d_in / 4)))
        bias = self.get_parameter(self.gate_bias)
        bias.sub_(largest_of_batch(self, x, bias, k))

    def penalty(self, values: Tensor, state: TrainingState) -> Tensor:
        """What counts in the loss for a code's values [N, K], 0 where not active: a scalar of all ranks' latents."""
        options, unit = self.options, self.cfg.d_in**0.5
        if options["penalty"] == "tanh":
            scale = options["tanh_scale"] * unit
            size = scale * (values / scale).tanh()
        elif options["penalty"] == "p_annealed":
            p = 1 - (1 - options["p_end"]) * state.progress
            size = unit * ((values / unit + _SMALL).pow(p) - _SMALL**p)
        else:
            size = values
        return self._coefficient(state) * unit * self.latents.total(size.sum())

    def _coefficient(self, state: TrainingState) -> Tensor | float:
        options, steering = self.options, self.steering(state)
        if steering is not None:
            c, m = steering
            return options["coefficient"] * (c + _PROPORTIONAL * m).exp()
        warm = options["penalty_warmup"]
        return options["coefficient"] * (min(1.0, state.progress / warm) if warm else 1.0)


def largest_of_batch(sae: SAE, x: Tensor, bias: Tensor, k: int) -> Tensor:
    """Above which number (a scalar) lie the k largest pre-activations a token of the batch x [N, D], over all ranks,
    with this bias [L]; 0 where none is positive."""
    latents = sae.latents
    values, _, lowest = choose(x.device).batch_topk_encode(
        x, sae.W_enc.T, bias, min(k * latents.n_replicas, sae.cfg.d_sae), sae.input_bias
    )
    among = latents.keep_batch_topk(values, len(x) * latents.n_replicas * k)
    lowest = lowest if among is None else among[1]
    return torch.where(lowest.isfinite(), lowest, torch.zeros_like(lowest))


class ReLUSAE(PenalisedSAE):
    """`f = ReLU((x - b_dec) W_enc + b_enc)`.

    A subclass with `defaults` of its own has the squared error alone from `training_step`, and adds its losses.
    """

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

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        if not self.penalised():
            return SAE.training_step(self, x, target, state)
        step = super().training_step(x, target, state)
        return Step(step.code, {**step.losses, "penalty": self.penalty(step.code.values, state)}, step.logged)
