"""What rows of a source are to an SAE in training: which columns it reads and which it predicts, in which units, and
how those units are folded into the trained weights.

`Inputs` is the plain form: one scale for what is read and one for what is predicted. Another form is a subclass with a
`name`, found by it when a run is resumed or a checkpoint is opened as an SAE; `make_inputs` chooses.

Shape letters: N tokens, D width of a row, D_in and D_out widths of what is read and predicted.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.registry import Registry
from steersman.sae import SAE, SAEConfig
from steersman.train.run.recipe import TrainConfig
from steersman.train.store.statistics import ActivationStats


class Inputs:
    """Rows as they are but for a scale, so that what is read, and what is predicted, has unit variance per dimension.

    Of an SAE input and target are all of a row, of a transcoder its first `d_in` columns and the others.
    """

    forms: ClassVar[Registry[type["Inputs"]]] = Registry("form of inputs")
    name: ClassVar[str] = "scaled"
    """What the state of a checkpoint calls the form."""
    is_scale: ClassVar[bool] = True
    """Whether what is read is `scale` times a row and nothing else, so that an updater may scale rows as it reads
    them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Inputs.forms.register(cls, cls)

    def __init__(self, cfg: SAEConfig, scale: float = 1.0, scale_out: float = 1.0) -> None:
        """`cfg` is that of the whole SAE."""
        self.cfg, self.scale, self.scale_out = cfg, scale, scale_out

    @classmethod
    def of(cls, cfg: SAEConfig, parts: Sequence[ActivationStats]) -> "Inputs":
        """The form for rows of these statistics: of what is read, then of what is predicted where that differs.

        Raises a SteersmanError where they do not vary.
        """
        return cls(cfg, unit_variance(parts[0]), unit_variance(parts[-1]))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What of rows [N, D] is input [N, D_in] and what is target [N, D_out], in their own units. The one place that
        knows it; the two are one tensor where input and target are the same."""
        width = self.cfg.d_in
        return (rows[:, :width], rows[:, width:]) if self.cfg.transcoder else (rows, rows)

    def scaled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`split` as the SAE sees it while training; rows are fp32."""
        x, target = self.split(rows)
        scaled = x * self.scale
        return scaled, scaled if target is x else target * self.scale_out

    def target_mean(self, parts: Sequence[ActivationStats]) -> Tensor:
        """The mean target [D_out], in its own units, of rows whose hook points have these statistics."""
        return parts[-1].mean

    def scaled_target(self, target: Tensor) -> Tensor:
        """A target [..., D_out] in its own units, such as its mean, as the SAE sees it while training."""
        return target * self.scale_out

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        """Turn what was trained, decoder rows unit vectors, into the same SAE of rows as they are, in place."""
        sae.fold_scales(self.scale, self.scale_out)

    def record(self) -> dict[str, Any]:
        """What the `state.json` of a checkpoint has of it."""
        record: dict[str, Any] = {"scale": self.scale}
        if self.cfg.transcoder:
            record["scale_out"] = self.scale_out
        return record if type(self) is Inputs else record | {"inputs": self.name}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint has of it, by name; none of them counts latents."""
        return {}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `record` and `tensors` gave."""
        self.scale, self.scale_out = state["scale"], state.get("scale_out", state["scale"])


Inputs.forms.register(Inputs, Inputs)


def make_inputs(cfg: SAEConfig, config: TrainConfig, parts: Sequence[ActivationStats]) -> Inputs:
    """The form that a configuration asks for, for rows whose hook points have these statistics, in their order."""
    return Inputs.of(cfg, parts)


def restored_inputs(cfg: SAEConfig, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Inputs:
    """The form that a checkpoint's state is of. Raises a SteersmanError for one that is not known."""
    inputs = Inputs.forms[state.get("inputs", Inputs.name)](cfg)
    inputs.restore(state, tensors)
    return inputs


def unit_variance(stats: ActivationStats) -> float:
    """What activations are multiplied by to have unit variance per dimension. Raises a SteersmanError where they do not
    vary."""
    variance = stats.mean_squared_norm - float(stats.mean.double().square().sum())
    # Mean and norms are kept in float32: rows that are all the same differ from their mean by a few of its last digits.
    if not (math.isfinite(variance) and variance > 8 * torch.finfo(torch.float32).eps * stats.mean_squared_norm):
        raise SteersmanError("the activations do not vary: there is nothing for an SAE to learn from them")
    return math.sqrt(len(stats.mean) / variance)
