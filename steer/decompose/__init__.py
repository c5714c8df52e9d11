"""Take a steering vector apart into signed features of an SAE: `decompose` (arXiv 2411.08790)."""

from steersman.steer.decompose.api import decompose
from steersman.steer.decompose.labels import load_labels
from steersman.steer.decompose.plots import plot_decompositions
from steersman.steer.decompose.record import Decomposition
from steersman.steer.decompose.retention import Retention, measure_retention
from steersman.steer.decompose.task import DecomposeConfig
from steersman.steer.decompose.terms import PathPoint

__all__ = [
    "DecomposeConfig",
    "Decomposition",
    "PathPoint",
    "Retention",
    "decompose",
    "load_labels",
    "measure_retention",
    "plot_decompositions",
]
