"""Which feature stands for which annotation of tokens, with what precision and recall.

For every feature, threshold and annotation the tokens are counted where the feature is active (f > threshold) and the
annotation holds. Threshold and feature are searched for on one half of the sequences, by F1, and what they reach is
reported on the other half: searched and reported on the same tokens, the best of many thousand features always looks
good. Tokens of one sequence are not independent, so halves are of whole sequences, and of whole families where
sequences have one. Beside each finding stand the base rate (the precision of a feature that is always active) and the
same search for labels rotated within their sequences, which keeps how long annotations are and undoes where they lie.

Source: arXiv 2502.09135 (UniProt annotations of at least 100 tokens on ESM-2; thresholds .01, .1 and 1; relevant from
.80 on), with its authors' statistics.

Shape letters: T thresholds, L features, C annotations, N tokens.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steersman.config import check_types, merged
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.origin import check_sae_fits
from steersman.sae import SAE
from steersman.steer.effects.measured import sae_identity
from steersman.steer.scores.reading import Labelled, codes_of
from steersman.steer.scores.table import Column, FeatureScores


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """One sequence and what its tokens are annotated with."""

    tokens: tuple[int, ...]
    """Token ids, the BOS (and an encoder's other special tokens) included."""
    annotations: Mapping[str, Sequence[bool]]
    """Annotation -> whether it holds, for each token."""
    family: str | None = None
    """What it is related to: sequences of one family are never on both sides of the split."""

    @classmethod
    def of_spans(
        cls, lm: LanguageModel, text: str, spans: Sequence[tuple[int, int, str]], *, family: str | None = None
    ) -> "Annotated":
        """A text with annotations as (start, end, name) in characters: a token that shares a character with a span
        carries its name. Raises SteersmanError for a tokenizer that does not say where its tokens lie."""
        tokens = lm.token_ids(text, bos=True)
        try:
            offsets = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        except (NotImplementedError, KeyError, TypeError) as error:
            raise SteersmanError(
                "this tokenizer does not say which characters a token holds: give token ids and a label for each"
            ) from error
        first = int(bool(tokens[:1]) and len(tokens) > len(offsets))  # a BOS, or an encoder's [CLS]
        named: dict[str, list[bool]] = {name: [False] * len(tokens) for _, _, name in spans}
        for start, end, name in spans:
            for i, (left, right) in enumerate(offsets):
                if max(left, start) < min(right, end):
                    named[name][first + i] = True
        return cls(tokens=tuple(tokens), annotations=named, family=family)


@dataclass(frozen=True, kw_only=True)
class AnnotationConfig:
    """How features are held against annotations."""

    thresholds: tuple[float, ...] = (0.01, 0.1, 1.0)
    """A feature counts as active above this activation, in `units`; searched over."""
    units: Literal["raw", "max_act"] = "raw"
    """What thresholds are in: activations, or fractions of the feature's largest activation in training."""
    min_tokens: int = 100
    """Annotations of fewer tokens, in either half, are left out."""
    relevant: float = 0.8
    """Precision and recall from which a feature is called relevant."""
    shuffles: int = 5
    """Rotations of the labels that make the null."""
    batch_size: int = 16
    """Sequences per pass."""
    max_length: int | None = None
    """Cut sequences to this many tokens, BOS included."""
    seed: int = 0
    """Seed of the halves and of the rotations."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.thresholds or min(self.thresholds) < 0:
            raise SteersmanError("thresholds must be activations of 0 or more, at least one")


@dataclass(frozen=True, kw_only=True)
class AnnotationFinding:
    """The feature that stands for an annotation best, chosen on one half and measured on the other."""

    annotation: str
    """The annotation."""
    feature: int
    """The feature."""
    threshold: float
    """The activation above which it counts as active."""
    precision: float
    """Share of the tokens on which it is active that are annotated; 0 where it is never active."""
    recall: float
    """Share of the annotated tokens on which it is active."""
    f1: float
    """Their harmonic mean."""
    searched_f1: float
    """The F1 on the half that it was chosen on: what an honest report is lower than."""
    base_rate: float
    """Share of all tokens that are annotated: the precision of chance."""
    null_f1: float
    """The largest F1 that the same search reaches, on the other half, for rotated labels; NaN for none."""
    relevant: bool
    """Whether precision and recall both reach the configuration's `relevant`."""
    n_tokens: int
    """Annotated tokens of the half it was measured on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotationTable:
    """Counts of every feature against every annotation, and the best feature of each."""

    findings: list[AnnotationFinding]
    """Best first, by F1 on the half that was not searched."""
    names: tuple[str, ...]
    """The annotations, in the order of the columns."""
    thresholds: tuple[float, ...]
    """T."""
    hits: Tensor
    """[2, T, L, C] int64: tokens where the feature is active and the annotation holds, in either half."""
    active: Tensor
    """[2, T, L] int64: tokens where the feature is active."""
    annotated: Tensor
    """[2, C] int64: annotated tokens."""
    n_tokens: tuple[int, int]
    """Tokens of each half."""
    left_out: Mapping[str, int]
    """Annotations with too few tokens, and how many they have."""
    model_name: str
    """The model."""
    hook_name: str
    """The hook point."""
    sae: Mapping[str, object]
    """The SAE."""

    def __repr__(self) -> str:
        n = sum(found.relevant for found in self.findings)
        return f"AnnotationTable({len(self.names)} annotations, {n} with a relevant feature)"

    def precision(self, half: int) -> Tensor:
        """[T, L, C] float64; 0 for a feature that is never active."""
        return self.hits[half].double() / self.active[half][..., None].clamp_min(1)

    def recall(self, half: int) -> Tensor:
        """[T, L, C] float64."""
        return self.hits[half].double() / self.annotated[half].clamp_min(1)

    def to_text(self, n: int = 20) -> str:
        """A line for each annotation."""
        head = (
            f"{'annotation':<24}{'feature':>8}{'above':>7}{'precision':>11}{'recall':>8}{'F1':>7}{'null':>7}{'base':>8}"
        )
        lines = [f"features at {self.hook_name} of {self.model_name}, on sequences that were not searched", head]
        for found in self.findings[:n]:
            mark = " relevant" if found.relevant else ""
            lines.append(
                f"{found.annotation:<24}{found.feature:>8}{found.threshold:>7.3g}{found.precision:>11.3f}"
                f"{found.recall:>8.3f}{found.f1:>7.3f}{found.null_f1:>7.3f}{found.base_rate:>8.4f}{mark}"
            )
        return "\n".join(lines)

    def scores(self) -> FeatureScores:
        """The F1 of every feature with each annotation, at the threshold that the first half chose, on the second: a
        table to select from, with the score `annotation:NAME`."""
        f1 = [_f1(self.hits[half], self.active[half], self.annotated[half]) for half in (0, 1)]
        at = f1[0].amax(1).argmax(0)  # [C]: the threshold of each annotation
        columns = {}
        for c, name in enumerate(self.names):
            found = next(entry for entry in self.findings if entry.annotation == name)
            values = f1[1][at[c], :, c]
            columns[f"annotation:{name}"] = Column(
                values=values, null=torch.full_like(values, float("nan")), null_max=found.null_f1, unit="F1",
                n=self.n_tokens[1], level=1.0, about={"threshold": self.thresholds[int(at[c])]},
            )  # fmt: skip
        return FeatureScores.of(columns, model_name=self.model_name, hook_name=self.hook_name, sae=dict(self.sae))


def _f1(hits: Tensor, active: Tensor, annotated: Tensor) -> Tensor:
    """[T, L, C] float64: 2 hits / (active + annotated)."""
    return 2 * hits.double() / (active[..., None] + annotated).clamp_min(1)


def halves(sequences: Sequence[Annotated], seed: int) -> list[int]:
    """The half, 0 or 1, of each sequence: families whole, about as many sequences in each.

    Raises SteersmanError where all are of one family.
    """
    groups = [f"\0{i}" if entry.family is None else entry.family for i, entry in enumerate(sequences)]
    sizes = Counter(groups)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -sizes[group])  # the largest first, so that the halves come out alike
    held, side = [0, 0], {}
    for group in order:
        side[group] = int(held[1] < held[0])
        held[side[group]] += sizes[group]
    if min(held) == 0:
        raise SteersmanError("annotations are searched on one half, measured on the other: give at least two families")
    return [side[group] for group in groups]


@torch.no_grad()
def annotation_table(
    lm: LanguageModel,
    sae: SAE,
    sequences: Sequence[Annotated],
    *,
    config: AnnotationConfig | None = None,
    **settings: object,
) -> AnnotationTable:
    """Hold every feature of an SAE against every annotation of the sequences' tokens; the BOS does not count.

    `**settings` are fields of `AnnotationConfig`. One pass; memory goes with features times annotations. Raises
    SteersmanError for labels that are not one for each token, for one family alone, and where no annotation has enough
    tokens.
    """
    config = merged(AnnotationConfig, config, settings)
    hook = check_sae_fits(lm, sae)
    names, left_out, side = _checked(lm, sequences, config)
    T, L, C, R = len(config.thresholds), sae.cfg.d_sae, len(names), 1 + config.shuffles
    hits = torch.zeros(2, R, T, L, C, dtype=torch.int64)
    active = torch.zeros(2, T, L, dtype=torch.int64)
    annotated = torch.zeros(2, C, dtype=torch.int64)
    n_tokens = [0, 0]
    above = torch.tensor(config.thresholds)[:, None] * _unit(sae, config)  # [T, 1] or [T, L]
    draw = random.Random(config.seed)
    first = int(lm.bos_token_id is not None)
    texts = [Labelled(tokens=entry.tokens, first=first, label=0.0) for entry in sequences]
    for i, (code,) in codes_of(lm, [sae], [hook], texts, batch_size=config.batch_size, max_length=config.max_length):
        code, half = code.cpu(), side[i]
        labels = _labels(sequences[i], names)[first : first + len(code)]
        turned = [labels] + [labels.roll(draw.randrange(max(len(labels), 1)), 0) for _ in range(config.shuffles)]
        stacked = torch.cat(turned, dim=1).double()  # [N, R C]
        for t in range(T):
            on = code > above[t]
            active[half, t] += on.sum(0)
            found = (on.double().T @ stacked).round().long().view(L, R, C)
            hits[half, :, t] += found.movedim(1, 0)
        annotated[half] += labels.sum(0)
        n_tokens[half] += len(code)
    findings = [_finding(c, names, hits, active, annotated, n_tokens, config) for c in range(C)]
    findings.sort(key=lambda found: -found.f1)
    return AnnotationTable(
        findings=findings, names=names, thresholds=config.thresholds, hits=hits[:, 0], active=active,
        annotated=annotated, n_tokens=(n_tokens[0], n_tokens[1]), left_out=left_out,
        model_name=lm.name, hook_name=hook, sae=sae_identity(sae),
    )  # fmt: skip


def _checked(
    lm: LanguageModel, sequences: Sequence[Annotated], config: AnnotationConfig
) -> tuple[tuple[str, ...], dict[str, int], list[int]]:
    """The annotations with enough tokens, those with too few, and the half of each sequence."""
    for i, entry in enumerate(sequences):
        for name, labels in entry.annotations.items():
            if len(labels) != len(entry.tokens):
                raise SteersmanError(
                    f"sequence {i} has {len(entry.tokens)} tokens (BOS included) and {len(labels)} labels for {name!r}"
                )
    side = halves(sequences, config.seed)
    first = int(lm.bos_token_id is not None)
    counts: dict[str, list[int]] = {}
    for entry, half in zip(sequences, side):
        for name, labels in entry.annotations.items():
            counts.setdefault(name, [0, 0])[half] += sum(map(bool, labels[first : config.max_length]))
    names = tuple(sorted(name for name, each in counts.items() if min(each) >= config.min_tokens))
    if not names:
        raise SteersmanError(
            f"no annotation has {config.min_tokens} tokens in both halves: give more sequences, or set min_tokens"
        )
    return names, {name: sum(each) for name, each in counts.items() if name not in names}, side


def _unit(sae: SAE, config: AnnotationConfig) -> Tensor:
    """What a threshold of 1 is, in activations: [1], or [L] (infinite for a dead feature)."""
    if config.units == "raw":
        return torch.ones(1)
    if sae.feature_stats is None:
        raise SteersmanError("units='max_act' need the SAE's feature statistics: run `steersman features` on it first")
    largest = sae.feature_stats.max_act.cpu()
    return torch.where(largest > 0, largest, torch.full_like(largest, float("inf")))


def _labels(entry: Annotated, names: Sequence[str]) -> Tensor:
    """[tokens, C] bool."""
    none = [False] * len(entry.tokens)
    return torch.tensor([[bool(flag) for flag in entry.annotations.get(name, none)] for name in names]).T


def _finding(
    c: int,
    names: Sequence[str],
    hits: Tensor,
    active: Tensor,
    annotated: Tensor,
    n_tokens: Sequence[int],
    config: AnnotationConfig,
) -> AnnotationFinding:
    def searched(r: int) -> tuple[int, int, float, float]:
        f1 = _f1(hits[0, r, :, :, c : c + 1], active[0], annotated[0, c : c + 1])[..., 0]  # [T, L]
        t, j = divmod(int(f1.argmax()), f1.shape[1])
        measured = _f1(hits[1, r, t, j : j + 1, c : c + 1], active[1, t, j : j + 1], annotated[1, c : c + 1])
        return t, j, float(f1[t, j]), float(measured)

    t, j, before, f1 = searched(0)
    hit = float(hits[1, 0, t, j, c])
    precision = hit / max(int(active[1, t, j]), 1)
    recall = hit / int(annotated[1, c])
    by_chance = [searched(r)[3] for r in range(1, hits.shape[1])]
    return AnnotationFinding(
        annotation=names[c], feature=j, threshold=config.thresholds[t], precision=precision, recall=recall, f1=f1,
        searched_f1=before, base_rate=float(annotated[1, c]) / n_tokens[1],
        null_f1=max(by_chance) if by_chance else float("nan"),
        relevant=min(precision, recall) >= config.relevant, n_tokens=int(annotated[1, c]),
    )  # fmt: skip
