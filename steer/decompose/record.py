"""`Decomposition`: what a vector is made of, with what must be known to believe it."""

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steersman.html import card
from steersman.steer.decompose.base import DecomposeConfig
from steersman.steer.decompose.plots import plot_decompositions
from steersman.steer.decompose.terms import PathPoint


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """One vector v [D] taken apart into M signed features of an SAE.

    `v ~ sum_j coefficients[j] * d_j / |d_j| + residual`, features in the order of `curve`.
    """

    method: str
    """How."""
    config: DecomposeConfig
    """The settings."""
    features: Tensor
    """[M] int64 feature ids."""
    coefficients: Tensor
    """[M] fp64, in the units of v: the length along each feature's unit direction (for `effect`: see `units`)."""
    strengths: Tensor
    """[M] fp64: coefficients in the SAE's activation units, |d_j| taken out: what `Steerer.features` takes in mode
    `add` with raw units."""
    cosines: Tensor
    """[M] fp64: cosine of each feature's direction to v."""
    densities: Tensor | None
    """[M] fp32: fraction of tokens each feature is active on; None for an SAE without statistics."""
    labels: list[str]
    """A name for each feature; empty where none is known."""
    t: Tensor | None
    """[M] fp64: t statistic of each coefficient, for methods that average over samples."""
    units: str
    """What the coefficients measure."""
    vector: Tensor
    """[D] fp32: v."""
    reconstruction: Tensor
    """[D] fp32: what the features make of v."""
    residual: Tensor
    """[D] fp32: v less the reconstruction."""
    explained_variance: float
    """`1 - |residual|^2 / |v|^2`: below 0 when the terms are worse than nothing."""
    cosine: float
    """Cosine of the reconstruction to v: 1 says nothing by itself, as d_in arbitrary features reach it."""
    curve: Tensor
    """[M] fp64: explained variance of the first m features; its last entry is `explained_variance`."""
    null_curve: Tensor
    """[M] fp64: mean of the same over random directions of equal norm (by the same method where it reads nothing but v;
    otherwise by fitting the random directions with the same features)."""
    null_high: Tensor
    """[M] fp64: the largest over the random directions."""
    zero_overlap: float
    """Jaccard overlap of the features with those that the encoder activates for v = 0."""
    negative_energy: float
    """Fraction of the squared coefficients that is negative."""
    warnings: list[str]
    """What to beware of, in plain words."""
    path: list[PathPoint] | None
    """The regularisation path, for `lasso` and `nnls`."""
    details: dict[str, float]
    """Further figures of the method, by name."""
    hook_name: str
    """Hook point of the vector and the SAE; empty when unknown."""
    model_name: str
    """Their model; empty when unknown."""

    def __repr__(self) -> str:
        pairs = zip(self.features[:3].tolist(), self.coefficients[:3].tolist())
        first = ", ".join(f"{feature}: {coefficient:+.3g}" for feature, coefficient in pairs)
        more = ", ..." if len(self) > 3 else ""
        warned = f", {len(self.warnings)} warnings" if self.warnings else ""
        return (
            f"Decomposition({self.method}, {len(self)} features {{{first}{more}}}, explained variance "
            f"{self.explained_variance:.3f}{warned})"
        )

    def _repr_html_(self) -> str:
        columns = zip(self.features.tolist(), self.coefficients.tolist(), self.cosines.tolist(), self.labels)
        header = ["feature", "coefficient", "cosine", "what it stands for, or promotes"]
        facts = [("explained variance", self.explained_variance), ("cosine", self.cosine), ("units", self.units)]
        curve = plot_decompositions({self.method: self})
        return card(
            repr(self), facts, tables=[(header, list(columns))], text="\n".join(f"! {w}" for w in self.warnings),
            figures=[(curve, "explained variance by the number of features, beside that of random directions")],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.features)

    @property
    def norm(self) -> float:
        """|v|."""
        return float(self.vector.norm())

    def as_features(self) -> dict[int, float]:
        """The terms as `Steerer.features` takes them: {id: raw strength}."""
        return dict(zip(self.features.tolist(), self.strengths.tolist()))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON can hold it."""
        rows = []
        for i, feature in enumerate(self.features.tolist()):
            row: dict[str, Any] = {
                "feature": feature,
                "coefficient": float(self.coefficients[i]),
                "strength": float(self.strengths[i]),
                "cosine": float(self.cosines[i]),
            }
            if self.densities is not None:
                row["density"] = float(self.densities[i])
            if self.t is not None:
                row["t"] = float(self.t[i])
            rows.append(row | {"label": self.labels[i]})
        return {
            "method": self.method,
            "hook_name": self.hook_name,
            "model_name": self.model_name,
            "norm": self.norm,
            "units": self.units,
            "terms": rows,
            "explained_variance": self.explained_variance,
            "cosine": self.cosine,
            "curve": self.curve.tolist(),
            "null_curve": self.null_curve.tolist(),
            "null_high": self.null_high.tolist(),
            "zero_overlap": self.zero_overlap,
            "negative_energy": self.negative_energy,
            "warnings": self.warnings,
            "path": None if self.path is None else [vars(point) for point in self.path],
            "details": self.details,
            # files have `positions` under an older name
            "settings": {
                "read" if name == "positions" else name: value
                for name, value in vars(self.config).items()
                if value is not None
            },
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """A table for a terminal, with the measures and warnings beneath it."""
        where = f" at {self.hook_name}" if self.hook_name else ""
        lines = [f"{self.method}: {len(self)} features of a vector of norm {self.norm:.4g}{where} ({self.units})"]
        head = f"{'feature':>8} {'coefficient':>12} {'cosine':>7}"
        head += f" {'density':>8}" if self.densities is not None else ""
        head += f" {'t':>7}" if self.t is not None else ""
        lines.append(f"{head} {'explained':>9} {'random':>7}  label")
        for i, feature in enumerate(self.features.tolist()):
            line = f"{feature:>8} {float(self.coefficients[i]):>+12.4g} {float(self.cosines[i]):>+7.3f}"
            line += "" if self.densities is None else f" {100 * float(self.densities[i]):>7.3f}%"
            line += "" if self.t is None else f" {float(self.t[i]):>+7.1f}"
            line += f" {float(self.curve[i]):>9.3f} {float(self.null_curve[i]):>7.3f}  {self.labels[i]}"
            lines.append(line.rstrip())
        null = f"{float(self.null_curve[-1]):.3f}, at most {float(self.null_high[-1]):.3f}" if len(self) else "none"
        lines.append(
            f"explained variance {self.explained_variance:.3f} (random directions {null})   cosine {self.cosine:.3f}   "
            f"overlap with v = 0 {self.zero_overlap:.2f}   energy in negative coefficients {self.negative_energy:.2f}"
        )
        lines += [f"! {warning}" for warning in self.warnings]
        return "\n".join(lines)
