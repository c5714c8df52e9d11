"""One edit that reads a number of a state and writes along a direction by a rule: h' = h + g k(rho(h)) u.

What is read (a vector, a probe, an SAE's feature) is a `Read`, how k follows from it a `Rule`. Steering by a vector or
by features, ablation, projection, capping, clamping, thresholds and mirroring are settings of it.

`keep_norm` is the addition of the ICV family, which keeps |h|:

    h' = |h| norm(norm(h) + mean_m s_m c_m(h) v_m),   c = 1 (VTI, arXiv 2410.15778) or, with `keep_norm="opposed"`,
    c_m(h) = 1 + max(0, cos(h, -sign(s_m) v_m))   (ICV, 2311.06668; VISTA, 2502.03628; Safety Arithmetic, 2406.11801,
                                                   which subtracts: s below 0)

with v_m of unit length, so s is in units of |h|. For small s it is h + s |h| (v - (h^ . v) h^) + O(s^2): the part of v
along h does nothing.

Shape letters: B rows of the batch, S tokens of the pass, D width; R rows of parameters (1 for all, or one per prompt),
T generated steps (1 for all), M directions, n steered tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.lm.origin import check_fits
from steersman.steer.edits.base import (
    Edit,
    HookReader,
    Map,
    PerRow,
    Saved,
    blend,
    common_rows,
    packed,
    per_row,
    unpacked,
)
from steersman.steer.edits.gates import Gate, GatedEdit
from steersman.steer.edits.reads import READS, Linear, Projection, Read, ReadLike, as_read
from steersman.steer.edits.rules import Rule, rotated, rule_named
from steersman.steer.edits.vector import VectorEdit
from steersman.steer.vectors.vector import SteeringVector

KeepNorm = bool | Literal["opposed"]
TableLike = PerRow
"""A number for all, one per row [R], one per row and generated step [R, T], or also per direction [R, T, M]."""


class DirectionEdit(Edit):
    """h + g k(rho) u at every token in scope, in fp32, cast back to h's dtype.

    Args:
        read: what rho is: a vector (rho = h . v / |v|), (w, b) of a probe (its logit), or a `Read`.
        write: u, [D] or one per row [R, D], as it is; by default what raises the reading by one and leaves other
            readings alone (see `steersman.steer.edits.reads`), so that strengths are in units of the reading.
        rule: one of `RULES`. For `rotate`, `read` is where the angle is 0 and `write` the side it is turned to.
        value: the strength s: a number, [R], or [R, T] with a column for each generated step (the last column holds
            for those that follow, the first for the prompt), or [R, T, M]. Degrees for `rotate`.
        threshold: m of `mirror` and `set_if_below`, a number or [R], in units of the reading (0 is where a probe
            decides).
        keep_norm: keep |h|, for rule `add`: True, or "opposed" for a push that grows where h points the other way.
        gate: multiplies what the edit changes, a number or [R]; of `keep_norm` and `rotate` it multiplies the
            strength, so that the norm is kept at every gate.

    >>> v = torch.tensor([3.0, 4.0])
    >>> ablate = DirectionEdit(v, rule="scale", value=0.0)
    >>> capped = DirectionEdit(v, rule="cap", value=2.5)  # h . v / |v| is at most 2.5
    """

    name = "direction"
    read_at: str = ""
    """The hook point whose states are read, where that is not the edited one: the pass comes to it before."""
    _value_is = "value"  # what its strengths are called in messages

    def __init__(
        self,
        read: ReadLike,
        write: Any = None,
        *,
        rule: str = "add",
        value: TableLike = 1.0,
        threshold: PerRow = 0.0,
        keep_norm: KeepNorm = False,
        gate: PerRow = 1.0,
    ) -> None:
        self.rule = rule
        known, reading = rule_named(rule), as_read(read)
        self.given = reading  # of `rotate` what is read below is a plane
        self._check_norm(keep_norm, reading, write)
        table = _table(value, known, reading)
        limits = thresholds_of(threshold, rule)
        if rule == "rotate":
            reading, directions = _plane(reading, write)
        else:
            directions = reading.directions() if write is None else _written(write, reading)
        self._set(reading, directions, known, table, limits[:, None])
        self.keep_norm = keep_norm
        self._open_gate(per_row(gate, "gate", self.write.device))

    @staticmethod
    def _check_norm(keep_norm: KeepNorm, reading: Read, write: Any) -> None:
        if keep_norm not in (False, True, "opposed"):
            raise SteersmanError(f"keep_norm must be True, False or 'opposed', got {keep_norm!r}")
        if keep_norm and not (isinstance(reading, Projection) and write is None):
            raise SteersmanError("keep_norm adds the vectors that are read: give them alone, with rule='add'")

    def _set(self, read: Read, write: Tensor, rule: Rule, value: Tensor, threshold: Tensor) -> None:
        """`write` [1 or R, M, D], `value` [1 or R, T, 1 or M], `threshold` [1 or R, 1 or M]."""
        device = write.device
        self.read, self.write, self._rule = read, write.float(), rule
        self.value, self.threshold = value.to(device), threshold.to(device)
        idle = rule.idle(self.value, self.threshold[:, None]).all(1)
        self.on = (~idle).expand(-1, read.size)  # [1 or R, M]: which directions a row's strength can change at all
        self.keep_norm: KeepNorm = False

    def _open_gate(self, gate: Tensor) -> None:
        if self.keep_norm and self.rule != "add":
            raise SteersmanError(f"keep_norm is for rule 'add', not {self.rule!r}")
        self.gate = gate
        sizes = {"read": self.read.rows, "write": len(self.write), self._value_is: len(self.value)}
        self.rows = common_rows(**sizes, threshold=len(self.threshold), gate=len(gate))
        self.weight = self.on * gate[:, None]  # [1 or R, M]: 0 where a row leaves a direction alone
        self.active = (self.on.any(1) & (gate != 0)).expand(self.rows)
        self._added = self._constant()

    def _constant(self) -> VectorEdit | None:
        """What adds the same vector at every token of a row, where that is all there is to it."""
        varies = self.keep_norm or self.read.scales or self.value.shape[1] > 1
        if self._rule.reads or varies or self.write.requires_grad or self.value.requires_grad:
            return None
        amount = (self.value[:, 0] * self.on).expand(-1, self.read.size)
        vectors = amount @ self.write[0] if len(self.write) == 1 else (amount[..., None] * self.write).sum(1)
        return VectorEdit(vectors, 1.0, self.gate)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        if point.kind == "hook_attn_mask":
            raise SteersmanError(f"{point.name} is an attention mask and holds no states to read or write")
        self.given.check(lm, point)
        check_fits(lm, what="what is written", model_name="", hook_name=point.name, width=self.write.shape[-1])

    def scaled(self, factor: PerRow) -> "DirectionEdit":
        edit = copy.copy(self)
        factors = per_row(factor, "factor", self.gate.device)
        common_rows(gate=len(self.gate), factor=len(factors))
        edit._open_gate(self.gate * factors)
        return edit

    def as_map(self, width: int) -> Map | None:
        linear = self.read if isinstance(self.read, Linear) else None
        varies = self.rows > 1 or self.keep_norm or self.read.scales or self.value.shape[1] > 1
        if varies or not self._rule.affine or (self._rule.reads and linear is None):
            return None
        s, m, one = self.value[:, 0], self.threshold, torch.ones(1, self.read.size, device=self.write.device)
        at_0, at_1 = (self._rule.coefficient(rho, s, m) * self.weight for rho in (0 * one, one))
        write, base, slope = (part[0].detach().cpu().double() for part in (self.write, at_0, at_1 - at_0))
        if linear is None or not self._rule.reads:
            return Map(None, base @ write)
        bias = torch.zeros(()) if linear.bias is None else linear.bias[0].cpu()
        matrix = torch.eye(width, dtype=torch.float64) + write.T @ (slope[:, None] * linear.weight[0].cpu().double())
        return Map(matrix, (base + slope * bias) @ write)

    def gated(self, gates: Sequence[Gate]) -> "Edit | None":
        return _GatedStrength(self, gates) if self.keeps_norm else None

    @property
    def keeps_norm(self) -> bool:
        """Whether |h| stays as it is, at every strength."""
        return bool(self.keep_norm) or self.rule == "rotate"

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        if self._added is not None:
            return self._added.apply(h, fwd, where)
        flat = h.reshape(-1, h.shape[-1])
        if not self.read.costly or fwd.length == 1 or isinstance(where, bool):
            # Reading every token costs less than finding out which to leave.
            return blend(h, self._edited(flat, None, fwd).reshape(h.shape), where)
        chosen = where.reshape(-1).nonzero()[:, 0]
        if len(chosen) == 0:
            return h
        return torch.index_copy(flat, 0, chosen, self._edited(flat[chosen], chosen, fwd)).reshape(h.shape)

    def apply_share(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool, share: Tensor) -> Tensor:
        """`apply` with the strength of each token times `share` [B, S], for what keeps the norm."""
        flat = h.reshape(-1, h.shape[-1])
        new = self._edited(flat, None, fwd, share.reshape(-1, 1).to(h.device)).reshape(h.shape)
        return blend(h, torch.where(share[..., None] == 0, h, new), where)

    def _edited(self, x: Tensor, chosen: Tensor | None, fwd: ForwardPass, share: Tensor | None = None) -> Tensor:
        """x [n, D] after the edit, in x's dtype. `chosen` [n] are their places in the flattened pass, None for all."""
        row = step = None
        if self.rows > 1:
            place = torch.arange(len(x), device=x.device) if chosen is None else chosen
            row = place // fwd.length
        if self.value.shape[1] > 1:
            step = fwd.steps.reshape(-1).to(x.device)
            step = step if chosen is None else step[chosen]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        weight = self.per_token(self.weight, fwd, row)
        weight = weight if share is None else weight * share.to(weight.device)
        if self.keep_norm:
            return self._renormed(wide, weight, row, step, fwd).to(x.dtype)
        read = self._read_states(wide, chosen, fwd).float().to(self.write.device)
        delta = self._delta(read, weight, row, step, fwd).to(x.device)
        return (wide + delta).to(x.dtype)

    def readers(self, lm: LanguageModel, point: HookPoint) -> Mapping[str, HookReader]:
        return {lm.resolve_hook(self.read_at): self._look} if self.read_at else {}

    def _look(self, h: Tensor, fwd: ForwardPass) -> None:
        fwd.memo.setdefault(self, h)

    def _read_states(self, x: Tensor, chosen: Tensor | None, fwd: ForwardPass) -> Tensor:
        """[n, D]: what is read of the tokens whose states at the edited hook point are x."""
        if not self.read_at:
            return x
        seen = fwd.memo.get(self)
        if seen is None:
            raise SteersmanError(
                f"this edit reads {self.read_at}: open it with a Steerer, which shows it what is there"
            )
        flat = seen.reshape(-1, seen.shape[-1])
        return flat if chosen is None else flat[chosen.to(flat.device)]

    def per_token(self, table: Tensor, fwd: ForwardPass, row: Tensor | None) -> Tensor:
        """A table [R, ...] as [n, ...] (or [1, ...]), for tokens in the rows `row` [n] of the pass."""
        if len(table) == 1 or row is None:
            return table
        return self.expand(table, fwd)[row.to(table.device)]

    def _strength(self, fwd: ForwardPass, row: Tensor | None, step: Tensor | None) -> Tensor:
        """s of each token, [n or 1, 1 or M]."""
        if step is None:
            return self.per_token(self.value[:, 0], fwd, row)
        column = step.clamp(0, self.value.shape[1] - 1).to(self.value.device)
        if len(self.value) == 1 or row is None:
            return self.value[0, column]
        return self.expand(self.value, fwd)[row.to(self.value.device), column]

    def _own_rows(self, fwd: ForwardPass, row: Tensor | None) -> Tensor | None:
        """[n]: the row of parameters of each token, or None where all share one."""
        if row is None or self.rows == 1:
            return None
        index = fwd.row_index(self.rows)
        return row if index is None else index[row.to(index.device)]

    def _delta(self, x: Tensor, weight: Tensor, row: Tensor | None, step: Tensor | None, fwd: ForwardPass) -> Tensor:
        """The sum over directions of coefficient times direction, [n, D] fp32, by what is read, x."""
        s = self._strength(fwd, row, step)
        rho = self.read.values(x, self._own_rows(fwd, row)) if self._rule.reads else s
        if self.rule == "rotate":
            k = rotated(rho, s, weight)
        else:
            k = self._rule.coefficient(rho, s, self.per_token(self.threshold, fwd, row)) * weight
        return self._along(k, x, row, fwd)

    def _along(self, k: Tensor, x: Tensor, row: Tensor | None, fwd: ForwardPass) -> Tensor:
        """The sum over directions of k [n, M] times direction, [n, D]."""
        write = self.per_token(self.write, fwd, row)
        # One product for all tokens where all rows share their directions, else each token with its own row's.
        delta = k @ write[0] if len(write) == 1 else (k[..., None] * write).sum(-2)
        scale = self.read.scale(x)
        return delta if scale is None else delta * scale

    def _renormed(self, x: Tensor, weight: Tensor, row: Tensor | None, step: Tensor | None, fwd: ForwardPass) -> Tensor:
        """|h| norm(norm(h) + mean_m s_m c_m(h) v_m), [n, D]; x itself where every strength is 0."""
        assert isinstance(self.read, Projection)
        s = (self._strength(fwd, row, step) * weight).to(x.device)
        length = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        unit = x / length
        own = self._own_rows(fwd, row)
        if self.keep_norm == "opposed":
            against = -s.sign() * self.read.values(unit.float(), own)
            s = s * (1 + against.relu())
        vectors = self.read.weight.to(x.device)
        s = s.to(x.dtype).expand(-1, self.read.size)
        vectors = vectors.to(x.dtype)
        push = s @ vectors[0] if own is None or len(vectors) == 1 else (s[..., None] * vectors[own]).sum(-2)
        new = unit + push / self.read.size
        new = length * (new / new.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
        return torch.where((s != 0).any(-1, keepdim=True), new, x)

    def saved(self) -> Saved:
        read = packed({"read": self.given})
        names = ("write", "value", "threshold", "gate")
        tensors = {name: getattr(self, name).detach().contiguous() for name in names}
        return Saved({**read.settings, "rule": self.rule, "keep_norm": self.keep_norm}, {**read.tensors, **tensors})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        edit = cls.__new__(cls)
        edit.rule, edit.given = saved.settings["rule"], unpacked(saved, "read", READS)
        write, value, threshold, gate = (saved.tensors[name] for name in ("write", "value", "threshold", "gate"))
        read = Linear(write, None, edit.given.origin) if edit.rule == "rotate" else edit.given
        edit._set(read, write, rule_named(edit.rule), value, threshold)
        edit.keep_norm = saved.settings["keep_norm"]
        edit._open_gate(gate)
        return edit


class _GatedStrength(GatedEdit):
    """An edit that keeps |h|, its strength times the product of the gates."""

    name = "gated_strength"
    edit: DirectionEdit

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        value = fwd.memo.pop(self, None)
        value = self.value(h, fwd) if value is None else value
        return self.edit.apply_share(h, fwd, where, value.expand(fwd.batch, fwd.length))


def thresholds_of(threshold: PerRow, rule: str) -> Tensor:
    """Thresholds [1 or R]; -inf is allowed. Raises SteersmanError for a rule that has none."""
    below = torch.as_tensor(threshold, dtype=torch.float32) == -torch.inf if not isinstance(threshold, str) else False
    if isinstance(below, Tensor) and bool(below.any()):
        given = torch.as_tensor(threshold, dtype=torch.float32)
        limits = per_row(given.masked_fill(below, 0.0), "threshold", given.device).masked_fill(below, -torch.inf)
    else:
        limits = per_row(threshold, "threshold", torch.device("cpu"))
    if not rule_named(rule).thresholds and bool((limits != 0).any()):
        raise SteersmanError(f"{rule!r} has no threshold: mirror and set_if_below have")
    return limits


def _table(value: Any, rule: Rule, read: Read) -> Tensor:
    """Strengths as [1 or R, T, 1 or M]. Raises SteersmanError for another shape, and for what is not finite where that
    has no meaning."""
    try:
        table = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SteersmanError(f"value must be a number, [R], [R, T] or [R, T, M], got {value!r}") from error
    shape = tuple(table.shape)
    table = table.reshape(*shape, *[1] * (3 - table.ndim)) if 0 < table.ndim <= 3 else table
    table = table.reshape(1, 1, 1) if not shape else table
    if table.ndim != 3 or table.numel() == 0 or table.shape[2] not in (1, read.size):
        raise SteersmanError(f"value must be a number, [R], [R, T] or [R, T, {read.size}], got {shape}")
    if not bool((torch.isfinite(table) | (table == rule.limit)).all()):
        raise SteersmanError(f"value must be finite, got {table.flatten().tolist()[:8]}")
    return table


def _written(write: Any, read: Read) -> Tensor:
    """What is written, as [1 or R, M, D]."""
    u = torch.as_tensor(write.vector if isinstance(write, SteeringVector) else write).float()
    u = u[None, None] if u.ndim == 1 else u[:, None] if u.ndim == 2 else u
    if u.ndim != 3 or u.shape[1] != read.size:
        raise SteersmanError(
            f"write must be [D], [R, D] or [R, {read.size}, D], a direction for each reading; got {tuple(u.shape)}"
        )
    if not bool(torch.isfinite(u).all()):
        raise SteersmanError("what is written holds NaN or infinite values")
    return u


def _plane(read: Read, write: Any) -> tuple[Linear, Tensor]:
    """The plane of a rotation: a reading of two numbers, and the orthonormal pair [1 or R, 2, D] it reads along."""
    if not isinstance(read, Projection) or write is None:
        raise SteersmanError("rule 'rotate' turns from one vector towards another: give both, as read= and write=")
    if isinstance(write, SteeringVector):
        write = write.vector
    first, second = read.weight, Projection(write).weight
    if first.shape[1] != 1 or second.shape[1] != 1 or first.shape[2] != second.shape[2]:
        raise SteersmanError("rule 'rotate' needs two vectors of one width, read= and write=")
    rest = second - (second * first).sum(-1, keepdim=True) * first
    length = rest.norm(dim=-1, keepdim=True)
    if not bool((length > 1e-4).all()):
        raise SteersmanError("rule 'rotate' needs two vectors that span a plane, and these are parallel")
    rest = rest / length
    rows = common_rows(read=len(first), write=len(rest))
    pair = torch.cat([first.expand(rows, -1, -1), rest.expand(rows, -1, -1)], dim=1)
    return Linear(pair, None, read.origin), pair
