"""The table of all features: its columns, its data as a script that opens from disk, and its picture."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from steersman.sae.feature_labels import FeatureLabels
from steersman.train.reports.detailed import DetailedReport
from steersman.visible import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOKENS = 5


class TableColumn(NamedTuple):
    """One column of the table, which can be sorted by it."""

    key: str
    name: str
    help: str
    kind: str
    """id, text, tokens, share or number."""


class ScoreColumn(NamedTuple):
    """A score of every feature, from a table of scores."""

    values: Tensor
    """[L]; NaN for a feature that the score does not know."""
    unit: str


def columns(scores: Mapping[str, ScoreColumn], *, labelled: bool) -> list[TableColumn]:
    """The columns of a table with these scores, of an SAE that has labels or none."""
    return [
        TableColumn("id", "Feature", "Id of the feature", "id"),
        *([TableColumn("label", "Label", "What it stands for", "text")] if labelled else []),
        TableColumn("density", "Density", "Fraction of the tokens it fires on", "share"),
        TableColumn("max", "Largest", "Largest activation on ordinary rows", "number"),
        TableColumn("typical", "10th", "Tenth largest activation, which a few odd tokens do not raise", "number"),
        *(
            TableColumn(
                f"score {name}", visible(name).capitalize(), f"{visible(name)} score: {visible(column.unit)}", "number"
            )
            for name, column in scores.items()
        ),
        TableColumn("fires", "Fires on", "Tokens at its largest activations", "tokens"),
        TableColumn("promotes", "Promotes", "Tokens whose logits its decoder row raises most", "tokens"),
    ]


def table_script(
    report: DetailedReport, labels: FeatureLabels, scores: Mapping[str, ScoreColumn], shown: Sequence[int]
) -> str:
    """The data of the features `shown`, column by column, as a script: a page on disk may load no other kind of file."""
    features = [report.features[i] for i in shown]
    data: dict[str, list[Any]] = {
        "id": list(shown),
        "label": [visible(labels.text(one.id)) for one in features],
        "fires": [[visible(token) for token in one.fires_on[:_TOKENS]] for one in features],
        "promotes": [[visible(token) for token in one.promotes[:_TOKENS]] for one in features],
        "density": [_short(one.density) for one in features],
        "max": [_short(one.max_act) for one in features],
        "typical": [_short(one.typical_act) for one in features],
    }
    for name, column in scores.items():
        data[f"score {name}"] = [_short(float(column.values[i])) for i in shown]
    return f"const FEATURES = {json.dumps(data, separators=(',', ':'), allow_nan=False)};\n"


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def plot_table(report: DetailedReport) -> "Figure":
    """A figure of all features that fired: density against largest activation."""
    from matplotlib.figure import Figure

    density, largest = report.stats.density.numpy(), report.stats.max_act.numpy()
    alive = (density > 0) & (largest > 0)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.scatter(density[alive], largest[alive], s=5, alpha=0.35, linewidths=0, color="#1d5fd0", rasterized=True)
    if alive.any():
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel="fraction of the tokens", ylabel="largest activation")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
