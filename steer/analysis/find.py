"""Which feature stands for what some texts have and others have not.

A text is one sample: each feature's activations on its tokens (the BOS aside, the answer's where there is a prompt) are
pooled, by their largest. Both sides are split in two halves. Each half chooses the features that it tells apart best,
and the other half says how well it does: the held-out AUROC, averaged over the two, with 0.5 from a half whose
`candidates` a feature is not among. Ranked are

1. the features whose held-out AUROC cannot be told from the best one, being less than one standard error of chance
   below it (sqrt((P + Q + 1) / (12 P Q)), of the Mann-Whitney statistic), by their mean difference over the spread,
       effect_j = (mean+ f_j - mean- f_j) / sqrt((var+ f_j + var- f_j) / 2 + (0.05 max f_j)^2)   (Cohen's d);
2. the rest by held-out AUROC, then by effect.

With a few dozen texts many features separate them without an error: AUROC alone then says nothing, and the effect
prefers what is strong on every text of one side and silent on the other. Labels of features take no part.

Sources: AUROC as AxBench's concept detection (arXiv 2501.17148) has it; effect size, Cohen 1988; the output score
beside it, which says whether the feature also steers, arXiv 2505.20063.

Shape letters: N texts, P positive, Q negative, L features.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import torch
from torch import Tensor

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.progress import progress
from steersman.ranking import auroc
from steersman.sae import SAE
from steersman.steer.methods.examples import ExamplesLike
from steersman.steer.scores.api import score_features
from steersman.steer.scores.reading import Labelled, Pool, codes_of, labelled_sides
from steersman.visible import visible

_FLOOR = 0.05  # of a feature's largest activation: a spread that a few texts may show none of
_FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class FindConfig:
    """How features are found from texts that should and should not activate them."""

    top: int = 10
    """Features to find."""
    pool: Pool = "max"
    """How a text's tokens become one number: max (it is somewhere in the text) or mean (it is all over it)."""
    candidates: int = 20
    """Features that each half of the texts chooses, and that the other half measures."""
    output: bool = True
    """Also measure the output score of those found: whether turning them up makes the model say what they write."""
    batch_size: int = 16
    """Texts per pass."""
    max_length: int | None = None
    """Cut texts to this many tokens, BOS included."""
    seed: int = 0
    """Seed of the split in halves, and of the output score's random directions."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("top", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise SteersmanError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class FoundFeature:
    """A feature, and how it tells the two sides apart."""

    feature: int
    """Feature id."""
    auroc: float
    """On texts that did not choose it: the chance that a positive text has more of it than a negative one."""
    difference: float
    """Mean of the pooled activations over the positive texts less that over the negative ones, raw."""
    effect: float
    """The same over the spread within the sides (Cohen's d)."""
    output: float | None
    """Output score (`score_features(..., "output")`); None where it was not measured."""
    label: str
    """Its label; empty where it has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundFeatures(Sequence[FoundFeature]):
    """The features found, best first."""

    features: list[FoundFeature]
    """The features."""
    n_positive: int
    """Texts that should activate them."""
    n_negative: int
    """Texts that should not."""
    standard_error: float
    """Of the AUROC of a feature that knows nothing: what differs by less is a draw."""
    output_by_chance: float | None
    """The best output score of random directions; None where none was measured."""
    no_output: str = ""
    """Why there is no output score; empty where there is one or none was asked for."""

    @overload
    def __getitem__(self, index: int) -> FoundFeature: ...
    @overload
    def __getitem__(self, index: slice) -> list[FoundFeature]: ...
    def __getitem__(self, index: int | slice) -> FoundFeature | list[FoundFeature]:
        return self.features[index]

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[FoundFeature]:
        return iter(self.features)

    def __repr__(self) -> str:
        best = f", best {self[0].feature} (AUROC {self[0].auroc:.3f})" if self else ""
        return f"FoundFeatures({len(self)} from {self.n_positive} + {self.n_negative} texts{best})"

    def to_text(self) -> str:
        """A table, best first."""
        if not self:
            return "no feature is more active on the positive texts than on the negative ones"
        head = f"{self.n_positive} positive and {self.n_negative} negative texts; AUROC on the half that did not choose"
        lines = [head, f"{'feature':>8}  {'AUROC':>6}  {'difference':>10}  {'effect':>6}  {'output':>7}  label"]
        for found in self:
            output = "" if found.output is None else f"{found.output:.3f}"
            row = f"{found.feature:>8}  {found.auroc:>6.3f}  {found.difference:>10.4g}  {found.effect:>6.2f}"
            lines.append(f"{row}  {output:>7}  {visible(found.label)}".rstrip())
        lines.append(f"AUROCs are equal within {self.standard_error:.2f}; among those effect ranks")
        if self.output_by_chance is not None:
            lines.append(f"output: best of random directions {self.output_by_chance:.3f}")
        return "\n".join([*lines, f"no output score: {self.no_output}"] if self.no_output else lines)

    def _repr_html_(self) -> str:
        from steersman.html import fragment

        has_output = self.output_by_chance is not None
        header = ["feature", "label", "AUROC", "difference", "effect", *(["output"] if has_output else [])]
        rows = [
            (
                str(one.feature),
                one.label,
                one.auroc,
                one.difference,
                one.effect,
                "" if one.output is None else one.output,
            )
            for one in self
        ]
        caption = f"{self.n_positive} positive and {self.n_negative} negative texts"
        return fragment("table.html", header=header, rows=rows, caption=caption)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find_features(
    lm: LanguageModel,
    sae: SAE,
    positive: ExamplesLike,
    negative: ExamplesLike,
    config: FindConfig | None = None,
    **overrides: Any,
) -> FoundFeatures:
    """The features that texts which should activate them have and texts which should not have not.

    Args:
        lm: the model.
        sae: its SAE.
        positive: texts that should activate the feature: about 20; also (prompt, answer) pairs, conversations.
        negative: texts that should not: as like the others as can be in all else.
        config: a `FindConfig`; `overrides` are fields of it, over those of `config`.

    Features that are not more active on the positive texts are never found. Raises SteersmanError for fewer than two
    texts a side, and an SAE of another model, hook point or width.
    """
    config = merged(FindConfig, config, overrides)
    hook = check_sae_fits(lm, sae)
    texts = labelled_sides(lm, positive, negative)
    labels = torch.tensor([text.label > 0 for text in texts])
    counts = int(labels.sum()), int((~labels).sum())
    check_sides(*counts)
    pooled = _pooled(lm, sae, hook, texts, config)
    ids, measured = _ranked(pooled, labels, config)
    output, by_chance, missing = _output_scores(lm, sae, ids, config)
    found = [
        FoundFeature(
            feature=feature, **{name: float(values[feature]) for name, values in measured.items()},
            output=output.get(feature), label=sae.labels.text(feature),
        )
        for feature in ids
    ]  # fmt: skip
    return FoundFeatures(
        features=found, n_positive=counts[0], n_negative=counts[1], standard_error=_standard_error(*counts),
        output_by_chance=by_chance, no_output=missing,
    )  # fmt: skip


def check_sides(n_positive: int, n_negative: int) -> None:
    """Raise SteersmanError for too few texts to choose features on one half and to measure them on the other."""
    if min(n_positive, n_negative) < _FEWEST:
        raise SteersmanError(
            f"find needs at least {_FEWEST} texts that should activate the feature and {_FEWEST} that should not, got "
            f"{n_positive} and {n_negative}: about 20 of each say more"
        )


def _pooled(lm: LanguageModel, sae: SAE, hook: str, texts: Sequence[Labelled], config: FindConfig) -> Tensor:
    """[N, L] fp32 on the CPU: each text's features, pooled over its tokens."""
    rows = []
    codes = codes_of(lm, [sae], [hook], texts, batch_size=config.batch_size, max_length=config.max_length)
    for _, (code,) in progress(codes, desc="reading texts", total=len(texts), unit="text"):
        rows.append((code.amax(0) if config.pool == "max" else code.mean(0)).cpu())
    return torch.stack(rows)


def _standard_error(n_positive: int, n_negative: int) -> float:
    return math.sqrt((n_positive + n_negative + 1) / (12 * n_positive * n_negative))


def _ranked(pooled: Tensor, labels: Tensor, config: FindConfig) -> tuple[list[int], dict[str, Tensor]]:
    """The features [N, L] that tell `labels` [N] best, best first, and what was measured of all: each [L]."""
    measured = {
        "auroc": _held_out(pooled, labels, config),
        "difference": pooled[labels].mean(0) - pooled[~labels].mean(0),
        "effect": _effect(pooled, labels),
    }
    known, effect = measured["auroc"], measured["effect"]
    error = _standard_error(int(labels.sum()), int((~labels).sum()))
    found = [j for j in effect.argsort(descending=True, stable=True).tolist() if effect[j] > 0]
    best = max((float(known[j]) for j in found), default=0.0)
    found.sort(key=lambda j: 0.0 if known[j] >= best - error else best - float(known[j]))  # stable: effect decides
    return found[: config.top], measured


def _effect(x: Tensor, labels: Tensor) -> Tensor:
    """Cohen's d [L] of the columns of x [N, L]; 0 for a feature that never fires."""
    plus, minus = x[labels], x[~labels]
    spread = (plus.var(0, correction=0) + minus.var(0, correction=0)) / 2 + (_FLOOR * x.abs().amax(0)).square()
    return torch.where(spread > 0, (plus.mean(0) - minus.mean(0)) / spread.sqrt().clamp_min(1e-30), 0.0)


def _held_out(x: Tensor, labels: Tensor, config: FindConfig) -> Tensor:
    """[L]: the AUROC of each feature on the half that did not choose it, averaged over the two halves."""
    generator = torch.Generator().manual_seed(config.seed)
    first = torch.zeros(len(labels), dtype=torch.bool)
    for side in (labels, ~labels):
        of_side = side.nonzero()[:, 0]
        first[of_side[torch.randperm(len(of_side), generator=generator)][: len(of_side) // 2]] = True
    total = torch.zeros(x.shape[1])
    for half in (first, ~first):
        order = auroc(x[half], labels[half, None])[:, 0].float() + 1e-4 * _effect(x[half], labels[half]).tanh()
        chosen = order.topk(min(config.candidates, len(order))).indices
        measured = torch.full_like(total, 0.5)
        measured[chosen] = auroc(x[~half][:, chosen], labels[~half, None])[:, 0].float()
        total += measured
    return total / 2


def _output_scores(
    lm: LanguageModel, sae: SAE, ids: list[int], config: FindConfig
) -> tuple[dict[int, float], float | None, str]:
    """The output score of features, the best of random directions, and why there is none."""
    if not config.output or not ids:
        return {}, None, ""
    try:
        table = score_features(lm, sae, "output", feature=tuple(ids), seed=config.seed, batch_size=config.batch_size)
    except SteersmanError as error:  # a transcoder, an encoder without an output layer, an SAE without statistics
        return {}, None, str(error)
    column = table["output"]
    known = {feature: float(column.values[feature]) for feature in ids}
    return {feature: value for feature, value in known.items() if math.isfinite(value)}, column.null_max, ""
