"""Lasso: `min 1/2 |v - W_dec^T c|^2 + lambda |c|_1` over unit decoder rows, both signs, with its path.

Without a penalty given, the smallest lambda that leaves at most k features. The penalty picks features; by default they
are then fitted again without it, as it shrinks every coefficient (Tibshirani 1996; the path by homotopy, see
`homotopy.py`). `kkt_violation` among the details is the largest violation of the optimality conditions over all
features, as a fraction of the largest lambda.
"""

from typing import ClassVar

from torch import Tensor

from steersman.sae import SAE
from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.base import Method, Null, Problem
from steersman.steer.decompose.homotopy import Solution, walk_path
from steersman.steer.decompose.terms import Terms, refit

TOGETHER = 32  # vectors that walk together: each holds its active rows and inverse Gram matrix
_TOLERANCE = 1e-6


class Lasso(Method):
    """The end of each vector's path as terms, largest coefficient first."""

    name = "lasso"
    source = "Tibshirani 1996"
    settings = ("penalty", "refit")
    independent = True
    null = Null.SCALE_FREE
    positive: ClassVar[bool] = False
    """Whether all coefficients are at least 0."""

    def expresses_negative(self, sae: SAE) -> bool:
        return not self.positive

    def terms(self, problem: Problem) -> list[Terms]:
        config, positive = problem.config, self.positive
        again = config.refit if config.refit is not None else config.penalty is None
        terms = []
        for V in problem.vectors.split(TOGETHER):
            solutions = walk_path(V, problem.atoms, k=config.k, penalty=config.penalty, positive=positive)
            for v, solution in zip(V, solutions):
                coefficients = solution.coefficients
                if again:
                    coefficients = _without_penalty(v, problem.atoms, solution, positive)
                order = coefficients.abs().argsort(descending=True, stable=True)
                order = order[coefficients[order] != 0]
                warnings = []
                if solution.violation > _TOLERANCE:
                    warnings.append(
                        f"the path ended {solution.violation:.1e} of the largest penalty away from the optimum: "
                        "features that are almost copies of one another blur it"
                    )
                terms.append(
                    Terms(
                        features=solution.features[order],
                        coefficients=coefficients[order],
                        path=solution.path,
                        details={"penalty": solution.penalty, "kkt_violation": solution.violation},
                        warnings=warnings,
                    )
                )
        return terms


def _without_penalty(v: Tensor, atoms: Atoms, solution: Solution, positive: bool) -> Tensor:
    """Coefficients of the solution's features by least squares, at least 0 if `positive`."""
    if not positive:
        return refit(v, atoms, solution.features)
    if not len(solution.features):
        return solution.coefficients
    few = Atoms(atoms.unit(solution.features))
    (end,) = walk_path(v[None], few, k=None, penalty=0.0, positive=True)
    coefficients = v.new_zeros(len(solution.features))
    coefficients[end.features] = end.coefficients
    return coefficients
