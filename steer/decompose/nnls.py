"""Non-negative least squares, sparse: `min 1/2 |v - W_dec^T c|^2 + lambda sum(c)` with `c >= 0`, with its path.

With `k=None` the path runs to its end, the unpenalised NNLS solution (Lawson and Hanson 1974): up to d_in features that
rebuild v almost exactly, and are mostly not the features it was made of. A reconstruction cosine alone says nothing.
"""

from steersman.steer.decompose.lasso import convex
from steersman.steer.decompose.task import Task
from steersman.steer.decompose.terms import Terms


def nnls(task: Task) -> list[Terms]:
    """The non-negative solution of every vector."""
    return convex(task, positive=True)
