"""Non-negative least squares, sparse: `min 1/2 |v - W_dec^T c|^2 + lambda sum(c)` with `c >= 0`, with its path.

With `k=None` the path runs to its end, the unpenalised NNLS solution (Lawson and Hanson 1974): up to d_in features that
rebuild v almost exactly, and are mostly not the features it was made of. A reconstruction cosine alone says nothing.
"""

from steersman.steer.decompose.lasso import Lasso


class NNLS(Lasso):
    """The non-negative solution."""

    name = "nnls"
    source = "Lawson and Hanson 1974"
    positive = True
