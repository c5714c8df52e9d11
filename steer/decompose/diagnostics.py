"""What must be known to believe a decomposition: a null, the overlap with v = 0, the negative energy, and warnings.

Shape letters: B vectors, M terms, D width, R random directions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from steersman.steer.decompose.encode import encoder_input
from steersman.steer.decompose.omp import matching_pursuit
from steersman.steer.decompose.task import Task
from steersman.steer.decompose.terms import Terms, added_up, fitted, span_of

DENSE = 0.1
"""A feature active on more than this share of the tokens counts as always on."""
_COPIES = 0.95  # cosine from which two features are called copies
_SMALL = 0.3  # |v| over the median |x| below which the encoder is called out of its range

_FEW = 4  # random directions for a response: each is a mean over hundreds of activations already
_SCALE_FREE = ("omp", "lasso", "nnls")  # the curve does not depend on |v|: one null serves all vectors
_ENCODER = ("encode", "antipodal", "response")


def random_directions(task: Task) -> Tensor:
    """[R, D] float64 unit vectors, from the seed."""
    g = torch.Generator().manual_seed(task.config.seed)
    U = torch.randn(task.config.n_null, task.vectors.shape[1], generator=g, dtype=torch.float64).to(task.vectors.device)
    return U / U.norm(dim=1, keepdim=True)


class Null:
    """Explained variance of random directions of equal norm, by the same method where it reads nothing but v."""

    def __init__(self, task: Task) -> None:
        self.task, self.directions = task, random_directions(task)
        self.shared: Tensor | None = None
        if task.config.method in _SCALE_FREE:
            self.shared = self._curves(self.directions)

    def _curves(self, V: Tensor) -> Tensor:
        """[R, M] of the method itself on V [R, D]."""
        from steersman.steer.decompose.methods import METHODS  # which needs this module's callers

        terms = METHODS[self.task.config.method](replace(self.task, vectors=V))
        curves = [added_up(v, self.task.atoms, t) if t.curve is None else t.curve for v, t in zip(V, terms)]
        return torch.nn.utils.rnn.pad_sequence(curves, batch_first=True, padding_value=float("nan"))

    def curves(self, v: Tensor, terms: Terms) -> Tensor:
        """[R, M] for the vector v [D] with M terms."""
        if self.task.config.method in _SCALE_FREE and self.shared is not None:
            found = self.shared
        elif self.task.config.method in _ENCODER:
            few = _FEW if self.task.config.method == "response" else len(self.directions)
            found = self._curves(self.directions[:few] * v.norm())
        else:
            found = fitted(self.directions, span_of(self.task.atoms, terms.features))
        return _resized(found, len(terms.features))


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


def zero_features(task: Task) -> set[int]:
    """The features that the encoder activates for v = 0, read the way the method reads v."""
    centred = task.config.method == "antipodal" or (task.config.method == "encode" and task.config.scale is not None)
    zero = task.vectors.new_zeros(1, task.vectors.shape[1])
    code = task.sae.encode_sparse(encoder_input(task.sae, zero, 1.0 if centred else None))
    return set(code.indices[code.active].tolist())


def jaccard(a: set[int], b: set[int]) -> float:
    """Size of the intersection over that of the union; 0 for two empty sets.

    >>> jaccard({1, 2, 3}, {2, 3, 4})
    0.5
    """
    return len(a & b) / len(a | b) if a | b else 0.0


def negative_energy(coefficients: Tensor) -> float:
    """Share of the squared coefficients that is negative; 0 without coefficients."""
    energy = coefficients.square()
    return float(energy[coefficients < 0].sum() / energy.sum()) if float(energy.sum()) > 0 else 0.0


def warnings_of(task: Task, v: Tensor, terms: Terms, explained: float, zero: set[int], null: Tensor) -> list[str]:
    """Everything to beware of in the decomposition of v [D], the method's own warnings first."""
    found = list(terms.warnings)
    method, ids = task.config.method, terms.features.tolist()
    if not ids:
        return [*found, f"no feature was found: {method} says nothing about this vector"]
    if method == "encode":
        found += _encoder_warnings(task, v, ids, zero)
    elif jaccard(set(ids), zero) > 0.3:
        found.append(
            f"{len(set(ids) & zero)} of the {len(ids)} features are also what the encoder activates for v = 0: they "
            "may come from its biases"
        )
    if method in ("encode", "nnls"):
        found.append(_sign_warning(task, v, len(ids), explained))
    if explained <= float(null[:, -1].max()):
        found.append(
            f"explained variance {explained:.3f} is not above that of random directions "
            f"({float(null[:, -1].mean()):.3f} on average, {float(null[:, -1].max()):.3f} at most): these features say "
            "nothing special about v"
        )
    return found + _feature_warnings(task, terms, ids)


def _encoder_warnings(task: Task, v: Tensor, ids: list[int], zero: set[int]) -> list[str]:
    cfg, stats = task.sae.cfg, task.sae.feature_stats
    shared = len(set(ids) & zero)
    found = [
        f"the encoder activates {len(zero)} features for v = 0 too, {shared} of the {len(ids)} found here among them: "
        + ("its biases decide, not v" if shared * 2 > len(ids) else "take those for no part of v")
    ]
    if task.sae.exact_k:
        found.append(f"a top-k SAE names up to k = {cfg.k} features for any input, even for v = 0")
    given = float(v.norm()) * (task.config.scale or 1.0)
    if stats is not None and stats.median_norm > 0 and given < _SMALL * stats.median_norm:
        found.append(
            f"the encoder was given a vector of norm {given:.3g}, {given / stats.median_norm:.2g} of the activations "
            f"it was trained on ({stats.median_norm:.3g}): it is far outside its range"
        )
    return found


def _sign_warning(task: Task, v: Tensor, n: int, explained: float) -> str:
    signed = matching_pursuit(v[None], task.atoms, min(n, len(v)))[0]
    energy = negative_energy(signed.coefficients)
    better = 0.0 if signed.curve is None else float(signed.curve[-1])
    return (
        f"{task.config.method} cannot express negative parts: omp with as many features has {100 * energy:.0f} % of "
        f"its energy in negative coefficients and explains {better:.3f} of v, this {explained:.3f}"
    )


def _feature_warnings(task: Task, terms: Terms, ids: list[int]) -> list[str]:
    found, stats = [], task.sae.feature_stats
    if stats is not None:
        density, largest = stats.density.cpu(), stats.max_act.cpu()
        dense = [i for i in ids if float(density[i]) > DENSE]
        dead = [i for i in ids if float(largest[i]) <= 0]
        if dense:
            share = f"{100 * DENSE:.0f} %"
            found.append(f"active on more than {share} of all tokens, so about no one thing: {_named(dense)}")
        if dead:
            found.append(f"never active in {stats.n_tokens:,} tokens, so without a meaning: {_named(dead)}")
    rows = task.atoms.unit(terms.features[:256])
    alike = (rows @ rows.T).abs().triu(1) > _COPIES
    pairs = [f"{ids[i]} and {ids[j]}" for i, j in alike.nonzero().tolist()]
    if pairs:
        same = f"almost the same direction (|cosine| above {_COPIES}), so their shares are arbitrary"
        found.append(f"{same}: {_named(pairs)}")
    if task.config.method in ("omp", "behaviour") and len(ids) < (task.config.k or 0):
        found.append(f"only {len(ids)} features: they explain v completely, or no other adds anything")
    return found


def _named(items: list[int] | list[str], limit: int = 6) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more
