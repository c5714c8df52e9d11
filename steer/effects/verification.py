"""The record of a verification: predicted against measured effects of one vector."""

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class FeatureEffect(NamedTuple):
    """What happened to one feature."""

    feature: int
    """Its id."""
    predicted: float
    """Effect that the map predicts: a difference of average activations."""
    measured: float
    """Effect that was measured."""
    standard_error: float
    """Of the measured effect, the unsteered average's error included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """Predicted against measured effects of one vector."""

    targets: list[FeatureEffect]
    """The target features, largest weight first; empty when none were named."""
    side_effects: list[FeatureEffect]
    """The other features that moved most, largest first."""
    predicted: Tensor
    """[L] fp32."""
    measured: Tensor
    """[L] fp32."""
    standard_error: Tensor
    """[L] fp32."""
    scale: float
    """The norm of what was added."""
    achieved: float
    """What the map's scale rule measured there; NaN where a scale was given or the rule measures nothing."""
    reached: bool
    """Whether the rule's target was reached."""
    specificity: float
    """t . y / (|t| |y|) of the measured effect; NaN without targets."""
    predicted_specificity: float
    """The same of the predicted effect."""
    correlation: float
    """Correlation of predicted and measured effect over all features."""
    slope: float
    """Least-squares slope of the measured on the predicted effect: below 1 where the vector reaches the rule's target
    at a smaller scale than the map's vectors did, or its effect saturates."""
    r2: float
    """1 - |measured - predicted|^2 / |measured - mean|^2 over all features."""
    rollouts: int
    """Texts that were measured."""

    def to_text(self) -> str:
        """The comparison as a table."""
        lines = [f"scale {self.scale:.4g}, {self.rollouts} texts" + ("" if self.reached else "; target NOT reached")]
        lines.append(
            f"predicted against measured: correlation {self.correlation:.3f}, slope {self.slope:.3f}, R2 {self.r2:.3f}"
        )
        if self.targets:
            lines.append(f"specificity: measured {self.specificity:.3f}, predicted {self.predicted_specificity:.3f}")
        lines.append(f"{'':<12} {'feature':>8} {'predicted':>10} {'measured':>10} {'+-':>8}")
        for kind, rows in (("target", self.targets), ("side effect", self.side_effects)):
            lines += [
                f"{kind:<12} {r.feature:>8} {r.predicted:>10.4f} {r.measured:>10.4f} {r.standard_error:>8.4f}"
                for r in rows
            ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything but the whole effect vectors, as one JSON object; what is not a number is null."""
        fields = (
            "scale",
            "achieved",
            "reached",
            "specificity",
            "predicted_specificity",
            "correlation",
            "slope",
            "r2",
            "rollouts",
        )
        data: dict[str, Any] = {name: getattr(self, name) for name in fields}
        data = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
        data |= {name: [row._asdict() for row in getattr(self, name)] for name in ("targets", "side_effects")}
        return json.dumps(data, indent=2)
