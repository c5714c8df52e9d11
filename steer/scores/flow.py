"""`flow`: where a feature comes from, by its decoder row's cosine to those of the SAEs before it.

For d_j at `resid_post` of layer l the largest cosines are looked for among the decoder rows of `resid_post` of layer
l - 1 (or, without its SAE, of the last layer before that has one), `mlp_out` of l and `attn_out` of l, where there are
SAEs of these. A cosine counts where it exceeds
`threshold`, by default the largest that any feature has to random rows or to the source's own rows with their entries
permuted. Which sources count is the origin of the feature: RES, MLP, ATT, mixed, or nowhere. Followed down layer by
layer this gives a graph, whose features can be steered together.

Traps: cosine is not co-activation: the share of a feature's tokens on which its match is active too stands beside it,
and the match's share of all tokens, which is what chance gives; a predecessor of low cosine is not seen at all. Edits
at consecutive layers compound, because the later feature already sees the earlier edit. SAEs trained from one seed
start from the same decoder rows, which is seen long after as cosine: compare SAEs of different seeds.

Source: arXiv 2502.03032. Shape letters: L features of the target, M of a source, K matches kept, D width.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import canonical_hook
from steersman.sae import SAE
from steersman.sae.neighbours import nearest_rows
from steersman.steer.edits import GateLike, ScheduleLike
from steersman.steer.scope import ScopeLike
from steersman.steer.scores.base import Evidence, Score
from steersman.steer.scores.reading import Labelled, codes_of
from steersman.steer.scores.select import FeatureSet
from steersman.steer.scores.table import Column
from steersman.steer.steerer import Steerer
from steersman.steer.steering import Steering

ORIGINS = ("RES", "MLP", "ATT", "mixed", "nowhere")
"""Where a feature may come from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """The features of one SAE whose decoder rows are nearest to those of another."""

    ids: Tensor
    """[L, K] int64: the K nearest features of the source, nearest first."""
    cosines: Tensor
    """[L, K] fp32: their cosines."""
    null: float
    """The level quantile over features of the largest cosine to random rows, or to permuted ones: the larger."""
    null_max: float
    """The largest that any feature has to either."""
    together: Tensor | None = None
    """[L] fp32: of the tokens on which the feature is active, the share on which its nearest is active too."""
    alone: Tensor | None = None
    """[L] fp32: the share of all tokens on which its nearest is active."""


@dataclass(frozen=True, kw_only=True)
class FlowEdge:
    """One step of a feature's history: a feature and a match of it at an earlier hook point."""

    hook: str
    """Hook point of the feature."""
    feature: int
    """The feature."""
    source_hook: str
    """Hook point of the match."""
    source: int
    """The match."""
    cosine: float
    """Cosine of their decoder rows."""
    together: float
    """Share of the feature's tokens on which the match is active too; NaN where no texts were read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFlow:
    """The matches between SAEs at several hook points of a model."""

    matches: Mapping[tuple[str, str], Match]
    """(hook point, source's hook point) -> matches."""
    threshold: float | None
    """Cosine from which a match counts; None for each match's own `null_max`."""
    saes: Mapping[str, SAE]
    """Hook point -> SAE."""

    def __repr__(self) -> str:
        return f"FeatureFlow({len(self.saes)} SAEs, {len(self.matches)} pairs)"

    def bar(self, hook: str, source: str) -> float:
        """The cosine above which a match of these hook points counts."""
        return self.matches[hook, source].null_max if self.threshold is None else self.threshold

    def sources(self, hook: str) -> list[str]:
        """The hook points that features at `hook` are matched to."""
        return [source for target, source in self.matches if target == hook]

    def origins(self, hook: str) -> list[str]:
        """For each feature at `hook` one of `ORIGINS`. Raises SteersmanError where it has no earlier SAE."""
        if not self.sources(hook):
            raise SteersmanError(f"no SAE lies before {hook}: where its features come from is not known")
        counts = {s: self.matches[hook, s].cosines[:, 0] > self.bar(hook, s) for s in self.sources(hook)}
        named = []
        for j in range(self.saes[hook].cfg.d_sae):
            found = [_class(source) for source, over in counts.items() if bool(over[j])]
            named.append("nowhere" if not found else found[0] if len(found) == 1 else "mixed")
        return named

    def trace(self, hook: str, feature: int) -> list[FlowEdge]:
        """The graph below a feature: every match that counts, of it, of its matches, and so on down."""
        self._check(hook, feature)
        edges, waiting, seen = [], [(hook, feature)], {(hook, feature)}
        while waiting:
            target, j = waiting.pop(0)
            for source in self.sources(target):
                match = self.matches[target, source]
                cosine, i = float(match.cosines[j, 0]), int(match.ids[j, 0])
                if cosine <= self.bar(target, source):
                    continue
                together = math.nan if match.together is None else float(match.together[j])
                edges.append(
                    FlowEdge(hook=target, feature=j, source_hook=source, source=i, cosine=cosine, together=together)
                )
                if (source, i) not in seen:
                    seen.add((source, i))
                    waiting.append((source, i))
        return edges

    def feature_set(
        self,
        hook: str,
        feature: int,
        strength: float,
        *,
        mode: str = "scale",
        over_layers: Literal["constant", "linear", "exponential"] = "constant",
        growth: float = 0.0,
        units: str = "raw",
    ) -> FeatureSet:
        """A feature and all that it comes from, to steer together.

        `mode` scale multiplies each by `strength` (0 removes, 1 changes nothing to the last bit). For strengths that
        are amounts, `over_layers` says how they go with the layer, d layers from the feature's own (d <= 0): constant,
        `strength (1 + growth d)`, or `strength exp(growth d)`.
        """
        nodes = {(hook, feature): None}
        nodes |= {(edge.source_hook, edge.source): None for edge in self.trace(hook, feature)}
        top, strengths = _layer(hook), {}
        for where, j in nodes:
            d = _layer(where) - top
            factor = {"constant": 1.0, "linear": 1 + growth * d, "exponential": math.exp(growth * d)}.get(over_layers)
            if factor is None:
                raise SteersmanError(f"unknown over_layers {over_layers!r}: use constant, linear or exponential")
            if mode in ("scale", "project_out") and factor != 1:
                raise SteersmanError(f"mode {mode!r} takes one factor for all layers: over_layers is for amounts")
            strengths.setdefault(where, {})[j] = strength * factor
        return FeatureSet(strengths=strengths, mode=mode, units=units)

    def steer(
        self,
        st: Steerer,
        hook: str,
        feature: int,
        strength: float,
        *,
        mode: str = "scale",
        over_layers: Literal["constant", "linear", "exponential"] = "constant",
        growth: float = 0.0,
        units: str = "raw",
        scope: ScopeLike = "all",
        gate: GateLike = 1.0,
        schedule: ScheduleLike | None = None,
        include_bos: bool = False,
    ) -> Steering:
        """One context that steers by a feature and all that it comes from, at all their hook points: `feature_set` with
        the SAEs of this flow. `scope`, `gate` and `schedule` as for `Steerer.features`."""
        chosen = self.feature_set(
            hook, feature, strength, mode=mode, over_layers=over_layers, growth=growth, units=units
        )
        where: dict[str, Any] = {"scope": scope, "gate": gate, "schedule": schedule, "include_bos": include_bos}
        return chosen.steer(st, list(self.saes.values()), **where)

    def _check(self, hook: str, feature: int) -> None:
        if hook not in self.saes:
            raise SteersmanError(f"no SAE at {hook} was given; there are {', '.join(self.saes)}")
        self.saes[hook].check_feature(feature)


_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def predecessors(hook: str, held: Iterable[str]) -> list[str]:
    """The hook points among `held` whose SAEs a feature at `hook` is matched to: for a `resid_post` the last one before
    it and what its own block adds, for others none.

    >>> held = [f"blocks.{layer}.hook_{point}" for layer in range(3) for point in ("mlp_out", "resid_post")]
    >>> predecessors("blocks.2.hook_resid_post", held)
    ['blocks.1.hook_resid_post', 'blocks.2.hook_mlp_out']
    >>> predecessors("blocks.2.hook_resid_post", ["blocks.0.hook_resid_post"])
    ['blocks.0.hook_resid_post']
    >>> predecessors("blocks.2.hook_mlp_out", held)
    []
    """
    held = list(held)
    if _RESIDUAL.fullmatch(hook) is None:
        return []
    layer = _layer(hook)
    earlier = [one for one in held if _RESIDUAL.fullmatch(one) and _layer(one) < layer]
    own = [f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.hook_attn_out"]
    return [*sorted(earlier, key=_layer)[-1:], *(one for one in own if one in held)]


def _class(source: str) -> str:
    return {"hook_resid_post": "RES", "hook_mlp_out": "MLP", "hook_attn_out": "ATT"}[source.rpartition(".")[2]]


def _layer(hook: str) -> int:
    return int(hook.split(".")[1])


@torch.no_grad()
def feature_flow(
    saes: Sequence[SAE],
    *,
    lm: LanguageModel | None = None,
    texts: Sequence[str] | None = None,
    threshold: float | None = None,
    top: int = 5,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
) -> FeatureFlow:
    """Match the features of SAEs at several hook points to those at the hook points before.

    `top` matches of each are kept; the nearest alone says where a feature comes from. With `lm` and `texts` the
    co-activation is measured as well. Raises SteersmanError for SAEs that record no hook point, two at one, and where
    none lies before another.
    """
    held = {_named(sae): sae for sae in saes}
    if len(held) != len(saes):
        raise SteersmanError(f"two SAEs are of one hook point: give one for each of {', '.join(held)}")
    pairs = [(hook, source) for hook in held for source in predecessors(hook, held)]
    if not pairs:
        raise SteersmanError(
            f"none of {', '.join(held)} lies right before another: flow goes from the last resid_post before, "
            "mlp_out and attn_out of the same layer to resid_post"
        )
    matches = {
        (hook, source): match_rows(held[hook].W_dec, held[source].W_dec, top=top, level=level, seed=seed + number)
        for number, (hook, source) in enumerate(pairs)
    }
    if lm is not None and texts is not None:
        matches = _with_rates(lm, held, matches, texts, batch_size, max_length)
    return FeatureFlow(matches=matches, threshold=threshold, saes=held)


def _named(sae: SAE) -> str:
    if not sae.cfg.hook_name:
        raise SteersmanError("an SAE that records no hook point cannot be placed among others")
    return canonical_hook(sae.cfg.hook_name)


def match_rows(target: Tensor, source: Tensor, *, top: int = 5, level: float = 0.95, seed: int = 0) -> Match:
    """The rows of `source` [M, D] nearest to those of `target` [L, D] by cosine, with the null of `Match`."""
    if target.shape[1] != source.shape[1]:
        raise SteersmanError(f"decoder rows of width {target.shape[1]} and {source.shape[1]} cannot be compared")
    a, b = (F.normalize(rows.detach().float().cpu(), dim=1) for rows in (target, source))
    generator = torch.Generator().manual_seed(seed)
    random = F.normalize(torch.randn(b.shape, generator=generator), dim=1)
    order = torch.rand(b.shape, generator=generator).argsort(dim=1)
    by_chance = [nearest_rows(a, rows, 1).cosines[:, 0] for rows in (random, b.gather(1, order))]
    ids, cosines = nearest_rows(a, b, top)
    return Match(
        ids=ids, cosines=cosines, null=max(float(part.quantile(level)) for part in by_chance),
        null_max=max(float(part.max()) for part in by_chance),
    )  # fmt: skip


def _with_rates(
    lm: LanguageModel,
    saes: Mapping[str, SAE],
    matches: Mapping[tuple[str, str], Match],
    texts: Sequence[str],
    batch_size: int,
    max_length: int | None,
) -> dict[tuple[str, str], Match]:
    """The matches with how often each feature and its nearest are active together, and the nearest by itself."""
    first = int(lm.bos_token_id is not None)
    read = [Labelled(tokens=tuple(lm.token_ids(text, bos=True)), first=first, label=0.0) for text in texts]
    hooks, n = list(saes), 0
    alone = {hook: torch.zeros(sae.cfg.d_sae) for hook, sae in saes.items()}
    both = {pair: torch.zeros(len(match.ids)) for pair, match in matches.items()}
    for _, codes in codes_of(lm, list(saes.values()), hooks, read, batch_size=batch_size, max_length=max_length):
        active = {hook: (code != 0).cpu() for hook, code in zip(hooks, codes)}
        n += len(codes[0])
        for hook, rows in active.items():
            alone[hook] += rows.sum(0)
        for (hook, source), match in matches.items():
            both[hook, source] += (active[hook] & active[source][:, match.ids[:, 0]]).sum(0)
    return {
        (hook, source): replace(
            match, together=both[hook, source] / alone[hook], alone=alone[source][match.ids[:, 0]] / max(n, 1)
        )
        for (hook, source), match in matches.items()
    }


class Flow(Score):
    """The largest cosine of a feature's decoder row to those of the SAEs right before it."""

    name = "flow"
    source = "arXiv 2502.03032"
    unit = "cosine to the nearest earlier decoder row"
    needs = ("saes",)
    settings = ("seed",)

    def measure(self, evidence: Evidence, at: int) -> Column:
        hook = evidence.hooks[at]
        held = dict(zip(evidence.hooks, evidence.saes))
        near = predecessors(hook, held)
        wanted, level = evidence.saes[at].cfg.d_sae, evidence.config.level
        values = torch.full((wanted,), math.nan)
        if not near:
            return evidence.column(self, at, values, n=0, sources=[])
        matches = [match_rows(held[hook].W_dec, held[s].W_dec, level=level, seed=evidence.config.seed) for s in near]
        values = torch.stack([match.cosines[:, 0] for match in matches]).amax(0)
        null = torch.full((wanted,), max(match.null for match in matches))
        largest = max(match.null_max for match in matches)
        n = sum(held[s].cfg.d_sae for s in near)
        return evidence.column(self, at, values, n=n, null=null, null_max=largest, sources=near)
