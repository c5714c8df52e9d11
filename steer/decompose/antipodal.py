"""Both signs from a non-negative encoder: `(f(b_dec + a v) - f(b_dec - a v)) / a`; by default |a v| is the median |x|.

What the biases alone switch on is on in both codes and cancels (if it does not crowd out v's own features from the top
k). Read at the norm of real activations, as arXiv 2411.08790 asks of any input to the encoder.
"""

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.steer.decompose.base import DecomposeConfig, Method, Null, Problem
from steersman.steer.decompose.encode import encoder_input
from steersman.steer.decompose.terms import Terms, largest


def natural_scale(problem: Problem, v: Tensor, median_norm: float | None = None) -> float:
    """The `a` at which |a v| is the median norm of the SAE's activations, unless the settings name one."""
    if problem.config.scale is not None:
        return problem.config.scale
    stats = problem.sae.feature_stats
    median = median_norm or (stats.median_norm if stats is not None else 0.0)
    if not median > 0:
        raise SteersmanError(
            f"method {problem.config.method!r} reads v at the median norm of the SAE's activations, and this SAE has "
            "no statistics: run `steersman features` on it, or give scale="
        )
    return median / float(v.norm())


class Antipodal(Method):
    """The difference of the codes of a v and -a v."""

    name = "antipodal"
    source = "arXiv 2411.08790 (its requirements)"
    settings = ("scale",)
    null = Null.EQUAL_NORM

    def zero_scale(self, config: DecomposeConfig) -> float:
        return 1.0

    def terms(self, problem: Problem) -> list[Terms]:
        terms = []
        for v in problem.vectors:
            a = natural_scale(problem, v)
            codes = problem.sae.encode(encoder_input(problem.sae, v * v.new_tensor([[1.0], [-1.0]]), a)).double()
            values = (codes[0] - codes[1]) * problem.atoms.norms / a
            ids = largest(values, problem.config.k)
            terms.append(Terms(features=ids, coefficients=values[ids], details={"scale": a}))
        return terms
