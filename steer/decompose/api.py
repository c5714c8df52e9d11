"""`decompose`: a steering vector as signed features of an SAE.

The main path: check the vectors against the SAE, let the method find terms, rebuild the vector from them, and add what
must be known to believe them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import Origin, check_same_origin
from steersman.sae import SAE
from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.contrast import sides
from steersman.steer.decompose.diagnostics import Null, jaccard, negative_energy, warnings_of, zero_features
from steersman.steer.decompose.labels import labels_of
from steersman.steer.decompose.methods import METHODS
from steersman.steer.decompose.record import Decomposition
from steersman.steer.decompose.response import some_rows
from steersman.steer.decompose.task import DATA, DecomposeConfig, Task
from steersman.steer.decompose.terms import Terms, added_up, refit

UNITS = "coefficients in units of v"
EFFECT_UNITS = "coefficients are predicted changes of mean activations in text steered by v at unit length"


def decompose(
    v: Any,
    sae: SAE,
    *,
    config: DecomposeConfig | None = None,
    labels: Mapping[int, str] | None = None,
    lm: LanguageModel | None = None,
    texts: Sequence[str] | None = None,
    positive: Any = None,
    negative: Any = None,
    activations: Any = None,
    effect_map: Any = None,
    hook: str = "",
    **settings: Any,
) -> Any:
    """Take a steering vector apart into signed features of `sae`.

    Args:
        v: a tensor [D], a `SteeringVector` (or anything with `hook_name` and `vector`), or many: a tensor [B, D] or a
            list. None with method `contrast`: the difference of the texts' means.
        sae: the SAE, of the vector's model and hook point.
        config, **settings: see `DecomposeConfig`; `method="omp", k=16` are the defaults.
        labels: names of features by id (see `load_labels`). With `lm`, others get the tokens that they promote.
        lm: the model; `behaviour` and `contrast` of texts need it.
        texts: for `behaviour`: texts to compare the steered model on.
        positive, negative: for `contrast`: lists of texts, or activations [N, D] (or an iterable of batches).
        activations: for `response`: a store, a tensor [N, D] or an iterable of batches.
        effect_map: for `effect`: what `collect_effects(...).fit()` gives.
        hook: the vector's hook point, for an SAE that records none.

    Returns a `Decomposition`, or a list of them for many vectors.

    Raises SteersmanError for a vector that is zero, not finite, or of another width, model or hook point; k out of
    range; data that the method needs and did not get, or got and does not read.

    >>> from steersman.sae import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=16, d_sae=64, k=4))
    >>> v = 2 * sae.W_dec[5].detach() - sae.W_dec[40].detach()
    >>> found = decompose(v, sae, method="omp", k=2)
    >>> found.features.tolist(), [round(c, 3) for c in found.coefficients.tolist()]
    ([5, 40], [2.0, -1.0])
    """
    config = _config(config, settings)
    given = {
        "texts": texts,
        "positive": positive,
        "negative": negative,
        "activations": activations,
        "effect_map": effect_map,
    }
    _check_data(config.method, {**given, "lm": lm})
    many = isinstance(v, list | tuple) or (isinstance(v, Tensor) and v.ndim == 2)
    hook = _hook(v if not many else (list(v) or [None])[0], sae, lm, hook)
    task = Task(
        vectors=torch.zeros(0, sae.cfg.d_in, dtype=torch.float64, device=sae.device),
        sae=sae,
        atoms=Atoms.of(sae, config.exclude_dead),
        config=config,
        lm=lm,
        hook=hook,
        **{**given, "texts": list(texts or ())},
    )
    # Sources that can be read only once are read here: the method and its null both need them.
    if config.method == "contrast":
        plus, minus = sides(task)
        task = replace(task, positive=plus, negative=minus)
        v = plus.centre - minus.centre if v is None else v
    elif config.method == "response":
        task = replace(task, activations=some_rows(task))
    each: Sequence[Any] = list(v) if many and v is not None else [v]
    rows = [_row(one, i if many else None, sae, lm, hook) for i, one in enumerate(each)]
    if not rows:
        raise SteersmanError("no vector to take apart: the list is empty")
    sae.check_residual("decompose")
    _check_k(config, sae)
    task = replace(task, vectors=torch.stack(rows).to(sae.device))
    found = list(_records(task, labels))
    return found if many else found[0]


def _config(config: DecomposeConfig | None, settings: dict[str, Any]) -> DecomposeConfig:
    if config is not None and settings:
        raise SteersmanError(f"give config or single settings, not both: {', '.join(settings)}")
    try:
        return config or DecomposeConfig(**settings)
    except TypeError:
        known = list(DecomposeConfig.__dataclass_fields__)
        unknown = next(name for name in settings if name not in known)
        raise SteersmanError(f"decompose has no setting {unknown!r}; it has {', '.join(known)}") from None


def _check_k(config: DecomposeConfig, sae: SAE) -> None:
    k_most = sae.cfg.d_in if config.method in ("omp", "lasso", "nnls", "behaviour") else sae.cfg.d_sae
    if config.k is not None and not 1 <= config.k <= k_most:
        what = "d_in, more directions are not independent" if k_most == sae.cfg.d_in else "d_sae"
        raise SteersmanError(f"k = {config.k} is out of range: 1 to {k_most} ({what})")


def _check_data(method: str, given: dict[str, Any]) -> None:
    """Needed data is there, and none is given that would not be read (a model is always welcome, for labels)."""
    reads = DATA.get(method, ())
    for name, value in given.items():
        if value is not None and name not in reads and name != "lm":
            needs = [other for other, names in DATA.items() if name in names]
            raise SteersmanError(f"method {method!r} does not read {name}=; {' and '.join(needs)} would")
    missing = [name for name in reads if given[name] is None and name != "lm"]
    if method == "behaviour" and given["lm"] is None:
        missing.append("lm")
    if missing:
        what = {
            "activations": "a store, or activations [N, d_in]",
            "effect_map": "what collect_effects(...).fit() gives",
            "texts": "texts to compare the steered model on",
            "positive": "texts (with lm=) or activations [N, d_in]",
            "negative": "texts (with lm=) or activations [N, d_in]",
            "lm": "the model",
        }
        raise SteersmanError(f"method {method!r} needs {' and '.join(f'{n}= ({what[n]})' for n in missing)}")


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
        raise SteersmanError("no vector to take apart: only method 'contrast' can do without one")
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


def _records(task: Task, labels: Mapping[int, str] | None) -> Iterator[Decomposition]:
    found = METHODS[task.config.method](task)
    zero, null = zero_features(task), Null(task)
    for v, terms in zip(task.vectors, found):
        yield _record(task, v, terms, zero, null, labels)


def _record(
    task: Task, v: Tensor, terms: Terms, zero: set[int], null: Null, labels: Mapping[int, str] | None
) -> Decomposition:
    config, sae, ids = task.config, task.sae, terms.features
    directions = task.atoms.unit(ids)
    # The effect's coefficients are no parts of v: v is fitted by the same features instead.
    parts = refit(v, task.atoms, ids) if config.method == "effect" else terms.coefficients
    reconstruction = parts @ directions
    residual = v - reconstruction
    curve = added_up(v, task.atoms, terms) if terms.curve is None else terms.curve
    explained = float(1 - residual.square().sum() / v.square().sum())
    randoms = null.curves(v, terms)
    features = ids.tolist()
    return Decomposition(
        method=config.method,
        config=config,
        features=ids.cpu(),
        coefficients=terms.coefficients.cpu(),
        strengths=(parts / task.atoms.norms[ids]).cpu(),
        cosines=(directions @ v / v.norm()).cpu(),
        densities=None if sae.feature_stats is None else sae.feature_stats.density[ids.cpu()],
        labels=labels_of(features, sae, labels, task.lm),
        t=None if terms.t is None else terms.t.cpu(),
        units=EFFECT_UNITS if config.method == "effect" else UNITS,
        vector=v.float().cpu(),
        reconstruction=reconstruction.float().cpu(),
        residual=residual.float().cpu(),
        explained_variance=explained,
        cosine=float(reconstruction @ v / (reconstruction.norm() * v.norm()).clamp_min(1e-300)),
        curve=curve.cpu(),
        null_curve=randoms.mean(dim=0).cpu(),
        null_high=(randoms.max(dim=0).values if len(features) else randoms.new_zeros(0)).cpu(),
        zero_overlap=jaccard(set(features), zero),
        negative_energy=negative_energy(terms.coefficients),
        warnings=warnings_of(task, v, terms, explained, zero, randoms),
        path=terms.path,
        details=terms.details,
        hook_name=task.hook,
        model_name=sae.cfg.model_name,
    )
