"""Adding a vector: the same at every token, or one for each position from the front.

Shape letters: B rows of the batch, D width; R rows of parameters (1 for all, or one per prompt), P positions.
"""

from typing import Any, Self

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.lm.origin import check_fits
from steersman.steer.edits.base import Edit, Map, PerRow, Saved, blend, common_rows, per_row


class _Added(Edit):
    """What adds a `vector` [..., D] times `factor`, scale and gate together."""

    vector: Tensor
    factor: Tensor

    def __init__(self, vector: Tensor, scale: PerRow, gate: PerRow, /, **sizes: int) -> None:
        if not bool(torch.isfinite(vector).all()):
            raise SteersmanError("the steering vector holds NaN or infinite values")
        self.vector = vector
        scales, gates = per_row(scale, "scale", vector.device), per_row(gate, "gate", vector.device)
        self.rows = common_rows(**sizes, scale=len(scales), gate=len(gates))
        self.factor = scales * gates
        self.active = (self.factor != 0).expand(self.rows)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        if point.kind == "hook_attn_mask":
            raise SteersmanError(f"no vector can be added to {point.name}, an attention mask: use an AttentionBiasEdit")
        what = f"a vector of shape {list(self.vector.squeeze(0).shape)}"
        check_fits(lm, what=what, model_name="", hook_name=point.name, width=self.vector.shape[-1])

    def saved(self) -> Saved:
        return Saved({}, {"vector": self.vector.detach(), "factor": self.factor})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        return cls(saved.tensors["vector"], saved.tensors["factor"], 1.0)


class VectorEdit(_Added):
    """h + scale gate v: `vector` [D] or [B, D], `scale` and `gate` a number or [B].

    The product is formed once in fp32 and cast to h's dtype; with `vector.requires_grad` it is formed in every pass, so
    that gradients flow to the vector.
    """

    name = "vector"

    def __init__(self, vector: Tensor, scale: PerRow = 1.0, gate: PerRow = 1.0) -> None:
        if vector.ndim not in (1, 2) or vector.numel() == 0:
            raise SteersmanError(f"a steering vector must be [D] or [B, D], got {tuple(vector.shape)}")
        vector = vector[None] if vector.ndim == 1 else vector
        super().__init__(vector, scale, gate, vector=len(vector))
        self._ready: tuple[Any, Tensor] | None = None

    def delta(self, fwd: ForwardPass, h: Tensor) -> Tensor:
        """What is added to h: [B or 1, 1, D] in h's dtype and on its device."""
        key = (fwd.batch, None if fwd.run is None else fwd.run.rows, h.dtype, h.device)
        if self._ready is not None and self._ready[0] == key:
            return self._ready[1]
        table = (self.factor[:, None] * self.vector.float()).to(device=h.device)
        delta = self.expand(table, fwd).to(h.dtype)[:, None]
        if not self.vector.requires_grad:
            self._ready = (key, delta)
        return delta

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        return blend(h, h + self.delta(fwd, h), where)

    def as_map(self, width: int) -> Map | None:
        if self.rows > 1:
            return None
        return Map(None, (self.factor[:, None] * self.vector.detach()).cpu().double()[0])

    def scaled(self, factor: PerRow) -> "VectorEdit":
        return VectorEdit(self.vector, self.factor, factor)


class PositionEdit(_Added):
    """h_p + scale gate v_p at absolute position p < P, nothing after: `vector` [P, D], `scale` and `gate` a number or
    [B]."""

    name = "positions"

    def __init__(self, vector: Tensor, scale: PerRow = 1.0, gate: PerRow = 1.0) -> None:
        if vector.ndim != 2 or vector.numel() == 0:
            raise SteersmanError(f"a vector added position by position must be [P, D], got {tuple(vector.shape)}")
        super().__init__(vector.float(), scale, gate)
        self.used = vector.abs().sum(1) > 0  # [P]: a position whose row is zero is not steered

    def narrow(self, where: Tensor | bool, fwd: ForwardPass, h: Tensor) -> Tensor | bool:
        if isinstance(where, bool) and not where:
            return False
        position = fwd.positions.to(self.used.device)
        inside = (position >= 0) & (position < len(self.used))
        inside &= self.used[position.clamp(0, len(self.used) - 1)]
        return inside.to(fwd.device) & fwd.real if isinstance(where, bool) else inside.to(where.device) & where

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        position = fwd.positions.clamp(0, len(self.vector) - 1).to(self.vector.device)
        factor = self.expand(self.factor, fwd)[:, None, None]
        delta = (factor * self.vector[position]).to(h.dtype).to(h.device)
        return blend(h, h + delta, where)

    def scaled(self, factor: PerRow) -> "PositionEdit":
        return PositionEdit(self.vector, self.factor, factor)
