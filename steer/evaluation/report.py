"""The report of an evaluation: curves over the scale, chosen scales on unseen prompts; JSON, table and picture."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.figures import save_figure
from steersman.files import make_folder, write_text
from steersman.html import card
from steersman.steer.evaluation.bootstrap import Estimate, bootstrap
from steersman.steer.evaluation.config import EvaluationConfig
from steersman.steer.evaluation.forced import slopes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "word_rate", "judge", "target_rise", "specificity", "side_effects", "margin", "kl", "kl_p95", "nll", "repetition",
    "distinct_2", "heldout_loss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm at one scale."""

    scale: float
    """Multiple of the arm's vector; 0 where nothing is added."""
    values: dict[str, np.ndarray]
    """Measure -> value per prompt."""
    forced: dict[str, np.ndarray]
    """`heldout_loss` -> value per text; `margin` -> value per continuation item."""
    texts: list[str] = field(repr=False)
    """The completions, prompt by prompt."""
    activations: np.ndarray | None = field(default=None, repr=False)
    """[prompts, L] feature activations of the completions in the unsteered model."""

    def estimate(self, measure: str, seed: int = 0, half: int | None = None) -> Estimate | None:
        """A measure's mean with its interval, over all units or those of one half (0: even, 1: odd)."""
        values = self.values.get(measure, self.forced.get(measure))
        if values is None:
            return None
        return bootstrap(values if half is None else values[half::2], seed)

    def estimates(self, seed: int = 0, half: int | None = None) -> dict[str, Estimate]:
        """Every measure's mean with its interval."""
        found = {name: self.estimate(name, seed, half) for name in (*self.values, *self.forced)}
        return {name: estimate for name, estimate in found.items() if estimate is not None}


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One way of steering, over the scales."""

    name: str
    """vector, random, diffmean, prompt or unsteered."""
    points: list[Point]
    """By rising scale."""
    norm: float | None
    """Norm of its vector at scale 1; None where it is no vector."""

    def slope(self) -> np.ndarray | None:
        """Slope over the scale of every continuation item's margin; None without items or scales."""
        if len(self.points) < 2 or "margin" not in self.points[0].forced:
            return None
        return slopes([p.scale for p in self.points], np.stack([p.forced["margin"] for p in self.points]))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The scale one half of the prompts chose, and what it does on the other."""

    scale: float
    """The scale; 0 when every other one costs too much."""
    estimates: dict[str, Estimate]
    """Measures on the half that did not choose."""
    reversed_share: float | None = None
    """Fraction of continuation items whose margin falls with the scale."""
    slope: Estimate | None = None
    """Mean slope of the margin over the scale, with its interval over items."""


def choose_scale(arm: ArmReport, plain: Point, objective: str, max_nll_rise: float, seed: int = 0) -> Chosen:
    """The scale with the highest objective among those whose text costs at most `max_nll_rise` nats per token more than
    unsteered text does, on the even prompts; reported on the odd ones."""

    def mean(point: Point, measure: str) -> float:
        if measure == "scale":
            return abs(point.scale)
        found = point.estimate(measure, half=0)
        return -np.inf if found is None else found.mean

    limit = mean(plain, "nll") + max_nll_rise
    allowed = [p for p in arm.points if mean(p, "nll") <= limit] or [min(arm.points, key=lambda p: abs(p.scale))]
    best = max(allowed, key=lambda p: (mean(p, objective), -abs(p.scale)))
    slope = arm.slope()
    return Chosen(
        scale=best.scale,
        estimates=best.estimates(seed, half=1),
        reversed_share=None if slope is None else float((slope < 0).mean()),
        slope=None if slope is None else bootstrap(slope, seed),
    )


@dataclass(frozen=True, kw_only=True)
class SteeringEvaluation:
    """What a steering vector and its baselines do."""

    model_name: str
    """The model."""
    vector: dict[str, Any]
    """Provenance, hook points and norm of the vector, or what is known of another way of steering."""
    prompts: list[str]
    """What was continued."""
    arms: dict[str, ArmReport]
    """Curves over the scale, by arm."""
    chosen: dict[str, Chosen]
    """Per arm, the scale chosen on the even prompts and its measures on the odd ones."""
    missing: dict[str, str]
    """Baselines that could not be made, and why."""
    objective: str
    """The measure that chose the scales."""
    prompt_prefix: str
    """What the prompting baseline put before each prompt."""
    config: EvaluationConfig
    """The settings."""

    def __repr__(self) -> str:
        scales = ", ".join(f"{name} at scale {chosen.scale:g}" for name, chosen in self.chosen.items())
        return (
            f"SteeringEvaluation({self.model_name}, {len(self.prompts)} prompts, chosen by {self.objective}: {scales})"
        )

    def _repr_html_(self) -> str:
        return card(repr(self), text=self.to_text(), figures=[(self.plot(), "every measure over the scale")])

    def to_text(self) -> str:
        """Two tables: the chosen scales on unseen prompts with intervals, and the curves."""
        measured = {name for c in self.chosen.values() for name in c.estimates}
        columns = [name for name in COLUMNS if name in measured]
        rows = [["arm", "scale", *columns]]
        for name, chosen in self.chosen.items():
            cells = [str(chosen.estimates[c]) if c in chosen.estimates else "-" for c in columns]
            rows.append([name, f"{chosen.scale:g}", *cells])
        n = len(self.prompts) // 2
        lines = [f"scale chosen by {self.objective} on {len(self.prompts) - n} prompts, measured on {n} others (95 %)"]
        lines += _table(rows)
        for name, chosen in self.chosen.items():
            if chosen.slope is not None and chosen.reversed_share is not None:
                lines.append(
                    f"{name}: slope of the margin {chosen.slope} nats per unit of scale, "
                    f"{100 * chosen.reversed_share:.0f} % of items move the other way"
                )
        lines += [f"{name}: not measured, {why}" for name, why in self.missing.items()]
        lines += ["", "over the scale, all prompts:"]
        rows = [["arm", "scale", *columns]]
        for name, arm in self.arms.items():
            for point in arm.points:
                found = {c: point.estimate(c) for c in columns}
                rows.append([name, f"{point.scale:g}", *(f"{e.mean:.3g}" if e else "-" for e in found.values())])
        return "\n".join(lines + _table(rows))

    def to_json(self) -> dict[str, Any]:
        """Everything, values per prompt included, as JSON can hold it (NaN as null)."""
        arms = {
            name: {
                "norm": arm.norm,
                "points": [
                    {
                        "scale": p.scale,
                        "estimates": {k: asdict(e) for k, e in p.estimates(self.config.seed).items()},
                        "per_prompt": {k: _numbers(v) for k, v in p.values.items()},
                        "per_text": {k: _numbers(v) for k, v in p.forced.items()},
                        "texts": p.texts,
                    }
                    for p in arm.points
                ],
            }
            for name, arm in self.arms.items()
        }
        own = ("model_name", "vector", "prompts", "missing", "objective", "prompt_prefix")
        found: dict[str, Any] = {name: getattr(self, name) for name in own}
        return found | {
            "config": asdict(self.config),
            "chosen": {name: asdict(c) for name, c in self.chosen.items()},
            "arms": arms,
        }

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.json`, `evaluation.txt` and `curves.png` to a folder."""
        folder = Path(folder)
        make_folder(folder)
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(folder / "evaluation.json", text)
        write_text(folder / "evaluation.txt", self.to_text() + "\n")
        save_figure(self.plot(), folder / "curves.png")

    def plot(self) -> "Figure":
        """A figure of every measure over the scale, with its interval, arms in colours."""
        from matplotlib.figure import Figure

        measured = {name for arm in self.arms.values() for p in arm.points for name in (*p.values, *p.forced)}
        names = [name for name in COLUMNS if name in measured]
        across = min(3, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(4 * across, 2.8 * down), layout="constrained")
        for i, name in enumerate(names):
            axes = figure.add_subplot(down, across, i + 1)
            for colour, arm in enumerate(self.arms.values()):
                found = [(p.scale, e) for p in arm.points if (e := p.estimate(name, self.config.seed)) is not None]
                if not found:
                    continue
                if len(found) == 1:
                    axes.axhline(found[0][1].mean, color=f"C{colour}", linestyle="--", linewidth=1, label=arm.name)
                    continue
                x = [scale for scale, _ in found]
                axes.plot(x, [e.mean for _, e in found], color=f"C{colour}", marker=".", label=arm.name)
                axes.fill_between(
                    x, [e.low for _, e in found], [e.high for _, e in found], color=f"C{colour}", alpha=0.15
                )
            axes.set(title=name, xlabel="scale")
            if i == 0:
                axes.legend(fontsize=7)
        return figure


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
