"""Editing features of an SAE at the steered tokens: `DirectionEdit` reading features, with strengths by feature id.

With f_j the SAE's encoder and d_j row j of its decoder, fp32 throughout:

| mode | formula |
|---|---|
| `add` | h + s d_j |
| `clamp` | h + (c - f_j(h)) d_j |
| `floor` | h + relu(c - f_j(h)) d_j |
| `cap` | h - relu(f_j(h) - c) d_j |
| `scale` | h + (r - 1) f_j(h) d_j; r = 0 ablates |
| `positive_clamp` | h + (c - relu(f_j(h))) d_j: `clamp`, but for an SAE whose activations have a sign |
| `mirror` | h + 2 s (m - f_j(h)) d_j where f_j(h) < m |
| `set_if_below` | h + (c - f_j(h)) d_j where f_j(h) < m |
| `project_out` | h - s (h . d_j) d_j / |d_j|^2; s = 1 removes the direction |

Of a transcoder h is what stands where it writes, and f_j is of what the same pass had where it reads.

None decodes the whole code, so each keeps the error term: what the SAE's reconstruction, or the transcoder's
prediction, leaves over. For an SAE that normalises its input, d_j stands for
the decoder row times the token's scale, which is what a unit of activation is worth there (not in `project_out`).
Several features are edited at once, all from the same h. For `project_out` the coefficients are then
those of the least-squares fit of h on the chosen directions, so that s = 1 removes their whole span even where they
overlap.

Shape letters: B rows of the batch, S tokens of the pass, D width; R rows of parameters (1 for all, or one per
prompt), M features named in any row, n steered tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from steersman.doors import number, whole_number
from steersman.errors import SteersmanError
from steersman.lm import HookPoint, LanguageModel
from steersman.lm.origin import written_at
from steersman.sae import SAE
from steersman.steer.edits.base import PerRow, Saved, per_row, unpacked
from steersman.steer.edits.direction import DirectionEdit, thresholds_of
from steersman.steer.edits.reads import READS, Feature, Linear, Read
from steersman.steer.edits.rules import rule_named

MODES = (
    "add", "clamp", "floor", "scale", "project_out", "cap", "positive_clamp", "mirror", "set_if_below",
)  # fmt: skip
"""What an edit does with a feature's activation: the rules of `DirectionEdit`, of which `set` is `clamp` here."""
UNITS = ("raw", "max_act", "norm_frac")
"""What a strength is in: activations, the feature's largest activation, the norm of the residual stream."""
_RULE = {"clamp": "set"}

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
    if sae.cfg.input_norm != "none" and not sae.cfg.transcoder:
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


class FeatureEdit(DirectionEdit):
    """Edits features of an SAE in one of the modes; ids and strengths may differ per row.

    `ids` [M] are the features named in any row; `amount` [R, M] their strengths in raw units; `asked` [R, M] whether
    the row names the feature, and `on` [R, M] whether its strength there changes anything. `threshold`, a number or
    [R], is m of `mirror` and `set_if_below`, in the same units as a strength (that of `mirror` is a plain factor).
    """

    name = "feature"
    _value_is = "features"

    def __init__(
        self,
        sae: SAE,
        features: Features,
        *,
        mode: str,
        units: str = "raw",
        gate: PerRow = 1.0,
        threshold: PerRow = 0.0,
    ) -> None:
        if mode not in MODES:
            raise SteersmanError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
        self.mode, self.rule = mode, _RULE.get(mode, mode)
        given = feature_rows(features)
        named = sorted({j for row in given for j in row})
        read = Feature(sae, named)
        rule = rule_named(self.rule)
        unit = torch.tensor([strength_unit(sae, j, mode, units) for j in named])
        column = {j: m for m, j in enumerate(named)}
        amount = torch.zeros(len(given), len(named), dtype=torch.float64)
        asked = torch.zeros(len(given), len(named), dtype=torch.bool)
        for r, row in enumerate(given):
            for j, strength in row.items():
                amount[r, column[j]] = strength * (1.0 if rule.plain else float(unit[column[j]]))
                asked[r, column[j]] = True
        amount = amount.float()  # what fp32 cannot hold is infinite, and refused with the rest
        if not bool((torch.isfinite(amount) | (amount == rule.limit)).all()):
            raise SteersmanError("feature strengths must be finite numbers")
        device = sae.W_dec.device
        limits = thresholds_of(threshold, self.rule)[:, None] * unit
        self._build(read, amount.to(device), asked.to(device), limits, per_row(gate, "gate", device))

    def _build(self, read: Feature, amount: Tensor, asked: Tensor, limits: Tensor, gate: Tensor) -> None:
        self.given: Read = read
        self.sae, self.ids, self.amount, self.asked = read.sae, read.ids, amount, asked
        directions = self.sae.W_dec[self.ids].detach().float()[None]
        reads: Read = read
        if self.mode == "project_out":
            reads = Linear(_dual(directions[0], asked & (amount != 0)))
        self._set(reads, directions, rule_named(self.rule), amount[:, None], limits)
        if self.sae.cfg.transcoder and reads is read and self._rule.reads:
            self.read_at = self.sae.cfg.hook_name
        self.on = asked & self.on
        self._open_gate(gate)

    def saved(self) -> Saved:
        settings, tensors = super().saved()
        return Saved({**settings, "mode": self.mode}, {**tensors, "asked": self.asked})

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        edit, tensors = cls.__new__(cls), saved.tensors
        edit.mode, edit.rule = saved.settings["mode"], saved.settings["rule"]
        read = unpacked(saved, "read", READS)
        edit._build(read, tensors["value"][:, 0], tensors["asked"], tensors["threshold"], tensors["gate"])
        return edit

    def check(self, lm: LanguageModel, point: HookPoint) -> None:
        if not point.holds_states:
            raise SteersmanError(f"{point.name} holds no hidden states: no SAE's features can be edited there")
        if not self.sae.cfg.transcoder:
            super().check(lm, point)
        else:
            written_at(lm, self.sae, point.name)


def _dual(directions: Tensor, on: Tensor) -> Tensor:
    """[R, M, D]: rows p_m with p_m . d_k = (m == k) within what a row names, 0 for the rest. d / |d|^2 for one."""
    chosen = directions.double() * on[..., None]
    return torch.linalg.pinv(chosen).mT.float() * on[..., None]
