"""Crosscoders (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"): one sparse code
for the activations of several hook points, of one model or of several models on the same tokens.

With x_m the activation at hook point m, each with an encoder and a decoder of its own, and one code f for all:

    f = BatchTopK(sum_m x_m W_enc,m + b_enc),    x_hat_m = f W_dec,m + b_dec,m

The hook points stand side by side, so the encoders are blocks of rows of `W_enc`, the decoders blocks of columns of
`W_dec`, and the squared error over the row is the sum over the hook points. What a feature is to a hook point is the
length of its decoder row there: of two models, a feature that one of them lacks has a row of length 0 in it.

The form is the BatchTopK one of Minder et al. (arXiv 2504.02922), which does not shrink decoders as the L1 penalty of
the first crosscoders does: the N*K largest of `f_j s_j` in a batch are kept, and at inference those above one
threshold. The decoder row of all hook points together is a unit vector, as in every SAE that is trained here. The
option `selection` says what s_j is: with "joint" the length of that row, which is 1, so that what is kept is what
rebuilds most; with "sum", as in the paper, the sum of the lengths at the hook points, between 1 (at one of them) and
the root of their number (equally at all). On planted dictionaries (`scripts/bench/crosscoder.py`) the two tell shared
from exclusive features alike, as do decoder rows of free length; with half as many active features as the data have
"joint" rebuilds better and tells them apart better, as the sum favours shared features.

In training the activations of every hook point have unit variance, so that none rules the others by its scale; decoder
lengths are in these units (`decoder_norms`). The scales are folded into the weights at the end.

Shape letters: N tokens, L latents, D width of all hook points together, M hook points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import choose
from steersman.sae.architectures.batch_topk import BatchTopKSAE
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig

_TINY = torch.finfo(torch.float32).tiny
MEDIAN_NORMS = "median_norms"
"""Entry of the metadata: the median norm of the activations at each hook point, as `FeatureStats.median_norm`."""
SIDE_FVUS = "heldout_fvu_of_sides"
"""Entry of the metadata: the FVU at each hook point over the rows held out of training."""


class CrosscoderSAE(BatchTopKSAE):
    """An SAE of hook points side by side, which `cfg.sides` names: A is the first, B the second.

    >>> from steersman.sae import Side
    >>> sides = (Side(hook_name="blocks.0.hook_mlp_out", width=4), Side(hook_name="blocks.1.hook_mlp_out", width=6))
    >>> sae = SAE(SAEConfig(d_in=10, d_sae=32, k=4, architecture="crosscoder", sides=sides))
    >>> sae.decoder_norms().shape, sae.decoder_cosines().shape, sae.at("B").W_dec.shape
    (torch.Size([32, 2]), torch.Size([32, 2, 2]), torch.Size([32, 6]))
    """

    name = "crosscoder"
    side_by_side = True
    defaults: ClassVar[Mapping[str, Any]] = {"selection": "joint"}
    latent_dims: ClassVar[Mapping[str, int | None]] = {
        **BatchTopKSAE.latent_dims,
        "threshold": None,
        "side_scale": None,
    }
    side_scale: Tensor

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        self.register_buffer("side_scale", torch.ones(len(cfg.sides)))
        """[M]: what the activations of each hook point are multiplied by to have unit variance; 1 until training, which
        sees such activations, has folded it in."""

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        super().check(cfg)
        if len(cfg.sides) < 2:
            raise SteersmanError(
                f"architecture {cfg.architecture!r} reads two hook points or more, side by side: give two stores of "
                "the same tokens (--store twice, SideBySide) or several hook points (--hook twice, HookView)"
            )
        if sum(side.width for side in cfg.sides) != cfg.d_in:
            widths = " + ".join(str(side.width) for side in cfg.sides)
            raise SteersmanError(f"d_in = {cfg.d_in} is not the width of the hook points side by side, {widths}")
        selection = {**cls.defaults, **cfg.options}["selection"]
        if selection not in ("joint", "sum"):
            raise SteersmanError(f"option selection of a crosscoder is joint or sum, got {selection!r}")
        if cfg.transcoder or cfg.input_norm != "none" or cfg.reshape_heads:
            raise SteersmanError(
                "a crosscoder writes the activations that it reads, as they are: it is no transcoder, and has no "
                "input_norm and no reshape_heads"
            )

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where the columns of each hook point begin, and the end of the last."""
        return tuple(accumulate((side.width for side in self.cfg.sides), initial=0))

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The parts of rows [..., D] (activations, reconstructions, decoder rows), [..., D_m] of each hook point."""
        return rows.split([side.width for side in self.cfg.sides], dim=-1)

    def decoder_norms(self) -> Tensor:
        """[L, M] fp32: the length of every feature's decoder row at each hook point, for activations of unit variance
        there, so that hook points of different scale compare."""
        norms = [part.detach().float().norm(dim=1) for part in self.split(self.W_dec)]
        return torch.stack(norms, dim=1) * self.side_scale

    def relative_norms(self) -> Tensor:
        """[L, M]: `decoder_norms` as a share of the feature's largest: 1 where it writes most, 0 where it does not (and
        everywhere, of a feature that writes nowhere)."""
        norms = self.decoder_norms()
        return norms / norms.amax(dim=1, keepdim=True).clamp_min(_TINY)

    def decoder_cosines(self) -> Tensor:
        """[L, M, M]: the cosines of a feature's decoder rows at each two hook points. NaN where their widths differ or
        one of the rows is 0."""
        rows = [part.detach().float() for part in self.split(self.W_dec)]
        found = torch.full((self.cfg.d_sae, len(rows), len(rows)), float("nan"), device=self.device)
        for a, one in enumerate(rows):
            for b, other in enumerate(rows):
                if one.shape == other.shape:
                    found[:, a, b] = (one * other).sum(dim=1) / (one.norm(dim=1) * other.norm(dim=1))
        return found

    def _weight(self) -> Tensor | None:
        """[L]: what activations are multiplied by where they compete; None where that is 1."""
        return self.decoder_norms().sum(dim=1) if self.options["selection"] == "sum" else None

    def _proposed(self, x: Tensor, rows: Tensor, k: int, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weight = self._weight()
        if weight is None:
            return super()._proposed(x, rows, k, bias)
        scaled = rows * weight.to(rows.dtype)[:, None]  # a latent's row and bias times s_j: its activation times s_j
        return choose(x.device).batch_topk_encode(x, scaled, self.b_enc * weight, k, bias)

    def _activations(self, values: Tensor, indices: Tensor) -> Tensor:
        weight = self._weight()
        return values if weight is None else values / weight[indices.long()].clamp_min(_TINY)

    def _thresholds(self) -> Tensor:
        weight = self._weight()
        return self.threshold if weight is None else self.threshold / weight.clamp_min(_TINY)

    def weights(self) -> dict[str, Tensor]:
        return SAE.weights(self)

    @torch.no_grad()
    def fold_side_scales(self, scales: Tensor) -> None:
        """Turn a crosscoder of inputs `scales[m] * x_m` into the same one of inputs x: the same code, of the same
        activations, and what it decodes to in the units of x."""
        columns = torch.repeat_interleave(scales.float(), torch.tensor([side.width for side in self.cfg.sides]))
        columns = columns.to(self.device)
        self.W_enc.mul_(columns[:, None])
        self.W_dec.div_(columns)
        self.b_dec.div_(columns)
        self.side_scale.mul_(scales.to(self.side_scale))

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        self.fold_side_scales(torch.full((len(self.cfg.sides),), scale))

    # One of the hook points

    def at(self, side: int | str) -> SAE:
        """What it writes at one of its hook points, as an SAE whose decoder rows are those of that hook point, to steer
        along them (`SteeringVector.of_feature`, `Steerer.features` in mode "add"). It cannot encode: a code needs the
        activations at all hook points.

        `side` is its letter, its number from 0, or its hook point or model where no other side has that. Shares no
        memory with the crosscoder.
        """
        number = self.cfg.side_number(side)
        one = self.cfg.sides[number]
        cfg = SAEConfig(
            d_in=one.width,
            d_sae=self.cfg.d_sae,
            architecture=CrosscoderSideSAE.name,
            hook_name=one.hook_name,
            model_name=one.model_name,
            metadata=dict(self.cfg.metadata),
        )
        part = SAE(cfg).to(self.device)
        with torch.no_grad():
            part.W_dec.copy_(self.split(self.W_dec)[number])
            part.W_enc.zero_()
            part.b_dec.copy_(self.split(self.b_dec)[number])
        part.labels = self.labels
        if self.feature_stats is not None and MEDIAN_NORMS in self.cfg.metadata:
            norms: Sequence[float] = self.cfg.metadata.get(MEDIAN_NORMS) or [self.feature_stats.median_norm] * (
                number + 1
            )
            part.feature_stats = replace(self.feature_stats, median_norm=norms[number])
        return part


class CrosscoderSideSAE(SAE):
    """The decoder of a crosscoder at one hook point; see `CrosscoderSAE.at`."""

    name = "crosscoder_side"

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise SteersmanError(
            f"this is a crosscoder's decoder at {self.cfg.hook_name or 'one hook point'}, which can only add features: "
            "their activations need all hook points of the crosscoder"
        )
