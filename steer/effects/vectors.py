"""The vectors whose effects are measured: unit directions, made from one seed (arXiv 2411.02193, sec. 3).

| kind | direction |
|---|---|
| `decoder` | d_j / |d_j| for rows j drawn without replacement |
| `pairs` | w d_i / |d_i| + (1 - w) d_j / |d_j|, w uniform on [0, 1), two different rows; then unit norm |
| `random` | uniform on the sphere |
| `gradients` | none: for each unsteered text, the gradient of its likelihood (`gradients.py`) |
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_fits
from steersman.sae import SAE
from steersman.steer.effects.config import EffectsConfig


def unit_rows(x: Tensor) -> Tensor:
    """The rows of x [n, D] with norm 1."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def usable_rows(sae: SAE) -> Tensor:
    """Ids [n] of the features whose decoder rows are directions: not zero and, where that is known, not dead."""
    usable = sae.W_dec.detach().cpu().norm(dim=1) > 0
    if sae.feature_stats is not None:
        usable &= sae.feature_stats.max_act.cpu() > 0
    return usable.nonzero()[:, 0]


def n_vectors(config: EffectsConfig, sae: SAE, width: int) -> int:
    """How many vectors `make_vectors` makes."""
    if config.n_vectors is not None:
        return config.n_vectors
    return len(usable_rows(sae)) if config.vectors == "decoder" else 8 * width


def make_vectors(config: EffectsConfig, sae: SAE, width: int) -> Tensor:
    """Unit vectors [n, D] fp32 on the CPU, as `config` asks: zeros in place of gradients, which are measured. Raises
    SteersmanError where the SAE has too few rows."""
    g = torch.Generator().manual_seed(config.seed)
    n = n_vectors(config, sae, width)
    if config.by_gradients:
        return torch.zeros(1, width).expand(n, width)
    if config.vectors == "random":
        return unit_rows(torch.randn(n, width, generator=g))
    if sae.cfg.d_in != width:
        raise SteersmanError(f"decoder rows have width {sae.cfg.d_in}, the hook point to steer at has {width}")
    ids = usable_rows(sae)
    rows = unit_rows(sae.W_dec.detach().float().cpu()[ids])
    if len(ids) < 2:
        raise SteersmanError("this SAE has fewer than two living features: use vectors='random'")
    if config.vectors == "decoder":
        if n > len(ids):
            raise SteersmanError(
                f"n_vectors {n} is more than the {len(ids)} living features of the SAE: ask for fewer, or use "
                "vectors='pairs' or 'random'"
            )
        return rows[torch.randperm(len(ids), generator=g)[:n]]
    first = torch.randint(len(ids), (n,), generator=g)
    second = (first + torch.randint(1, len(ids), (n,), generator=g)) % len(ids)
    w = torch.rand(n, 1, generator=g)
    return unit_rows(w * rows[first] + (1 - w) * rows[second])


def source_tensors(config: EffectsConfig, sae: SAE) -> list[Tensor]:
    """What `make_vectors` makes them from, besides the settings: what identifies the vectors on every machine.

    Unit vectors do not, as a norm is rounded differently from one CPU to another.
    """
    return [] if config.vectors in ("random", "gradients") else [sae.W_dec.detach().cpu(), usable_rows(sae)]


def given_vectors(given: Any, lm: LanguageModel, hook: str) -> Tensor:
    """Vectors from the caller, [n, D] or a sequence of `SteeringVector`, as they are, [n, D] fp32 on the CPU.

    Raises SteersmanError for one of another width, model or hook point, one that is zero, and one that is not finite.
    """
    width = lm.hook_width(hook)
    if isinstance(given, Tensor):
        x = given.detach().float().cpu()
        if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != width:
            raise SteersmanError(f"vectors must be [n, {width}] for {hook} of {lm.name}, got {tuple(x.shape)}")
    else:
        x = torch.stack([vector_at(v, lm, hook) for v in _sequence(given)])
    if not bool(x.isfinite().all()):
        raise SteersmanError("the vectors hold NaN or infinite values")
    zero = (x.norm(dim=1) == 0).nonzero()[:, 0]
    if len(zero):
        raise SteersmanError(f"vector {int(zero[0])} of {len(x)} is zero: it has no direction")
    return x


def _sequence(given: Any) -> Sequence[Any]:
    found = list(given) if isinstance(given, Iterable) else [given]
    if not found:
        raise SteersmanError("no vectors given")
    return found


def vector_at(vector: Any, lm: LanguageModel, hook: str) -> Tensor:
    """The direction [D] of a `SteeringVector` or tensor, after checking that it fits `hook` of the model."""
    x = torch.as_tensor(getattr(vector, "vector", vector)).detach().float().cpu()
    if x.ndim != 1:
        raise SteersmanError(f"a vector to measure is [D], one direction; got shape {list(x.shape)}")
    origin = {"model_name": getattr(vector, "model_name", "") or "", "hook_name": getattr(vector, "hook_name", hook)}
    check_fits(lm, what="this vector", **origin, width=len(x), hook=hook)
    return x
