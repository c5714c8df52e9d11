"""Take a steering vector apart into signed features of an SAE: `decompose` (arXiv 2411.08790)."""

from steersman.steer.decompose import (  # noqa: F401 (a method is there when its file was read)
    antipodal,
    behaviour,
    contrast_codes,
    encode,
    lasso,
    nnls,
    omp,
    predicted_effect,
    response,
)
from steersman.steer.decompose.api import decompose
from steersman.steer.decompose.base import METHODS, DecomposeConfig, Method, Null, Problem, Sources
from steersman.steer.decompose.labels import load_labels
from steersman.steer.decompose.plots import plot_decompositions
from steersman.steer.decompose.record import Decomposition
from steersman.steer.decompose.retention import Retention, measure_retention
from steersman.steer.decompose.terms import PathPoint, Terms

__all__ = [
    "METHODS",
    "DecomposeConfig",
    "Decomposition",
    "Method",
    "Null",
    "PathPoint",
    "Problem",
    "Retention",
    "Sources",
    "Terms",
    "decompose",
    "load_labels",
    "measure_retention",
    "plot_decompositions",
]
