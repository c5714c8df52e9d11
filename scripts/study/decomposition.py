"""Part 4: vectors of traits taken apart into features, by every method, and what the parts do.

Two vectors of each trait (arXiv 2411.08790 takes apart the first kind): `caa`, from questions with the answer that
shows the trait against the other, at the answer, as many of each answer; and `diffmean`, over the tokens of statements
that somebody with the trait agrees with against those that they do not (of questions with choices: of the choices).
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman import SteeringVector, SteersmanError, decompose
from steersman.ranking import auroc
from steersman.steer import Decomposition, calibrate, measure_retention, steered
from steersman.steer.evaluation import Continuations, likelihoods
from steersman.train import HookView
from study import decomposition_page, report
from study.common import Results, Study, StudyConfig, chosen
from study.material import Example, Trait
from study.vectors import States, read

KINDS = ("caa", "diffmean")
PLAIN = ("encode", "encode_scaled")
"""What asks the encoder about v."""
METHODS = (*PLAIN, "nnls", "omp", "gradient", "lasso", "antipodal", "contrast", "response")
STEERED = ("omp", "encode", "nnls", "encode_scaled")
"""Methods whose reconstructions are steered with, the most telling first."""
RANDOM = 4
"""Random directions whose features are compared with a vector's."""


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of this part."""

    questions: int = 64
    """Questions that a vector is made from."""
    held_out: int = 32
    """Other questions, on which features are looked for."""
    items: int = 16
    """Of those, the first: questions whose answers steering should change."""
    texts: int = 5
    """Further questions, on which predictions are compared while steering."""
    features: int = 32
    """Features that a vector is taken apart into, at most: as many as the SAE has active."""
    kl: float = 0.2
    """KL(steered || base) in nats per token at which a vector is steered with."""
    traits: int = 6
    """Traits to measure."""


def main(config: Config) -> None:
    """Measure what is not known yet: of each vector a row of what it is made of, then rows of what the parts do."""
    config = replace(config, **chosen(config, questions=8, held_out=8, items=8, texts=3, features=8, traits=2))
    results, study = Results(config, "decomposition"), Study(config)
    vectors = [
        TraitVector(study, config, trait, kind) for trait in study.material.traits[: config.traits] for kind in KINDS
    ]
    parts = {f"{v.name}: parts": v.parts for v in vectors}
    effects = {
        f"{v.name}: {m} steered": partial(v.effect, m)
        for kind in KINDS
        for m in ("vector", *STEERED)
        for v in vectors
        if v.kind == kind
    }
    results.planned([*parts, *effects])
    for name, make in (parts | effects).items():
        results.row(name, make)


def sides(trait: Trait, kind: str, questions: Sequence[tuple[str, str, str]]) -> tuple[list[Example], list[Example]]:
    """Texts of both sides that a vector of a kind is made from, or its features are looked for on."""
    if kind == "caa":
        return tuple([Example(prompt=asked(q[0]), text=q[i]) for q in questions] for i in (1, 2))  # pyright: ignore[reportReturnType]
    found: tuple[list[Example], list[Example]] = [], []
    for question, matching, other in questions:
        if choices := re.search(r"^(.*?)\s*Choices:\s*\(A\)(.*?)\(B\)(.*)$", question, flags=re.DOTALL):
            told = {" (A)": choices[2], " (B)": choices[3]}
            for side, letter in zip(found, (matching, other)):
                side.append(Example(prompt=choices[1] + "\n", text=" " + told[letter].strip()))
        elif statement := re.search(r'"(.*)"', question, flags=re.DOTALL):
            found[0 if matching == " Yes" else 1].append(Example(prompt="", text=statement[1]))
        else:
            for side, answer in zip(found, (matching, other)):
                side.append(Example(prompt=question, text=answer))
    return found


def asked(question: str) -> str:
    """A question as the model is asked it; the beginning of a story as it is."""
    return f"Question: {question}\nAnswer:" if "?" in question else question


class TraitVector:
    """A vector of a trait, made from some of its questions and measured on others."""

    def __init__(self, study: Study, config: Config, trait: Trait, kind: str) -> None:
        self.study, self.config, self.trait, self.kind = study, config, trait, kind
        self.name = f"{trait.name}, {kind}"
        self.questions = trait.balanced(config.seed)
        if len(self.questions) < config.questions + config.held_out + config.texts:
            raise SteersmanError(f"{trait.name} has {len(self.questions)} balanced questions: ask for fewer")
        self.texts = [asked(q[0]) for q in self.questions[-config.texts :]]

    def _states(self, start: int, n: int) -> tuple[States, States]:
        plus, minus = sides(self.trait, self.kind, self.questions[start : start + n])
        whole = 3 * (self.study.lm.context_length or 512)  # nothing is cut
        return read(self.study, plus, whole), read(self.study, minus, whole)

    @cached_property
    def trained_on(self) -> tuple[States, States]:
        """States of both sides that the vector is made from."""
        return self._states(0, self.config.questions)

    @cached_property
    def vector(self) -> SteeringVector:
        """The difference of the means: over texts for `caa`, over tokens for `diffmean`. Made once."""
        path = self.study.config.work / "vectors" / f"trait-{self.trait.name}-{self.kind}.safetensors"
        if not path.exists():
            plus, minus = (s.means() if self.kind == "caa" else s.x for s in self.trained_on)
            SteeringVector.of(
                plus.mean(0) - minus.mean(0), hook_name=self.study.hook(), model_name=self.study.lm.name,
                method=self.kind, metadata={"trait": self.trait.name, "questions": self.config.questions},
            ).save(path)  # fmt: skip
        return SteeringVector.load(path)

    def take_apart(self, method: str, vectors: list[Tensor] | None = None, **more: Any) -> list[Decomposition]:
        """The vector, or others of its norm, by a method."""
        sae, k = self.study.sae(), self.config.features
        v = self.vector.vector
        given: dict[str, Any] = {"k": k, "hook": self.study.hook(), "seed": self.config.seed}
        kind = {"encode_scaled": "encode", "gradient": "omp"}.get(method, method)
        if method == "encode_scaled":
            stats = sae.feature_stats
            assert stats is not None  # as of every SAE that was trained here
            given["scale"] = stats.median_norm / float(v.norm())
        elif method == "gradient":
            given["pursuit"] = "gradient"
        elif method == "contrast":
            plus, minus = self.trained_on
            given |= {"positive": plus.x, "negative": minus.x}
        elif method == "response":
            given["activations"] = HookView(self.study.store(), self.study.hook())
        return decompose(vectors or [v], sae, method=kind, **given, **more)

    # What it is made of

    def parts(self) -> dict[str, Any]:
        """What every method finds, and whether its features fire on texts of the trait that the vector did not see."""
        study, config, sae = self.study, self.config, self.study.sae()
        plus, minus = self._states(config.questions, config.held_out)
        labels = torch.tensor([True] * plus.n + [False] * minus.n)[:, None]
        largest = torch.cat([plus.largest_features(sae), minus.largest_features(sae)])
        told = auroc(largest, labels)[:, 0]
        firing = (largest > 0).any(0).nonzero()[:, 0]
        v = self.vector.vector
        along = torch.cat([side.largest((side.x @ (v / v.norm()))[:, None]) for side in (plus, minus)])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {self.name}".encode()))
        random = torch.randn(RANDOM, len(v), generator=generator)
        random *= v.norm() / random.norm(dim=1, keepdim=True)
        found = {method: self.take_apart(method, lm=study.lm)[0] for method in METHODS}
        norms = sae.feature_stats.median_norm if sae.feature_stats is not None else float("nan")
        return {
            "norm": round(float(v.norm()), 3), "norm_of_states": round(float(v.norm()) / norms, 4),
            "auroc": round(float(auroc(along, labels)), 4), "features_that_fire": len(firing),
            "methods": {
                method: self._shares(method, one, found["omp"], random) | _firing(one, told, firing, generator)
                for method, one in found.items()
            },
            "top": {method: _top(found[method], told) for method in ("encode", "omp")},
        }  # fmt: skip

    def _shares(self, method: str, one: Decomposition, omp: Decomposition, random: Tensor) -> dict[str, Any]:
        """What is explained, and how much of what is found is about the vector."""
        marks = [m for m in (1, 2, 4, 8, 16, 32, 64) if m <= len(one)]
        figures: dict[str, Any] = {
            "features": len(one), "explained": one.explained_variance, "zero": one.zero_overlap,
            "negative": one.negative_energy, "like_omp": _overlap(one, omp),
            "explained_random": float(one.null_curve[-1]) if len(one) else 0.0,
            "curve": {m: round(float(one.curve[m - 1]), 4) for m in marks},
        }  # fmt: skip
        if method != "contrast":  # which takes the texts apart, whatever the vector
            opposite, *others = self.take_apart(method, [-self.vector.vector, *random], n_null=2)
            figures["random"] = float(np.mean([_overlap(one, other) for other in others]))
            figures["opposite"] = _overlap(one, opposite)
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}

    # What its parts do

    @cached_property
    def scale(self) -> float:
        """The multiple of the vector that costs the budget on the texts."""
        found = calibrate(self.vector, self.study.lm, texts=self.texts, target_kl=self.config.kl, tolerance=0.05)
        return found.search.scale

    def effect(self, method: str) -> dict[str, Any]:
        """What steering with the vector, or with what a method makes of it, does."""
        study = self.study
        v = self.scale * self.vector
        if method == "vector":
            random = v.random_like(zlib.crc32(f"{self.config.seed} {self.name}".encode()))
            margins = {name: self._margin(one) for name, one in (("base", None), ("vector", v), ("random", random))}
            return {"scale": self.scale} | {name: round(value, 4) for name, value in margins.items()}
        found = self.take_apart(method)[0]
        if not len(found):
            return {"features": 0}
        kept = measure_retention(found, study.lm, self.texts, scale=self.scale, seed=self.config.seed, max_length=128)
        equal = kept["reconstruction, equal KL"]
        rebuilt = found.reconstruction * (equal.norm / found.reconstruction.norm())
        told = SteeringVector.of(rebuilt, hook_name=study.hook(), model_name=study.lm.name)
        return {"features": len(found), "margin": round(self._margin(told), 4)} | {
            one.name: {name: round(getattr(one, name), 4) for name in ("norm", "kl", "retained", "agreement")}
            for one in kept.variants
        }

    def _margin(self, v: SteeringVector | None) -> float:
        """log p(answer that shows the trait) - log p(the other), mean over items, in nats."""
        lm, start = self.study.lm, self.config.questions
        items = [
            Continuations(prompt=asked(question), positive=matching, negative=other)
            for question, matching, other in self.questions[start : start + self.config.items]
        ]

        def arm(_rows: int) -> Any:
            return torch.no_grad() if v is None else steered(v, lm)

        logp, _ = likelihoods(lm, items, arm, 8)
        return float((logp @ np.array([1.0, -1.0])).mean())


def _overlap(a: Decomposition, b: Decomposition) -> float:
    """Jaccard overlap of the features of two decompositions."""
    one, other = set(a.features.tolist()), set(b.features.tolist())
    return len(one & other) / len(one | other) if one | other else 0.0


def _firing(one: Decomposition, told: Tensor, firing: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Mean AUROC with which the features tell texts of the trait from the others, one with a minus the other way
    round; and the same of random features among those that fire on the texts, with the same signs."""
    if not len(one):
        return {"fires": None, "fires_random": None}
    sign = one.coefficients.sign().double()
    drawn = firing[torch.randint(len(firing), (200, len(one)), generator=generator)]
    own, null = (0.5 + ((t.double() - 0.5) * sign).mean(-1) for t in (told[one.features], told[drawn]))
    return {"fires": round(float(own), 4), "fires_random": round(float(null.mean()), 4),
            "above_random": round(float((own > null).double().mean()), 3)}  # fmt: skip


def _top(one: Decomposition, told: Tensor, n: int = 5) -> list[dict[str, Any]]:
    """The largest terms: feature, share of the vector's length, what it promotes, AUROC on held-out texts."""
    order = one.coefficients.abs().argsort(descending=True, stable=True)[:n].tolist()
    return [
        {
            "feature": int(one.features[i]), "coefficient": round(float(one.coefficients[i]) / one.norm, 3),
            "label": one.labels[i], "auroc": round(float(told[one.features[i]]), 3),
        }
        for i in order
    ]  # fmt: skip


def page(results: dict[str, Any]) -> report.Page:
    """The page of this part."""
    return decomposition_page.page(results)
