"""`EffectMap`: what any steering vector does to an SAE's features, and the vector that does what is asked for.

SAE-TS (arXiv 2411.02193). The effect of the unit vector x is y = x M + b. The vector for target weights t is

    s = M t / |M t| - bias_weight M b / |M b|,

the limit of large mu of the ridge solution

    x(mu) = (M M^T + mu I)^-1 M (c t - bias_weight b),    c = |M b| / |M t|,

whose other end, mu = 0, is the pseudo-inverse: the vector whose predicted effect is nearest to c t, noise and all.

A map measured by gradients (`gradients.py`) has no b, and knows what a small push costs: KL per token = 1/2 x^T F x. Of
all vectors that cost the same, the one that raises t most is

    s = (F + damping)^-1 M t.

Shape letters: D width, L latents.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.html import card
from steersman.lm.origin import Origin, check_same_origin
from steersman.sae import SAE
from steersman.steer.effects import map_file
from steersman.steer.effects.config import DEFAULT_TARGETS
from steersman.steer.effects.fit import adam_fit, check_enough, response_fit, ridge_fit, score
from steersman.steer.effects.measured import Baseline, Measured, sae_identity
from steersman.steer.effects.vectors import unit_rows
from steersman.steer.vectors.vector import SteeringVector, VectorLike

_COLUMNS = ("b", "signal", "noise", "r2", "ceiling")
WEAK = 2.0
"""Signal below which a column of M is taken for noise; see `LinearFit.signal`."""

Targets = Mapping[int, float] | Tensor | int | Sequence[int]
"""{feature: weight}, a tensor [L], one feature, or several of weight 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EffectMap:
    """y = x M + b, from unit vectors at a hook point to the features of one SAE."""

    verify: ClassVar[Callable[..., Any]]
    """Steers with a vector and compares what it does with the prediction: `verify_effect`, as the package says."""

    M: Tensor
    """[D, L] fp32."""
    b: Tensor
    """[L] fp32: the effect that steering has in whatever direction."""
    signal: Tensor
    """[L] fp32: strength of each column of M against what noise alone would give it: near 1 without any."""
    noise: Tensor
    """[L] fp32: standard deviation of the residuals."""
    r2: Tensor
    """[L] fp32: R2 on vectors that were held out; NaN where nothing was, or where a feature never moved."""
    ceiling: Tensor
    """[L] fp32: the R2 that exact expected effects would have, given the sampling noise of the measurement."""
    baseline: Baseline
    """The unsteered averages, their standard errors, and the median norm of the states."""
    model_name: str
    """The model."""
    hook_name: str
    """Hook point that vectors are added at."""
    sae: Mapping[str, Any]
    """The SAE whose features these are: see `sae_identity`."""
    provenance: Mapping[str, Any]
    """How it was measured and fitted, and its overall scores."""
    metric: Tensor | None = None
    """[D, D] fp32, F: the KL per token of adding x is x^T F x / 2; None for maps that were measured by steering."""

    @classmethod
    def fit(
        cls,
        effects: Measured,
        *,
        method: str = "closed",
        ridge: float | None = None,
        heldout: float = 0.1,
        seed: int = 0,
        **adam: Any,
    ) -> "EffectMap":
        """Fit a map to measured effects; vectors whose scale was not reached are left out.

        Effects measured by gradients give the response to a small vector, and the `metric` of what it costs; `predict`
        is then the straight line on to a scale of half the median norm of the states.

        `method`: `closed` (ridge regression; `ridge` None chooses by generalised cross-validation) or `adam` (with
        `lr`, `epochs` and `batch_size`). The fraction `heldout` of the vectors is kept for the scores and takes no part
        in the fit. Raises SteersmanError for too few vectors for the map's width.
        """
        if method not in ("closed", "adam"):
            raise SteersmanError(f"unknown method {method!r}: use 'closed' or 'adam'")
        if adam and method != "adam":
            raise SteersmanError(f"{', '.join(adam)} are settings of method='adam'")
        if not 0 <= heldout < 1:
            raise SteersmanError(f"heldout is a fraction of the vectors, from 0 to below 1, got {heldout}")
        if effects.manifest.by_gradients:
            if method != "closed":
                raise SteersmanError("effects measured by gradients are fitted in closed form: use method='closed'")
            return cls._of_gradients(effects, ridge)
        reached = effects.column("reached")
        used = reached.nonzero()[:, 0]
        order = torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))
        test = torch.zeros(len(reached), dtype=torch.bool)
        test[used[order[: round(heldout * len(used))]]] = True
        train = reached & ~test

        def rows(chosen: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            start = 0
            for shard in effects.iterate():
                keep = chosen[start : start + len(shard.vectors)]
                start += len(keep)
                if bool(keep.any()):
                    yield shard.vectors[keep], shard.effect[keep], shard.standard_error[keep]

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            return ((x, y) for x, y, _ in rows(train))

        width = next(iter(effects.iterate())).vectors.shape[1]
        check_enough(int(train.sum()), width, ridge)
        fitted = ridge_fit(pairs(), ridge, torch.float32) if method == "closed" else adam_fit(pairs, seed=seed, **adam)
        scored = score(fitted.M, fitted.b, rows(test))
        notes = {
            "method": method,
            "ridge": fitted.ridge,
            "n_vectors": int(train.sum()),
            "n_heldout": int(test.sum()),
            "n_not_reached": int((~reached).sum()),
            "r2": scored.total if bool(test.any()) else None,
            "r2_ceiling": scored.total_ceiling if bool(test.any()) else None,
            "median_scale": float(effects.column("scale")[train].median()),
            "seed": seed,
            "vectors_hash": effects.manifest.vectors_hash,
            "effects": effects.manifest.settings,
        }
        return cls(
            M=fitted.M.float(),
            b=fitted.b.float(),
            signal=fitted.signal,
            noise=fitted.noise,
            r2=scored.r2,
            ceiling=scored.ceiling,
            baseline=effects.baseline,
            model_name=effects.manifest.model_name,
            hook_name=effects.manifest.hook_name,
            sae=effects.manifest.sae,
            provenance=notes,
        )

    @classmethod
    def _of_gradients(cls, effects: Measured, ridge: float | None) -> "EffectMap":
        tokens = float(effects.column("positions").double().mean())
        found = response_fit(((s.vectors, s.effect) for s in effects.iterate()), tokens, ridge)
        L = found.M.shape[1]
        scale = DEFAULT_TARGETS["norm"] * effects.baseline.median_norm
        unknown = torch.full((L,), math.nan)
        notes = {
            "method": "gradients",
            "ridge": found.natural.ridge,
            "damping": found.damping,
            "n_vectors": effects.manifest.n_vectors,
            "median_scale": scale,
            "vectors_hash": effects.manifest.vectors_hash,
            "effects": effects.manifest.settings,
        }
        return cls(
            M=found.M * scale,
            b=torch.zeros(L),
            signal=found.natural.signal,
            noise=found.natural.noise,
            r2=unknown,
            ceiling=unknown,
            baseline=effects.baseline,
            model_name=effects.manifest.model_name,
            hook_name=effects.manifest.hook_name,
            sae=effects.manifest.sae,
            provenance=notes,
            metric=found.metric.float(),
        )

    @property
    def d_in(self) -> int:
        """D."""
        return self.M.shape[0]

    @property
    def d_sae(self) -> int:
        """L."""
        return self.M.shape[1]

    @property
    def median_scale(self) -> float:
        """The median scale that the vectors were measured at, for gradients half the median norm of the states: a place
        to start from when steering."""
        return float(self.provenance.get("median_scale", 1.0))

    def __repr__(self) -> str:
        r2 = self.provenance.get("r2")
        held = "" if r2 is None else f", held-out R2 {r2:.3f}"
        return f"EffectMap({self.d_in} -> {self.d_sae} features at {self.hook_name} of {self.model_name}{held})"

    def _repr_html_(self) -> str:
        return card(repr(self), text=self.to_text().partition("\n")[2])

    # What it predicts

    def check_sae(self, sae: SAE) -> None:
        """Raise SteersmanError unless `sae` is the one whose features this map is of."""
        found, wanted = sae_identity(sae), self.sae
        if found["hash"] != wanted["hash"]:
            differences = [f"{k} {wanted[k]!r} there, {found[k]!r} here" for k in found if found[k] != wanted.get(k)]
            raise SteersmanError(f"this effect map was made with another SAE: {', '.join(differences)}")

    def direction(self, vector: Tensor | VectorLike) -> Tensor:
        """A vector [D] or `SteeringVector` as a unit direction. Raises SteersmanError for another width, model or hook
        point, and for a zero vector."""
        x = torch.as_tensor(getattr(vector, "vector", vector)).detach().float().cpu()
        if x.ndim not in (1, 2):
            raise SteersmanError(f"vectors are [D] or [n, D], got shape {list(x.shape)}")
        there = Origin(getattr(vector, "model_name", "") or "", getattr(vector, "hook_name", ""), x.shape[-1])
        here = Origin(self.model_name, self.hook_name, self.d_in)
        check_same_origin("this vector", there, "the effect map", here)
        if not bool(x.isfinite().all()) or not bool((x.norm(dim=-1) > 0).all()):
            raise SteersmanError("the vector is zero or not finite: it has no direction")
        return unit_rows(x)

    def predict(self, vector: Tensor | VectorLike) -> Tensor:
        """The effect [L] of a vector (or [n, L] of n rows) at the map's `median_scale`."""
        return self.direction(vector) @ self.M + self.b

    # What brings an effect about

    def targets(self, targets: Targets, min_signal: float = WEAK) -> Tensor:
        """Target weights as t [L] float64: from {feature: weight}, one feature, several of weight 1, or a tensor [L].

        Raises SteersmanError for an id out of range, for no target at all, and for one whose column of M is weaker
        than `min_signal` times noise.
        """
        weights = weights_of(targets, self.d_sae)
        t = torch.zeros(self.d_sae, dtype=torch.float64)
        for feature, weight in weights.items():
            if not 0 <= feature < self.d_sae:
                raise SteersmanError(f"feature {feature} is out of range: this map has features 0 to {self.d_sae - 1}")
            if not math.isfinite(weight):
                raise SteersmanError(f"the weight of feature {feature} must be finite, got {weight}")
            t[feature] = weight
        if not bool(t.any()):
            raise SteersmanError("no target: give at least one feature with a weight that is not 0")
        weak = [j for j in t.nonzero()[:, 0].tolist() if not float(self.signal[j]) >= min_signal]
        if weak:
            shown = ", ".join(f"{j} ({float(self.signal[j]):.2g} times noise)" for j in weak[:5])
            raise SteersmanError(
                f"the effect map holds no signal for feature {shown}; {min_signal:g} is asked for: choose another "
                "feature, measure more rollouts or vectors, use the rotation, or lower min_signal"
            )
        return t

    @cached_property
    def _gram(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [D] and eigenvectors [D, D] of M M^T, float64."""
        gram = torch.zeros(self.d_in, self.d_in, dtype=torch.float64)
        for start in range(0, self.d_sae, 2048):
            part = self.M[:, start : start + 2048].double()
            gram.addmm_(part, part.T)
        w, Q = torch.linalg.eigh(gram)
        return w.clamp_min(0), Q

    @property
    def ridge_unit(self) -> float:
        """The mean eigenvalue of M M^T: what `ridge` in `solve` is large or small against."""
        return float(self.M.double().square().sum()) / self.d_in

    def _times(self, t: Tensor) -> Tensor:
        """M t [D] float64, in pieces."""
        total = torch.zeros(self.d_in, dtype=torch.float64)
        for start in range(0, self.d_sae, 2048):
            part = slice(start, start + 2048)
            total += self.M[:, part].double() @ t[part]
        return total

    @cached_property
    def _damped(self) -> Tensor:
        """The Cholesky factor [D, D] of F + damping, float64."""
        assert self.metric is not None
        F = self.metric.double()
        least = 1e-6 * float(F.trace()) / self.d_in
        damping = max(float(self.provenance.get("damping", 0.0)), least)
        return torch.linalg.cholesky(F + damping * torch.eye(self.d_in, dtype=torch.float64))

    def solve(
        self,
        targets: Targets,
        *,
        ridge: float = math.inf,
        bias_weight: float = 1.0,
        min_signal: float = WEAK,
        metric: bool = False,
    ) -> SteeringVector:
        """The unit vector that raises the target features and as little else as `ridge` allows.

        `ridge` is mu in the page's formulas: infinite is SAE-TS, 0 the pseudo-inverse; `ridge_unit` is the scale
        between. `bias_weight` is the fraction of the general effect b that is worked against (a map of gradients has
        none). `metric` takes the vector that raises the targets most at the KL that the map's metric gives, in place
        of those. Raises SteersmanError for targets as `targets` does, and for a map without a metric.
        """
        if metric:
            if self.metric is None:
                raise SteersmanError("this effect map has no metric: it was measured by steering, not by gradients")
            t = self.targets(targets, min_signal)
            x = torch.cholesky_solve(self._times(t)[:, None], self._damped)[:, 0]
            if not float(x.norm()) > 0:
                raise SteersmanError("the effects of the targets cancel: no direction raises them all")
            return self._vector(x, t, "sae_ts_natural")
        if math.isnan(ridge) or ridge < 0:
            raise SteersmanError(f"ridge must be 0 or more (infinity is SAE-TS), got {ridge}")
        t = self.targets(targets, min_signal)
        b = self.b.double()
        Mt, Mb = self._times(t), self._times(b)
        if not float(Mt.norm()) > 0:
            raise SteersmanError("the effects of the targets cancel: no direction raises them all")
        if math.isinf(ridge):
            x = Mt / Mt.norm()
            x = x - bias_weight * Mb / Mb.norm() if float(Mb.norm()) > 0 else x
        else:
            c = float(Mb.norm() / Mt.norm()) or 1.0
            w, Q = self._gram
            small = w + ridge <= float(w.max()) * len(w) * torch.finfo(torch.float32).eps
            inverse = torch.where(small, torch.zeros_like(w), 1 / (w + ridge).clamp_min(1e-300))
            x = Q @ (inverse * (Q.T @ (c * Mt - bias_weight * Mb)))
        if not float(x.norm()) > 0:
            raise SteersmanError("the target's direction and that of the bias cancel: lower bias_weight")
        method = "sae_ts" if math.isinf(ridge) else "pseudo_inverse" if ridge == 0 else "sae_ts_ridge"
        return self._vector(x, t, method, ridge="inf" if math.isinf(ridge) else ridge, bias_weight=bias_weight)

    def _vector(self, x: Tensor, t: Tensor, method: str, **notes: Any) -> SteeringVector:
        nonzero = t.nonzero()[:, 0].tolist()
        largest = sorted(nonzero, key=lambda j: -abs(float(t[j])))[:64]
        metadata = {
            "targets": {str(j): float(t[j]) for j in largest},
            "n_targets": len(nonzero),
            **notes,
            "median_scale": self.median_scale,
            "sae": dict(self.sae),
        }
        return SteeringVector.of(
            (x / x.norm()).float(),
            hook_name=self.hook_name,
            model_name=self.model_name,
            method=method,
            metadata=metadata,
        )

    # The rotation

    def rotation(self, sae: SAE, min_signal: float = WEAK) -> Tensor:
        """R [D, D] float64, the rotation that brings decoder directions nearest to the vectors that write them: R d_j.

        With the directions m_j that raise each feature (columns of M, or of (F + damping)^-1 M) and unit rows d_j of
        W_dec, sum_j m_j d_j^T = U S V^T and R = U V^T, which maximises sum_j m_j . R d_j over all rotations (orthogonal
        Procrustes). Columns weaker than `min_signal` times noise are
        left out. (The authors' code applies the transpose of R.) Raises SteersmanError for another SAE than the map's.
        """
        self.check_sae(sae)
        good = (self.signal >= min_signal).nonzero()[:, 0]
        if len(good) < self.d_in:
            raise SteersmanError(
                f"only {len(good)} features have a signal of at least {min_signal:g} times noise: too few for a "
                f"rotation of width {self.d_in}; lower min_signal or measure more"
            )
        W = sae.W_dec.detach().double().cpu()
        total = torch.zeros(self.d_in, self.d_in, dtype=torch.float64)
        for part in good.split(2048):
            total.addmm_(unit_rows(self._writers(part).T).T, unit_rows(W[part]))
        U, _, Vh = torch.linalg.svd(total)
        return U @ Vh

    def _writers(self, features: Tensor) -> Tensor:
        """[D, n] float64: the directions that raise each of the features, before they are unit vectors."""
        M = self.M[:, features].double()
        return M if self.metric is None else torch.cholesky_solve(M, self._damped)

    def solve_rotated(
        self, targets: Targets, sae: SAE, *, of: SAE | None = None, min_signal: float = WEAK
    ) -> SteeringVector:
        """R applied to the targets' decoder directions: for features that the map itself never measured well.

        `of` is the SAE that the targets' ids belong to, where it is not the map's: any SAE at the map's hook point.
        """
        source = sae if of is None else of
        weights = weights_of(targets, source.cfg.d_sae)
        for feature in weights:
            source.check_feature(feature)
        if source.cfg.d_in != self.d_in:
            raise SteersmanError(f"the SAE has d_in {source.cfg.d_in}, the effect map has width {self.d_in}")
        t = torch.zeros(source.cfg.d_sae, dtype=torch.float64)
        for feature, weight in weights.items():
            t[feature] = weight
        x = t @ unit_rows(source.W_dec.detach().double().cpu())
        if not float(x.norm()) > 0:
            raise SteersmanError("no target: give at least one feature with a weight that is not 0")
        notes = {} if of is None else {"targets_of": sae_identity(of)}
        return self._vector(self.rotation(sae, min_signal) @ x, t, "sae_ts_rotation", **notes)

    # What is known of it

    def to_text(self) -> str:
        """What it was fitted to and how well it predicts, in a few lines."""
        p, known = self.provenance, self.r2.isfinite()
        lines = [repr(self)]
        if "method" in p:
            what = "texts" if self.metric is not None else "vectors"
            lines.append(f"fitted ({p['method']}, ridge {p.get('ridge', 0):.3g}) to {p.get('n_vectors', '?')} {what}")
        if p.get("r2") is not None and p.get("r2_ceiling") is not None:
            median = float(self.r2[known].median()) if bool(known.any()) else float("nan")
            lines.append(
                f"held out, {p.get('n_heldout', '?')} vectors: R2 {p['r2']:.3f} over all features (exact expected "
                f"effects would have {p['r2_ceiling']:.3f}), median over features {median:.3f}"
            )
        lines.append(
            f"{int((self.signal >= WEAK).sum())} of {self.d_sae} features with a signal above {WEAK:g} x noise"
        )
        return "\n".join(lines)

    # Files

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file with a JSON header, whole or not at all."""
        tensors = {"M": self.M, **{name: getattr(self, name) for name in _COLUMNS}}
        tensors |= {} if self.metric is None else {"metric": self.metric}
        tensors |= {"baseline_mean": self.baseline.mean, "baseline_standard_error": self.baseline.standard_error}
        about = {
            "model_name": self.model_name,
            "hook_name": self.hook_name,
            "sae": dict(self.sae),
            "median_norm": self.baseline.median_norm,
            "provenance": dict(self.provenance),
        }
        map_file.write(Path(path), tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> "EffectMap":
        """Read a file that `save` wrote, or the map in a folder of `steersman effects`. Raises SteersmanError, naming
        the file, when it is not one."""
        tensors, about = map_file.read(Path(path))
        mean, standard_error = tensors.pop("baseline_mean"), tensors.pop("baseline_standard_error")
        baseline = Baseline(mean, standard_error, about.pop("median_norm"))
        return cls(**tensors, baseline=baseline, **about)


def weights_of(targets: Targets, d_sae: int) -> dict[int, float]:
    """Target weights by feature, from what a user writes."""
    if isinstance(targets, Mapping):
        return {int(j): float(w) for j, w in targets.items()}
    if isinstance(targets, Tensor):
        if targets.shape != (d_sae,):
            raise SteersmanError(f"target weights must be [{d_sae}], one for each feature, got {tuple(targets.shape)}")
        return {int(j): float(targets[j]) for j in targets.nonzero()[:, 0]}
    if isinstance(targets, int):
        return {targets: 1.0}
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        return {int(j): 1.0 for j in targets}
    raise SteersmanError(f"targets are {{feature: weight}}, feature ids or a tensor [{d_sae}], got {targets!r}")
