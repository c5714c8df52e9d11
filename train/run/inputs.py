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
from steersman.sae import SAE, CrosscoderSAE, SAEConfig
from steersman.train.run.recipe import TrainConfig
from steersman.train.store.statistics import ActivationStats


class Inputs:
    """Rows as they are but for a scale, so that what is read, and what is predicted, has unit variance per dimension.

    Of an SAE input and target are all of a row, of a transcoder its first `d_in` columns and the others.
    """

    forms: ClassVar[Registry[type["Inputs"]]] = Registry("form of inputs")
    name: ClassVar[str] = "scaled"
    """What the state of a checkpoint calls the form."""
    is_scale: bool = True
    """Whether input and target are `scale` times a row and nothing else, so that an updater may scale rows as it reads
    them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Inputs.forms.register(cls, cls)

    def __init__(self, cfg: SAEConfig, scale: float = 1.0, scale_out: float = 1.0) -> None:
        """`cfg` is that of the whole SAE."""
        self.cfg, self.scale, self.scale_out = cfg, scale, scale_out
        if cfg.transcoder:
            self.is_scale = False

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

    @torch.no_grad()
    def unfold(self, sae: SAE) -> None:
        """The inverse of `fold`: turn an SAE of rows as they are into the same in the units of training, in place."""
        if type(self).fold is not Inputs.fold:
            raise SteersmanError(f"no SAE that is there can be trained on with {self.name} inputs: train without init")
        sae.fold_scales(1 / self.scale, 1 / self.scale_out)

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

WHITEN_SHRINKAGE = 0.1
"""How far whitening shrinks the covariance unless asked otherwise."""


class WhitenedInputs(Inputs):
    """Whitened rows, both read and predicted: z = W (x - m), with W C' W^T the identity (arXiv 2511.13981).

    C' = (1 - s) C + s tr(C) / D I is the covariance C, shrunk by s towards a multiple of the identity (Ledoit and Wolf
    2004), so that directions in which rows hardly vary are not blown up to the size of the others. By its eigenvectors
    E and eigenvalues v, W = v^(-1/2) E^T (pca, the paper's), or E v^(-1/2) E^T (zca), the same turned back to the axes
    of the rows, which Adam, that moves each number for itself, is not indifferent to. W is scaled so that z has unit
    variance per dimension.

    Here the squared error is that of whitened rows. (The paper undoes the whitening before it takes the error; then
    only what the encoder reads changes, which on planted features found no more of them than no whitening.)
    """

    name = "whitened"
    is_scale = False

    def __init__(self, cfg: SAEConfig, mean: Tensor | None = None, matrix: Tensor | None = None) -> None:
        """`mean` is m [D] and `matrix` W [D, D]; those of a checkpoint are brought by `restore`."""
        super().__init__(cfg)
        self.mean = torch.zeros(cfg.d_in) if mean is None else mean.float()
        self.matrix = torch.eye(cfg.d_in) if matrix is None else matrix.float()

    @classmethod
    def of_covariance(
        cls, cfg: SAEConfig, mean: Tensor, covariance: Tensor, how: str, shrinkage: float
    ) -> "WhitenedInputs":
        """For rows of this mean [D] and covariance [D, D]; `how` is "zca" or "pca"."""
        covariance = covariance.double()
        D, total = len(covariance), covariance.trace()
        values, vectors = torch.linalg.eigh(covariance)
        shrunk = (1 - shrinkage) * values.clamp_min(0) + shrinkage * total / D
        # A direction without any variance, and without shrinkage, has nothing to be brought to unit variance.
        shrunk = shrunk.clamp_min(torch.finfo(torch.float32).eps * float(total) / D)
        matrix = vectors.T / shrunk.sqrt()[:, None]
        if how == "zca":
            matrix = vectors @ matrix
        variance = float((values.clamp_min(0) / shrunk).sum()) / D
        return cls(cfg, mean, matrix / math.sqrt(variance))

    def scaled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        z = self.scaled_target(rows)
        return z, z

    def target_mean(self, parts: Sequence[ActivationStats]) -> Tensor:
        return self.mean

    def scaled_target(self, target: Tensor) -> Tensor:
        self._move_to(target.device)
        return (target - self.mean) @ self.matrix.T

    def _move_to(self, device: torch.device) -> None:
        if self.matrix.device != device:
            self.mean, self.matrix = self.mean.to(device), self.matrix.to(device)

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        super().fold(sae)  # a scale of 1: what an architecture does at the end
        sae.fold_linear(self.matrix, self.mean)

    def tensors(self) -> dict[str, Tensor]:
        return {"inputs.mean": self.mean, "inputs.matrix": self.matrix}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().restore(state, tensors)
        self.mean, self.matrix = tensors["inputs.mean"], tensors["inputs.matrix"]


class ScaledSides(Inputs):
    """Rows of several hook points side by side, each scaled to unit variance per dimension by itself, so that none
    rules the squared error of the others. What a crosscoder reads and writes."""

    name = "scaled_sides"
    is_scale = False

    def __init__(self, cfg: SAEConfig, scales: Sequence[float] = ()) -> None:
        super().__init__(cfg)
        self.scales = tuple(scales)

    @classmethod
    def of(cls, cfg: SAEConfig, parts: Sequence[ActivationStats]) -> "ScaledSides":
        scales = []
        for side, stats in zip(cfg.sides, parts, strict=True):
            try:
                scales.append(unit_variance(stats))
            except SteersmanError as error:
                raise SteersmanError(f"{side}: {error}") from error
        return cls(cfg, scales)

    def _columns(self, like: Tensor) -> Tensor:
        """The scale of every column [D]."""
        return torch.cat([like.new_full((side.width,), scale) for side, scale in zip(self.cfg.sides, self.scales)])

    def scaled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scaled = rows * self._columns(rows)
        return scaled, scaled

    def target_mean(self, parts: Sequence[ActivationStats]) -> Tensor:
        return torch.cat([stats.mean for stats in parts])

    def scaled_target(self, target: Tensor) -> Tensor:
        return target * self._columns(target)

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        assert isinstance(sae, CrosscoderSAE)
        sae.fold_side_scales(torch.tensor(self.scales))

    def record(self) -> dict[str, Any]:
        return super().record() | {"scales": list(self.scales)}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.scales = tuple(float(scale) for scale in state["scales"])


def scaled_inputs(cfg: SAEConfig, parts: Sequence[ActivationStats]) -> Inputs:
    """The form that only scales rows."""
    return (ScaledSides if cfg.sides else Inputs).of(cfg, parts)


def make_inputs(
    cfg: SAEConfig, config: TrainConfig, parts: Sequence[ActivationStats], covariance: Tensor | None = None
) -> Inputs:
    """The form that a configuration asks for, for rows whose hook points have these statistics, in their order; a
    whitening needs their `covariance` [D, D] too."""
    if config.whiten is None:
        return scaled_inputs(cfg, parts)
    if covariance is None:
        raise SteersmanError(
            "whitening needs the covariance of the rows: train with train_sae, or give make_inputs one"
        )
    unit_variance(parts[0])  # refuses rows that do not vary
    shrinkage = WHITEN_SHRINKAGE if config.whiten_shrinkage is None else config.whiten_shrinkage
    return WhitenedInputs.of_covariance(cfg, parts[0].mean, covariance, config.whiten, shrinkage)


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
