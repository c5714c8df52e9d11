"""`decompose`: a steering vector as signed features of an SAE.

The main path: check the vectors against the SAE, let the method find terms, rebuild the vector from them, and add what
must be known to believe them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from steersman.config import merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import Origin, check_same_origin
from steersman.sae import SAE
from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.base import (
    GIVEN,
    METHODS,
    Activations,
    DecomposeConfig,
    LinearEffect,
    Method,
    Problem,
    Sources,
)
from steersman.steer.decompose.diagnostics import NullCurves, warnings_of, zero_features
from steersman.steer.decompose.labels import Labels, labels_of
from steersman.steer.decompose.record import Decomposition
from steersman.steer.decompose.terms import Terms, cumulative_ev, jaccard, negative_energy
from steersman.steer.vectors.vector import VectorLike


@overload
def decompose(
    vectors: Tensor | VectorLike | None,
    sae: SAE,
    config: DecomposeConfig | None = None,
    *,
    labels: Labels | None = None,
    lm: LanguageModel | None = None,
    texts: Sequence[str] | None = None,
    positive: Sequence[str] | Activations | None = None,
    negative: Sequence[str] | Activations | None = None,
    activations: Activations | None = None,
    effect_map: LinearEffect | None = None,
    hook: str = "",
    **settings: Any,
) -> Decomposition: ...


@overload
def decompose(
    vectors: Sequence[Tensor | VectorLike],
    sae: SAE,
    config: DecomposeConfig | None = None,
    *,
    labels: Labels | None = None,
    lm: LanguageModel | None = None,
    texts: Sequence[str] | None = None,
    positive: Sequence[str] | Activations | None = None,
    negative: Sequence[str] | Activations | None = None,
    activations: Activations | None = None,
    effect_map: LinearEffect | None = None,
    hook: str = "",
    **settings: Any,
) -> list[Decomposition]: ...


def decompose(
    vectors: Tensor | VectorLike | Sequence[Tensor | VectorLike] | None,
    sae: SAE,
    config: DecomposeConfig | None = None,
    *,
    labels: Labels | None = None,
    lm: LanguageModel | None = None,
    texts: Sequence[str] | None = None,
    positive: Sequence[str] | Activations | None = None,
    negative: Sequence[str] | Activations | None = None,
    activations: Activations | None = None,
    effect_map: LinearEffect | None = None,
    hook: str = "",
    **settings: Any,
) -> Decomposition | list[Decomposition]:
    """Take a steering vector apart into signed features of `sae`.

    Args:
        vectors: a tensor [D], a `SteeringVector` (or anything with `hook_name` and `vector`), or several: a list, or a
            tensor [B, D] (for which a type checker expects one result). None with method `contrast`: the difference
            of the texts' means.
        sae: the SAE, of the vector's model and hook point.
        config: the settings; `**settings` are fields of it, over those of `config`.
        labels: names of features by id (see `read_labels`), over those that the SAE carries. With `lm`, others get
            the tokens that they promote.
        lm: the model; `behaviour` and `contrast` of texts need it.
        texts: for `behaviour`: texts to compare the steered model on.
        positive, negative: for `contrast`: lists of texts, or activations [N, D] (or an iterable of batches).
        activations: for `response`: a store, a tensor [N, D] or an iterable of batches.
        effect_map: for `effect`: what `collect_effects(...).fit()` gives.
        hook: the vector's hook point, for an SAE that records none.

    Returns a `Decomposition`, or a list of them for several vectors.

    Raises SteersmanError for a vector that is zero, not finite, or of another width, model or hook point; k out of
    range; data that the method needs and did not get, or got and does not read.

    >>> from steersman.sae import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=16, d_sae=64, k=4))
    >>> v = 2 * sae.W_dec[5].detach() - sae.W_dec[40].detach()
    >>> found = decompose(v, sae, method="omp", k=2)
    >>> found.features.tolist(), [round(c, 3) for c in found.coefficients.tolist()]
    ([5, 40], [2.0, -1.0])
    """
    config = merged(DecomposeConfig, config, settings)
    method = METHODS[config.method]()
    given = {
        "texts": texts,
        "positive": positive,
        "negative": negative,
        "activations": activations,
        "effect_map": effect_map,
    }
    check_given(config.method, {**given, "lm": lm})
    several = isinstance(vectors, list | tuple) or (isinstance(vectors, Tensor) and vectors.ndim == 2)
    each: list[Any] = list(vectors) if several else [vectors]  # pyright: ignore[reportArgumentType]
    if not each:
        raise SteersmanError("no vector to take apart: the list is empty")
    hook = _hook(each[0], sae, lm, hook)
    sae.check_residual("decompose")
    _check_k(method, config, sae)
    makes = vectors is None and method.makes_vector
    rows = [] if makes else [_row(one, i if several else None, sae, lm, hook) for i, one in enumerate(each)]
    data = method.read(Sources(sae=sae, config=config, lm=lm, hook=hook, **given))
    rows = [_row(method.own_vector(data), None, sae, lm, hook)] if makes else rows
    problem = Problem(
        vectors=torch.stack(rows).to(sae.device),
        sae=sae,
        atoms=Atoms.of(sae, config.exclude_dead),
        config=config,
        data=data,
        lm=lm,
        hook=hook,
    )
    records = list(_records(method, problem, labels))
    return records if several else records[0]


def _check_k(method: Method, config: DecomposeConfig, sae: SAE) -> None:
    k_most = sae.cfg.d_in if method.independent else sae.cfg.d_sae
    if config.k is not None and not 1 <= config.k <= k_most:
        what = "d_in, more directions are not independent" if k_most == sae.cfg.d_in else "d_sae"
        raise SteersmanError(f"k = {config.k} is out of range: 1 to {k_most} ({what})")


def check_given(name: str, given: Mapping[str, object]) -> None:
    """Raise SteersmanError unless what method `name` needs is there, and nothing is given that it would not read (a
    model is always welcome, for labels). `given` holds what there is, or will be, by the names of `decompose`."""
    method = METHODS[name]()
    for name, value in given.items():
        if value is not None and name not in method.reads and name != "lm":
            readers = [other.name for other in METHODS.values() if name in other.reads]
            raise SteersmanError(f"method {method.name!r} does not read {name}=; {' and '.join(readers)} would")
    missing = [f"{name}= ({GIVEN[name]})" for name in method.reads if given[name] is None]
    if missing:
        raise SteersmanError(f"method {method.name!r} needs {' and '.join(missing)}")


def _hook(v: Any, sae: SAE, lm: LanguageModel | None, hook: str) -> str:
    """The hook point of the vectors: named, the SAE's, or the first vector's own."""
    name = hook or sae.cfg.hook_name
    if not name and not isinstance(v, Tensor):
        name = getattr(v, "hook_name", "")
    return lm.resolve_hook(name) if lm is not None and name else name


def _row(v: Any, index: int | None, sae: SAE, lm: LanguageModel | None, hook: str) -> Tensor:
    """One vector as [D] float64, after checking that it belongs to the SAE."""
    name = "the vector" if index is None else f"vector {index}"
    if hasattr(v, "directions") and hook in v.directions:
        v = v.at(hook)  # of a vector at several hook points, the part that the SAE reads
    if hasattr(v, "vector"):
        there = getattr(v, "hook_name", "") or ""
        resolved = lm.resolve_hook(there) if lm is not None and there else there
        origin = Origin(getattr(v, "model_name", "") or "", resolved)
        check_same_origin(name, origin, "the SAE", Origin.of_sae(sae)._replace(hook_name=hook))
        v = v.vector
    if v is None:
        able = " and ".join(repr(method.name) for method in METHODS.values() if method.makes_vector)
        raise SteersmanError(f"no vector to take apart: only method {able} can do without one")
    try:
        row = torch.as_tensor(v).detach().to(device=sae.device, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SteersmanError(f"{name} is no vector of numbers: {error}") from None
    if row.shape != (sae.cfg.d_in,):
        raise SteersmanError(f"{name} has shape {list(row.shape)}, the SAE has d_in {sae.cfg.d_in}")
    if not bool(row.isfinite().all()):
        raise SteersmanError(f"{name} holds NaN or infinite values")
    if not float(row.norm()) > 0:
        raise SteersmanError(f"{name} is zero: it has no parts")
    return row


def _records(method: Method, problem: Problem, labels: Labels | None) -> Iterator[Decomposition]:
    found = method.terms(problem)
    zero, null = zero_features(method, problem), NullCurves(method, problem)
    for v, terms in zip(problem.vectors, found):
        yield _record(method, problem, v, terms, zero, null.of(v, terms), labels)


def _record(
    method: Method,
    problem: Problem,
    v: Tensor,
    terms: Terms,
    zero: set[int],
    null: Tensor,
    labels: Labels | None,
) -> Decomposition:
    sae, ids = problem.sae, terms.features
    directions = problem.atoms.unit(ids)
    parts = method.parts(problem, v, terms)
    reconstruction = parts @ directions
    residual = v - reconstruction
    curve = cumulative_ev(v, problem.atoms, terms) if terms.curve is None else terms.curve
    explained = float(1 - residual.square().sum() / v.square().sum())
    features = ids.tolist()
    return Decomposition(
        method=method.name,
        config=problem.config,
        features=ids.cpu(),
        coefficients=terms.coefficients.cpu(),
        strengths=(parts / problem.atoms.norms[ids]).cpu(),
        cosines=(directions @ v / v.norm()).cpu(),
        densities=None if sae.feature_stats is None else sae.feature_stats.density[ids.cpu()],
        labels=labels_of(features, sae, labels, problem.lm),
        t=None if terms.t is None else terms.t.cpu(),
        units=method.units,
        vector=v.float().cpu(),
        reconstruction=reconstruction.float().cpu(),
        residual=residual.float().cpu(),
        explained_variance=explained,
        cosine=float(reconstruction @ v / (reconstruction.norm() * v.norm()).clamp_min(1e-300)),
        curve=curve.cpu(),
        null_curve=null.mean(dim=0).cpu(),
        null_high=(null.max(dim=0).values if len(features) else null.new_zeros(0)).cpu(),
        zero_overlap=jaccard(set(features), zero),
        negative_energy=negative_energy(terms.coefficients),
        warnings=warnings_of(method, problem, v, terms, explained, zero, null),
        path=terms.path,
        details=terms.details,
        hook_name=problem.hook,
        model_name=sae.cfg.model_name,
    )
