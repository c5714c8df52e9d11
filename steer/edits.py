"""The edits: what happens to a hidden state h at the steered tokens.

With f_j the SAE's encoder and d_j row j of its decoder, fp32 throughout:

| mode | formula |
|---|---|
| `add` | h + s d_j |
| `clamp` | h + (c - f_j(h)) d_j |
| `floor` | h + relu(c - f_j(h)) d_j |
| `scale` | h + (r - 1) f_j(h) d_j; r = 0 ablates |
| `project_out` | h - s (h . d_j) d_j / |d_j|^2; s = 1 removes the direction |

None decodes the whole code, so each keeps the SAE's error term. For an SAE that normalises its input, d_j stands for
the decoder row times the token's scale, which is what a unit of activation is worth there (not in `project_out`).
Several features are edited at once, all from the same h. For `project_out` the coefficients are then
those of the least-squares fit of h on the chosen directions, so that s = 1 removes their whole span even where they
overlap.

Shape letters: B rows of the batch, S tokens of the pass, D width; R rows of parameters (1 for all, or one per
prompt), M features named in any row, n steered tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import ForwardPass
from steersman.sae import SAE

MODES = ("add", "clamp", "floor", "scale", "project_out")
UNITS = ("raw", "max_act", "norm_frac")


class Edit:
    """Something that turns h into h'. `rows` is R; `active` [R] says which rows it can change at all."""

    rows: int
    active: Tensor

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        """h' [B, S, D], equal to h outside `where` ([B, S] bool, or True for every token)."""
        raise NotImplementedError  # each edit defines it

    def narrow(self, where: Tensor | bool, fwd: ForwardPass) -> Tensor | bool:
        """Of the tokens in scope, those this edit can change."""
        return where

    def expand(self, table: Tensor, fwd: ForwardPass) -> Tensor:
        """A table [R, ...] as [B, ...], or [1, ...] when one row serves all."""
        if self.rows == 1:
            return table
        index = fwd.row_index(self.rows)
        return table if index is None else table[index]


def per_row(value: Any, what: str, device: torch.device) -> Tensor:
    """A number or one per row as a tensor [1] or [R] of fp32. Raises SteersmanError unless finite."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=device)
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if tensor.ndim != 1 or tensor.numel() == 0:
        raise SteersmanError(f"{what} must be a number or one number per row, got shape {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise SteersmanError(f"{what} must be finite, got {tensor.tolist()}")
    return tensor


def common_rows(**sizes: int) -> int:
    """The number of rows that all parameters share; those of one row serve every row."""
    rows = max(sizes.values())
    if any(n not in (1, rows) for n in sizes.values()):
        raise SteersmanError("rows disagree: " + ", ".join(f"{k} has {n}" for k, n in sizes.items()))
    return rows


def blend(h: Tensor, new: Tensor, where: Tensor | bool) -> Tensor:
    """`new` where steered, and exactly h elsewhere."""
    return new if isinstance(where, bool) else torch.where(where[..., None], new, h)


class VectorEdit(Edit):
    """h + scale gate v: `vector` [D] or [B, D], `scale` and `gate` a number or [B].

    The product is formed once in fp32 and cast to h's dtype; with `vector.requires_grad` it is formed in every pass, so
    that gradients flow to the vector.
    """

    def __init__(self, vector: Tensor, scale: Any = 1.0, gate: Any = 1.0) -> None:
        device = vector.device
        if vector.ndim not in (1, 2) or vector.numel() == 0:
            raise SteersmanError(f"a steering vector must be [D] or [B, D], got {tuple(vector.shape)}")
        if not bool(torch.isfinite(vector).all()):
            raise SteersmanError("the steering vector holds NaN or infinite values")
        self.vector = vector[None] if vector.ndim == 1 else vector
        scales, gates = per_row(scale, "scale", device), per_row(gate, "gate", device)
        self.rows = common_rows(vector=len(self.vector), scale=len(scales), gate=len(gates))
        self.factor = scales * gates
        self.active = (self.factor != 0).expand(self.rows)
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


class PositionEdit(Edit):
    """h_p + scale gate v_p at absolute position p < P, nothing after: `vector` [P, D], `scale` and `gate` a number or
    [B]."""

    def __init__(self, vector: Tensor, scale: Any = 1.0, gate: Any = 1.0) -> None:
        if vector.ndim != 2 or vector.numel() == 0:
            raise SteersmanError(f"a vector added position by position must be [P, D], got {tuple(vector.shape)}")
        if not bool(torch.isfinite(vector).all()):
            raise SteersmanError("the steering vector holds NaN or infinite values")
        self.vector = vector.float()
        scales, gates = per_row(scale, "scale", vector.device), per_row(gate, "gate", vector.device)
        self.rows = common_rows(scale=len(scales), gate=len(gates))
        self.factor = scales * gates
        self.active = (self.factor != 0).expand(self.rows)
        self.used = vector.abs().sum(1) > 0  # [P]: a position whose row is zero is not steered

    def narrow(self, where: Tensor | bool, fwd: ForwardPass) -> Tensor | bool:
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


def feature_rows(features: Mapping[int, float] | Sequence[Mapping[int, float]]) -> list[dict[int, float]]:
    """The features and strengths of each row: one mapping for all rows, or a list of them, one per row."""
    rows = [features] if isinstance(features, Mapping) else list(features)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise SteersmanError("features must be {id: strength}, or a list of those with one entry per row")
    if not any(rows):
        raise SteersmanError("no feature to steer by: give {id: strength}")
    return [{int(j): float(s) for j, s in row.items()} for row in rows]


def strength_unit(sae: SAE, feature: int, mode: str, units: str) -> float:
    """What one unit of strength is for a feature, in raw activation units. Raises SteersmanError where it has none."""
    if units not in UNITS:
        raise SteersmanError(f"unknown units {units!r}: use one of {', '.join(UNITS)}")
    if units == "raw":
        return 1.0
    if mode in ("scale", "project_out"):
        raise SteersmanError(f"mode {mode!r} takes a plain factor: use units='raw', not {units!r}")
    stats = sae.feature_stats
    if stats is None:
        raise SteersmanError(
            f"units={units!r} need the SAE's feature statistics, and this SAE has none: run `steersman features` on it "
            "with its activations, or use units='raw'"
        )
    if units == "max_act":
        largest = float(stats.max_act[feature])
        if not largest > 0:
            raise SteersmanError(
                f"feature {feature} is dead (never active in {stats.n_tokens} tokens), so it has no max_act: "
                "choose another feature or use units='raw'"
            )
        return largest
    if sae.cfg.input_norm != "none":
        raise SteersmanError(
            "units='norm_frac' need directions of one length, and this SAE scales them per token "
            f"({sae.cfg.input_norm}): use units='raw' or 'max_act'"
        )
    median = getattr(stats, "median_norm", None)
    if not median or not median > 0:
        raise SteersmanError(
            "units='norm_frac' need the median norm of the SAE's activations, which its statistics do not hold: run "
            "`steersman features` on it with its activations, or use units='raw'"
        )
    return float(median) / float(sae.W_dec[feature].detach().float().norm())


class FeatureEdit(Edit):
    """Edits features of an SAE in one of the five modes; ids and strengths may differ per row.

    `ids` [M] are the features named in any row; `amount` [R, M] their strengths in raw units; `asked` [R, M] whether
    the row names the feature, and `on` [R, M] whether its strength there changes anything.
    """

    def __init__(self, sae: SAE, features: Any, *, mode: str, units: str = "raw", gate: Any = 1.0) -> None:
        if mode not in MODES:
            raise SteersmanError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
        self.sae, self.mode = sae, mode
        given = feature_rows(features)
        named = sorted({j for row in given for j in row})
        for j in named:
            sae.check_feature(j)
        column = {j: m for m, j in enumerate(named)}
        amount = torch.zeros(len(given), len(named))
        asked = torch.zeros(len(given), len(named), dtype=torch.bool)
        for r, row in enumerate(given):
            for j, strength in row.items():
                amount[r, column[j]] = strength * strength_unit(sae, j, mode, units)
                asked[r, column[j]] = True
        if not bool(torch.isfinite(amount).all()):
            raise SteersmanError("feature strengths must be finite numbers")
        device = sae.W_dec.device
        self.ids = torch.tensor(named, device=device)
        self.amount = amount.to(device)
        neutral = {"add": 0.0, "scale": 1.0, "project_out": 0.0}.get(mode)
        self.asked = asked.to(device)
        self.on = (asked if neutral is None else asked & (amount != neutral)).to(device)
        self.directions = sae.W_dec[self.ids].detach().float()  # [M, D]
        self.gate = per_row(gate, "gate", device)
        self.rows = common_rows(features=len(given), gate=len(self.gate))
        self.weight = self.on * self.gate[:, None]  # [R, M]: 0 where a row leaves a feature alone
        self.active = (self.on.any(1) & (self.gate != 0)).expand(self.rows)
        self._added: VectorEdit | None = None
        if mode == "add" and sae.cfg.input_norm == "none":  # needs no encoding: a constant vector per row
            self._added = VectorEdit((self.amount * self.on) @ self.directions, 1.0, self.gate)
        if mode == "project_out":
            self.dual = self._dual()

    def _dual(self) -> Tensor:
        """[R, M, D]: rows p_m with p_m . d_k = (m == k) within what a row names, 0 for the rest. d / |d|^2 for one."""
        chosen = self.directions.double() * self.on[..., None]
        return torch.linalg.pinv(chosen).mT.float() * self.on[..., None]

    def apply(self, h: Tensor, fwd: ForwardPass, where: Tensor | bool) -> Tensor:
        if self._added is not None:
            return self._added.apply(h, fwd, where)
        flat = h.reshape(-1, h.shape[-1])
        if fwd.length == 1 or isinstance(where, bool):
            # A decoding step: encoding every row costs less than finding out which to leave.
            return blend(h, self._edited(flat, None, fwd).reshape(h.shape), where)
        chosen = where.reshape(-1).nonzero()[:, 0]
        if len(chosen) == 0:
            return h
        return torch.index_copy(flat, 0, chosen, self._edited(flat[chosen], chosen, fwd)).reshape(h.shape)

    def _edited(self, x: Tensor, chosen: Tensor | None, fwd: ForwardPass) -> Tensor:
        """x [n, D] after the edit, in x's dtype. `chosen` [n] are their places in the flattened pass, None for all."""
        row = None
        if self.rows > 1:
            place = torch.arange(len(x), device=x.device) if chosen is None else chosen
            row = place // fwd.length
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        delta = self._delta(wide.float().to(self.ids.device), row, fwd).to(x.device)
        return (wide + delta).to(x.dtype)

    def per_token(self, table: Tensor, fwd: ForwardPass, row: Tensor | None) -> Tensor:
        """A table [R, ...] as [n, ...] (or [1, ...]), for tokens in the rows `row` [n] of the pass."""
        if len(table) == 1 or row is None:
            return table
        return self.expand(table, fwd)[row.to(table.device)]

    def _delta(self, x: Tensor, row: Tensor | None, fwd: ForwardPass) -> Tensor:
        """The sum over features of coefficient times direction, [n, D] fp32."""
        amount, weight = self.per_token(self.amount, fwd, row), self.per_token(self.weight, fwd, row)
        if self.mode == "project_out":
            dual = self.per_token(self.dual, fwd, row)
            # One product for all tokens where all rows share their features, else each token with its own row's.
            inner = x @ dual[0].T if len(dual) == 1 else (x[:, None] * dual).sum(-1)
            coefficient = -amount * inner
            return (coefficient * weight) @ self.directions
        if self.mode == "add":
            coefficient = amount
        else:
            f = self.sae.encode_features(x, self.ids)
            if self.mode == "scale":
                coefficient = (amount - 1) * f
            else:
                coefficient = amount - f
                if self.mode == "floor":
                    coefficient = coefficient.relu()
        delta = (coefficient * weight) @ self.directions
        scale = self.sae.token_scale(x)
        return delta if scale is None else delta * scale
