"""What must be known to believe a decomposition: a null, the overlap with v = 0, the negative energy, and warnings.

Shape letters: B vectors, M terms, D width, R random directions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from steersman.steer.decompose.base import Method, Null, Problem
from steersman.steer.decompose.encode import encoder_input
from steersman.steer.decompose.omp import matching_pursuit
from steersman.steer.decompose.terms import Terms, cumulative_ev, negative_energy, projected_ev, span_of

DENSE = 0.1
"""A feature active on more than this fraction of the tokens counts as always on."""
_COPIES = 0.95  # cosine from which two features are called copies


def random_directions(problem: Problem) -> Tensor:
    """[R, D] float64 unit vectors, from the seed."""
    g = torch.Generator().manual_seed(problem.config.seed)
    shape = problem.config.n_null, problem.vectors.shape[1]
    U = torch.randn(shape, generator=g, dtype=torch.float64).to(problem.vectors.device)
    return U / U.norm(dim=1, keepdim=True)


class NullCurves:
    """Explained variance of random directions, as the method's `null` says."""

    def __init__(self, method: Method, problem: Problem) -> None:
        self.method, self.problem, self.directions = method, problem, random_directions(problem)
        self.shared = self._own_curves(self.directions) if method.null is Null.SCALE_FREE else None

    def _own_curves(self, V: Tensor) -> Tensor:
        """[R, M] of the method itself on V [R, D]."""
        terms = self.method.terms(replace(self.problem, vectors=V))
        curves = [cumulative_ev(v, self.problem.atoms, t) if t.curve is None else t.curve for v, t in zip(V, terms)]
        return torch.nn.utils.rnn.pad_sequence(curves, batch_first=True, padding_value=float("nan"))

    def of(self, v: Tensor, terms: Terms) -> Tensor:
        """[R, M] for the vector v [D] with M terms."""
        curves = self.shared
        if curves is None and self.method.null is Null.EQUAL_NORM:
            curves = self._own_curves(self.directions[: self.method.null_directions] * v.norm())
        elif curves is None:
            curves = projected_ev(self.directions, span_of(self.problem.atoms, terms.features))
        return _resized(curves, len(terms.features))


def _resized(curves: Tensor, M: int) -> Tensor:
    """Curves [R, any] as [R, M]: what ended early stays where it ended (0 where nothing was found)."""
    R, found = curves.shape
    out = curves.new_zeros(R, M)
    last = curves.new_zeros(R)
    for m in range(M):
        if m < found:
            last = torch.where(curves[:, m].isnan(), last, curves[:, m])
        out[:, m] = last
    return out


def zero_features(method: Method, problem: Problem) -> set[int]:
    """The features that the encoder activates for v = 0, read the way the method reads v."""
    zero = problem.vectors.new_zeros(1, problem.vectors.shape[1])
    code = problem.sae.encode_sparse(encoder_input(problem.sae, zero, method.zero_scale(problem.config)))
    return set(code.indices[code.active].tolist())


def warnings_of(
    method: Method, problem: Problem, v: Tensor, terms: Terms, explained: float, zero: set[int], null: Tensor
) -> list[str]:
    """Everything to beware of in the decomposition of v [D], the method's own warnings first."""
    warnings, ids = list(terms.warnings), terms.features.tolist()
    if not ids:
        return [*warnings, f"no feature was found: {method.name} says nothing about this vector"]
    warnings += method.bias_warnings(problem, v, ids, zero)
    if not method.expresses_negative(problem.sae):
        warnings.append(_sign_warning(method, problem, v, len(ids), explained))
    if explained <= float(null[:, -1].max()):
        warnings.append(
            f"explained variance {explained:.3f} is not above that of random directions "
            f"({float(null[:, -1].mean()):.3f} on average, {float(null[:, -1].max()):.3f} at most): these features say "
            "nothing special about v"
        )
    warnings += _feature_warnings(problem, terms, ids)
    if method.needs_k and len(ids) < (problem.config.k or 0):
        warnings.append(f"only {len(ids)} features: they explain v completely, or no other adds anything")
    return warnings


def _sign_warning(method: Method, problem: Problem, v: Tensor, n: int, explained: float) -> str:
    signed = matching_pursuit(v[None], problem.atoms, min(n, len(v)))[0]
    energy = negative_energy(signed.coefficients)
    better = 0.0 if signed.curve is None else float(signed.curve[-1])
    return (
        f"{method.name} cannot express negative parts: omp with as many features has {100 * energy:.0f} % of "
        f"its energy in negative coefficients and explains {better:.3f} of v, this {explained:.3f}"
    )


def _feature_warnings(problem: Problem, terms: Terms, ids: list[int]) -> list[str]:
    warnings, stats = [], problem.sae.feature_stats
    if stats is not None:
        density, largest = stats.density.cpu(), stats.max_act.cpu()
        dense = [i for i in ids if float(density[i]) > DENSE]
        silent = [i for i in ids if float(largest[i]) <= 0]
        dead = [i for i in silent if float(density[i]) <= 0]
        on_sinks = [i for i in silent if i not in dead]
        if dense:
            percent = f"{100 * DENSE:.0f} %"
            warnings.append(f"active on more than {percent} of all tokens, so about no one thing: {_named(dense)}")
        if dead:
            warnings.append(f"never active in {stats.n_tokens:,} tokens, so without a meaning: {_named(dead)}")
        if on_sinks:
            warnings.append(f"active on rows of huge norm alone (attention sinks): {_named(on_sinks)}")
    rows = problem.atoms.unit(terms.features[:256])
    alike = (rows @ rows.T).abs().triu(1) > _COPIES
    pairs = [f"{ids[i]} and {ids[j]}" for i, j in alike.nonzero().tolist()]
    if pairs:
        same = f"almost the same direction (|cosine| above {_COPIES}), so their shares are arbitrary"
        warnings.append(f"{same}: {_named(pairs)}")
    return warnings


def _named(items: list[int] | list[str], limit: int = 6) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more
