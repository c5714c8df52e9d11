"""Both signs from a non-negative encoder: `(f(b_dec + a v) - f(b_dec - a v)) / a`; by default |a v| is the median |x|.

What the biases alone switch on is on in both codes and cancels (if it does not crowd out v's own features from the top
k). Read at the norm of real activations, as arXiv 2411.08790 asks of any input to the encoder.
"""

from steersman.errors import SteersmanError
from steersman.steer.decompose.encode import encoder_input
from steersman.steer.decompose.task import Task
from steersman.steer.decompose.terms import Terms, largest


def natural_scale(task: Task, row: int, median_norm: float | None = None) -> float:
    """The `a` at which |a v| is the median norm of the SAE's activations, unless the task sets one."""
    if task.config.scale is not None:
        return task.config.scale
    stats = task.sae.feature_stats
    median = median_norm or (stats.median_norm if stats is not None else 0.0)
    if not median > 0:
        raise SteersmanError(
            f"method {task.config.method!r} reads v at the median norm of the SAE's activations, and this SAE has no "
            "statistics: run `steersman features` on it, or give scale="
        )
    return median / float(task.vectors[row].norm())


def antipodal(task: Task) -> list[Terms]:
    """The antipodal code of every vector, at most k largest in size."""
    terms = []
    for row, v in enumerate(task.vectors):
        a = natural_scale(task, row)
        codes = task.sae.encode(encoder_input(task.sae, v * v.new_tensor([[1.0], [-1.0]]), a)).double()
        values = (codes[0] - codes[1]) * task.atoms.norms / a
        ids = largest(values, task.config.k)
        terms.append(Terms(features=ids, coefficients=values[ids], details={"scale": a}))
    return terms
