"""What v does to codes of real activations: `mean over x of (f(x + a v) - f(x)) / a`, with a t statistic per feature.

The encoder is read near where it was trained, so the biases decide nothing and a feature that real activations hold can
fall as well as rise (the two faults that arXiv 2411.08790 finds in encoding v itself). What no activation holds cannot
fall, so negative parts are still read too small. By default |a v| is the median |x|.

Shape letters: N activations, L latents, D width, K active latents of a token.
"""

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae import SAE, SparseCode
from steersman.steer.decompose.antipodal import natural_scale
from steersman.steer.decompose.base import Method, Null, Problem, Sources, batches_of
from steersman.steer.decompose.terms import Terms, largest

ROWS = 512
_CHUNK = 128  # tokens whose dense codes are held at once


class Response(Method):
    """The mean change of real activations' codes."""

    name = "response"
    source = "arXiv 2411.08790 (its requirements)"
    reads = ("activations",)
    settings = ("scale", "rows")
    null = Null.EQUAL_NORM
    null_directions = 4  # each is a mean over hundreds of activations already

    def read(self, sources: Sources) -> Tensor:
        """The first `rows` activations [N, D] of the source: shuffled, if it shuffles."""
        assert sources.activations is not None
        wanted, D = sources.config.rows or ROWS, sources.sae.cfg.d_in
        parts, n = [], 0
        for x in batches_of(sources.activations):
            if x.ndim != 2 or x.shape[1] != D:
                raise SteersmanError(f"activations of shape {tuple(x.shape)} do not fit an SAE of d_in {D}")
            parts.append(x[: wanted - n].to(sources.sae.device).float())
            n += len(parts[-1])
            if n >= wanted:
                break
        if n < 2:
            raise SteersmanError(f"{n} activations are too few for a mean response: give a store or at least 2 rows")
        X = torch.cat(parts)
        if not bool(X.isfinite().all()):
            raise SteersmanError("the activations hold NaN or infinite values")
        return X

    def terms(self, problem: Problem) -> list[Terms]:
        X: Tensor = problem.data
        median = float(X.norm(dim=1).median())
        terms = []
        for v in problem.vectors:
            a = natural_scale(problem, v, median)
            mean, t = _mean_change(problem.sae, X, a * v.float())
            values = mean * problem.atoms.norms / a
            ids = largest(values, problem.config.k)
            details = {"scale": a, "rows": float(len(X))}
            terms.append(Terms(features=ids, coefficients=values[ids], t=t[ids], details=details))
        return terms


def _mean_change(sae: SAE, X: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """Mean change [L] of the code of X [N, D] under `push` [D], and its paired t statistic [L], both float64."""
    total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=X.device)
    squares = torch.zeros_like(total)
    for x in X.split(_CHUNK):
        change = dense(sae.encode_sparse(x + push), sae) - dense(sae.encode_sparse(x), sae)
        total += change.sum(dim=0)
        squares += change.square().sum(dim=0)
    mean = total / len(X)
    variance = (squares / len(X) - mean.square()).clamp_min(0) / (len(X) - 1)
    return mean, t_statistic(mean, variance)


def dense(code: SparseCode, sae: SAE) -> Tensor:
    """A sparse code as [N, L] float64."""
    out = torch.zeros(len(code.values), sae.cfg.d_sae, dtype=torch.float64, device=code.values.device)
    return out.scatter_add_(1, code.indices, code.values.double())


def t_statistic(mean: Tensor, variance: Tensor) -> Tensor:
    """mean / sqrt(variance of the mean); 0 where the mean is 0, and infinite where it never varied."""
    return torch.where(mean == 0, 0.0, mean / variance.sqrt())
