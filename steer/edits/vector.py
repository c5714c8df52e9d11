"""Adding a vector: the same at every token, one for each position from the front, or one for each generated step.

Shape letters: B rows of the batch, D width; R rows of parameters (1 for all, or one per prompt), P positions or steps.
"""

from typing import Any, ClassVar, Self

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


class _TableEdit(_Added):
    """h + scale gate v_p where row p of the table `vector` [P, D] belongs to the token, h elsewhere; `scale` and `gate`
    a number or [B]."""

    def __init__(self, vector: Tensor, scale: PerRow = 1.0, gate: PerRow = 1.0) -> None:
        if vector.ndim != 2 or vector.numel() == 0:
            raise SteersmanError(f"a vector added {self.each} by {self.each} must be [P, D], got {tuple(vector.shape)}")
        super().__init__(vector.float(), scale, gate)
        self.used = vector.abs().sum(1) > 0  # [P]: where a row is zero nothing is steered

    each: ClassVar[str]
    """What the rows are for."""

    def place(self, fwd: ForwardPass) -> Tensor:
        """[B, S] int64: the row of the table that each token has, outside 0..P-1 where none."""
        raise NotImplementedError

    def narrow(self, where: Tensor | bool, fwd: ForwardPass, h: Tensor) -> Tensor | bool:
        if isinstance(where, bool) and not where:
            return False
        place = self.place(fwd).to(self.used.device)
        inside = (place >= 0) & (place < len(self.used))
        inside &= self.used[place.clamp(0, len(self.used) - 1)]
        return inside.to(fwd.device) & fwd.real if isinstance(where, bool) else inside.to(where.device) & where

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        place = self.place(fwd).clamp(0, len(self.vector) - 1).to(self.vector.device)
        factor = self.expand(self.factor, fwd)[:, None, None]
        delta = (factor * self.vector[place]).to(h.dtype).to(h.device)
        return blend(h, h + delta, where)

    def scaled(self, factor: PerRow) -> Self:
        return type(self)(self.vector, self.factor, factor)


class PositionEdit(_TableEdit):
    """h_p + scale gate v_p at absolute position p < P, nothing after: `vector` [P, D], `scale` and `gate` a number or
    [B]."""

    name = "positions"
    each = "position"

    def place(self, fwd: ForwardPass) -> Tensor:
        return fwd.positions


class StepEdit(_TableEdit):
    """h + scale gate v_i at generated step i < P: step 0 is the last token of the prompt, whose output chooses the
    first generated token, step i the i-th generated token; nothing before and nothing after. `vector` [P, D], `scale`
    and `gate` a number or [B]. Outside `generate` the prompt's end must be declared (`lm.prompt_length`)."""

    name = "steps"
    each = "step"

    def place(self, fwd: ForwardPass) -> Tensor:
        return fwd.steps


TABLES: dict[str, type[_TableEdit]] = {"position": PositionEdit, "step": StepEdit}
"""The edit of a vector with a row for each of these: see `SteeringVector.per`."""
