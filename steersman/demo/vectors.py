"""The quickstart's vectors: one optimised for a feature's effect, and one of a concept taken apart.

SAE-TS (arXiv 2411.02193) for a feature against the feature's own direction, at equal KL; and the difference of two
concepts' mean states as signed features of the SAE (arXiv 2411.08790).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import stack

from steersman.demo.concept_features import ConceptFeature
from steersman.demo.concepts import CONCEPTS
from steersman.demo.grammar import stories
from steersman.demo.targets import Target, word_rate
from steersman.lm import LanguageModel
from steersman.sae import SAE
from steersman.steer import (
    Decomposition,
    EffectMap,
    Retention,
    Steerer,
    SteeringVector,
    calibrate,
    collect_effects,
    decompose,
    measure_retention,
)
from steersman.steer.effects.map import WEAK
from steersman.steer.measures import generated_tokens, token_nll

log = logging.getLogger(__name__)

BUDGET = 0.5
"""Nats per token of KL(steered || base) that every vector is given."""
WIDEST = 256
"""Width of the residual stream up to which an effect map is measured: a wider one needs more texts than fit here."""
EXAMPLES = 60
"""Stories of each concept that a contrast is made from."""
POSITIVE_SEED, NEGATIVE_SEED = 21, 22


@dataclass(frozen=True, kw_only=True)
class Way:
    """One vector for a target, and what it does to continuations of the prompts."""

    name: str
    """`unsteered`, `feature direction`, `direction of N` (the feature that steering chose) or `SAE-TS`."""
    norm: float
    """Norm of what is added."""
    kl: float
    """KL(steered || base) per token that it was calibrated to, as measured."""
    rate: float
    """Words of the target per 100 generated words."""
    nll: float
    """Nats per generated token under the unsteered model."""
    texts: tuple[str, ...]
    """The continuations, in the order of the prompts."""


@dataclass(frozen=True, kw_only=True)
class Targeted:
    """SAE-TS for a feature against its plain direction."""

    target: Target
    """What was steered towards."""
    feature: int
    """The feature."""
    signal: float
    """Strength of the feature's column in the effect map against noise."""
    n_texts: int
    """Texts that the effect map was fitted on."""
    cosine: float
    """Cosine of the two vectors."""
    ways: list[Way]
    """Unsteered first."""

    def to_text(self) -> str:
        """A table for a terminal."""
        head = f"\n{self.target.name}: SAE-TS for feature {self.feature} against its direction, at equal KL"
        lines = [f"{head} (cosine of the two {self.cosine:.2f})"]
        lines.append(f"  {'':<18} {'norm':>7} {'KL':>6} {'its words per 100':>18} {'nats per token':>15}")
        for way in self.ways:
            lines.append(f"  {way.name:<18} {way.norm:>7.2f} {way.kl:>6.2f} {way.rate:>18.1f} {way.nll:>15.2f}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """The difference between two concepts, taken apart."""

    concept: str
    """What the vector points towards."""
    against: str
    """What it points away from."""
    features: tuple[int, int]
    """The features that name the two."""
    found: Decomposition
    """The vector as signed features."""
    kept: Retention
    """What steering with the reconstruction keeps."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON can hold it."""
        pair = {"concept": self.concept, "against": self.against, "features": list(self.features)}
        return pair | {"decomposition": self.found.to_dict(), "retention": self.kept.to_dict()}

    def to_text(self) -> str:
        """The terms and what they keep, for a terminal."""
        return f"\n{self.concept} less {self.against}, taken apart\n{self.found.to_text()}\n{self.kept.to_text()}"


def target_feature(
    lm: LanguageModel,
    sae: SAE,
    targets: Sequence[Target],
    steered_by: Mapping[str, int],
    unseen: Sequence[str],
    prompts: Sequence[str],
    *,
    n_texts: int,
    max_new_tokens: int,
    seed: int,
) -> Targeted | None:
    """SAE-TS for the feature of a target, its first candidate: the one that fires when the target's words are read.

    `steered_by` are the features that steering chose, by target; among those targets (else among all) the one whose
    feature the effect map knows best is taken, before anything is generated. None if no feature has a signal, or the
    model is too wide for a map measured in a minute.
    """
    if lm.d_model > WIDEST or not targets:
        log.info("no effect map: a model of width %d needs more texts than fit here", lm.d_model)
        return None
    effects = collect_effects(
        lm, sae, n_vectors=n_texts, new_tokens=16, base_rollouts=512, shard_vectors=512, seed=seed
    )
    effect_map = EffectMap.fit(effects)
    known = [t for t in targets if float(effect_map.signal[t.candidates[0]]) >= WEAK]
    known = [t for t in known if t.name in steered_by] or known
    if not known:
        log.info("no target's feature has a signal in an effect map of %d texts", n_texts)
        return None
    target = max(known, key=lambda t: float(effect_map.signal[t.candidates[0]]))
    feature = target.candidates[0]
    vectors = {"feature direction": SteeringVector.of_feature(sae, feature)}
    other = steered_by.get(target.name, feature)
    if other != feature:
        vectors[f"direction of {other}"] = SteeringVector.of_feature(sae, other)
    vectors["SAE-TS"] = effect_map.solve({feature: 1.0})
    return Targeted(
        target=target,
        feature=feature,
        signal=float(effect_map.signal[feature]),
        n_texts=n_texts,
        cosine=vectors["feature direction"].cosine(vectors["SAE-TS"]),
        ways=_compare(lm, vectors, target, unseen, prompts, max_new_tokens, seed),
    )


def _compare(
    lm: LanguageModel,
    vectors: Mapping[str, SteeringVector],
    target: Target,
    unseen: Sequence[str],
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
) -> list[Way]:
    """Each vector at the same KL, and no vector, on the same prompts with the same seed: one batch."""
    found = {name: calibrate(v, lm, texts=unseen, target_kl=BUDGET) for name, v in vectors.items()}
    pushes = {name: calibration.vector for name, calibration in found.items()}
    hook = next(iter(pushes.values())).hook_name
    zero = 0 * next(iter(pushes.values())).vector
    rows = [push for push in (zero, *(v.vector for v in pushes.values())) for _ in prompts]
    with Steerer(lm).vector(stack(rows).to(lm.device), hook=hook):
        made = lm.generate(list(prompts) * (1 + len(pushes)), max_new_tokens=max_new_tokens, do_sample=True, seed=seed)
    nll = token_nll(lm.logits(made.tokens, made.attention_mask), made.tokens)
    real, ways = generated_tokens(made), []
    for i, name in enumerate(("unsteered", *pushes)):
        part = slice(i * len(prompts), (i + 1) * len(prompts))
        ways.append(
            Way(
                name=name,
                norm=pushes[name].norm() if name in pushes else 0.0,
                kl=found[name].search.value if name in found else 0.0,
                rate=word_rate(made.completions[part], target.words),
                nll=float(nll[part][real[part]].mean()),
                texts=tuple(made.texts[part]),
            )
        )
    return ways


def take_apart(
    lm: LanguageModel, sae: SAE, concepts: Sequence[ConceptFeature], first: Sequence[str], unseen: Sequence[str]
) -> Contrast | None:
    """The contrast of a concept of `first` (or any) with another of its group, as at most 16 features.

    The pair is the first one whose concepts are detected by two different features. None where there is no such pair.
    """
    named = {match.concept: match for match in concepts}
    order = [name for name in (*first, *named) if name in named and CONCEPTS[name].group != "name"]
    for concept in order:
        others = [m for m in concepts if CONCEPTS[m.concept].group == CONCEPTS[concept].group]
        against = next((m for m in others if m.feature != named[concept].feature), None)
        if against is not None:
            return _contrast(lm, sae, named, concept, against.concept, unseen)
    return None


def _contrast(
    lm: LanguageModel, sae: SAE, named: Mapping[str, ConceptFeature], a: str, b: str, unseen: Sequence[str]
) -> Contrast:
    hook = sae.cfg.hook_name
    options: dict[str, Any] = {"method": "diffmean", "tokens": "last", "diagnostics": False}
    v = SteeringVector.contrast(
        lm, _ending_with(a, POSITIVE_SEED), _ending_with(b, NEGATIVE_SEED), hook=hook, **options
    )
    v = calibrate(v, lm, texts=unseen, target_kl=BUDGET).vector
    labels = {match.feature: match.concept for match in sorted(named.values(), key=lambda match: match.auroc)}
    labels |= {named[name].feature: name for name in (b, a)}
    found: Decomposition = decompose(v, sae, method="omp", k=16, labels=labels, lm=lm)
    kept = measure_retention(found, lm, unseen, toward=CONCEPTS[a].words, away=CONCEPTS[b].words)
    return Contrast(concept=a, against=b, features=(named[a].feature, named[b].feature), found=found, kept=kept)


def _ending_with(concept: str, seed: int) -> list[str]:
    """Stories up to and with a word of the concept, whose state is then the last one."""
    cut = (story.text[:end] for story in stories(seed) for _, end, name in story.spans if name == concept)
    return list(islice(cut, EXAMPLES))
