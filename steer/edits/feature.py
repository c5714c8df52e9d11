"""Editing features of an SAE at the steered tokens.

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

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
from steersman.lm import ForwardPass, HookPoint, LanguageModel
from steersman.sae import SAE
from steersman.steer.edits.base import Edit, PerRow, blend, common_rows, per_row
from steersman.steer.edits.vector import VectorEdit

MODES = ("add", "clamp", "floor", "scale", "project_out")
"""What an edit does with a feature's activation."""
UNITS = ("raw", "max_act", "norm_frac")
"""What a strength is in: activations, the feature's largest activation, the norm of the residual stream."""

Features = Mapping[int, float] | Sequence[Mapping[int, float]]
"""Strengths by feature id, for all rows or a list of those with one entry per row."""


def feature_rows(features: Features) -> list[dict[int, float]]:
    """The features and strengths of each row: one mapping for all rows, or a list of them, one per row."""
    rows = [features] if isinstance(features, Mapping) else list(features)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise SteersmanError("features must be {id: strength}, or a list of those with one entry per row")
    if not any(rows):
        raise SteersmanError("no feature to steer by: give {id: strength}")
    return [
        {whole_number(j, "a feature id"): number(s, f"the strength of feature {j}") for j, s in row.items()}
        for row in rows
    ]


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
            cause = (
                f"is dead (never active in {stats.n_tokens:,} tokens)"
                if sae.is_dead(feature)
                else "is active on rows of huge norm alone (attention sinks; "
                f"{100 * float(stats.density[feature]):.2g} % of {stats.n_tokens:,} tokens)"
            )
            raise SteersmanError(
                f"feature {feature} {cause}, so it has no max_act: choose another feature or use units='raw'"
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

    def __init__(self, sae: SAE, features: Features, *, mode: str, units: str = "raw", gate: PerRow = 1.0) -> None:
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
        if mode == "project_out":
            self.dual = self._dual()
        self._open_gate(per_row(gate, "gate", device))

    def _open_gate(self, gate: Tensor) -> None:
        self.gate = gate
        self.rows = common_rows(features=len(self.amount), gate=len(gate))
        self.weight = self.on * gate[:, None]  # [R, M]: 0 where a row leaves a feature alone
        self.active = (self.on.any(1) & (gate != 0)).expand(self.rows)
        self._added: VectorEdit | None = None
        if self.mode == "add" and self.sae.cfg.input_norm == "none":  # needs no encoding: a constant vector per row
            self._added = VectorEdit((self.amount * self.on) @ self.directions, 1.0, gate)

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        if not point.holds_states:
            raise SteersmanError(f"{point.name} holds no hidden states: no SAE's features can be edited there")

    def scaled(self, factor: PerRow) -> "FeatureEdit":
        edit = copy.copy(self)
        factors = per_row(factor, "factor", self.gate.device)
        common_rows(gate=len(self.gate), factor=len(factors))
        edit._open_gate(self.gate * factors)
        return edit

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
