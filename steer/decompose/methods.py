"""The methods by name: one file each, all from a `Task` to the terms of every vector."""

from collections.abc import Callable

from steersman.steer.decompose.antipodal import antipodal
from steersman.steer.decompose.behaviour import behaviour
from steersman.steer.decompose.contrast import contrast
from steersman.steer.decompose.effect import effect
from steersman.steer.decompose.encode import encode
from steersman.steer.decompose.lasso import lasso
from steersman.steer.decompose.nnls import nnls
from steersman.steer.decompose.omp import omp
from steersman.steer.decompose.response import response
from steersman.steer.decompose.task import Task
from steersman.steer.decompose.terms import Terms

METHODS: dict[str, Callable[[Task], list[Terms]]] = {
    "encode": encode,
    "antipodal": antipodal,
    "contrast": contrast,
    "response": response,
    "omp": omp,
    "lasso": lasso,
    "nnls": nnls,
    "effect": effect,
    "behaviour": behaviour,
}
