"""Part 3, the causes: when does SAE-TS beat the plain feature at equal KL, and what decides it?

On the bundled model, whose grammar labels every concept exactly, each suspected cause has an experiment of its own. The
outcome is the concept's words per 100 of continuations at equal KL: the choices are made on every other concept and
reported on the rest. What is chosen there is measured on the study's model as it is.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from steersman import EffectMap, Steerer, collect_effects
from steersman.steer import Effects, EffectsConfig, ridge_fit
from study.common import Results, Study, StudyConfig, chosen
from study.material import Concept
from study.targeting_page import AT, GRAMMAR_FEATURES, page
from study.vectors import best_features, cut, held_out, of_others, spread
from study.ways import (
    Grammar,
    Linear,
    Measured,
    OwnTexts,
    ceiling,
    grammar_topics,
    preference,
    scales_at,
    solved,
)

__all__ = ["Config", "main", "page"]

KLS = (0.03, 0.1, 0.3, 1.0)
"""Nats per token that the measuring vectors cost."""
RANKS = (8, 16, 32, 64)
STILL = (0.01, 0.1, 1.0, 10.0)
PRIORS = (0.3, 1.0, 3.0)
WAYS = ("plain", "own texts", "paper")
"""Groups of the ways that are compared on the study's model, each a row of a concept."""
GRADIENTS: Mapping[str, Mapping[str, Any]] = {"derivative": {}, "natural": {"metric": True}}
STEERED: Mapping[str, Mapping[str, Any]] = {"paper": {}, "steered, no bias": {"bias_weight": 0.0}}
"""Ways to use a map -> settings of `EffectMap.solve`."""


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of this part."""

    concepts: int = 40
    """Concepts of the grammar."""
    vectors: int = 2048
    """Vectors of the learning curve on the bundled model; an eighth of them in the other experiments."""
    rollouts: int = 8
    """Texts for each."""
    gradient_texts: int = 4096
    """Unsteered texts of the learning curve of gradients."""
    prompts: int = 24
    """Stories that are continued for each vector; twice as many in the comparison."""
    new_tokens: int = 24
    """Tokens of each continuation, and of the texts that effects are measured on."""
    budgets: tuple[float, ...] = (0.3, 0.1, 1.0)
    """KL budgets of the comparison."""
    model_vectors: int = 1000
    """Vectors to steer the study's model with."""
    model_concepts: int = 20
    """Concepts of the papers to compare on."""
    model_texts: int = 12
    """Evaluation texts of each side."""


SMALL = {
    "concepts": 4, "vectors": 1280, "rollouts": 2, "gradient_texts": 1024, "prompts": 4, "new_tokens": 8,
    "budgets": (0.3,), "model_vectors": 8, "model_concepts": 2, "model_texts": 4,
}  # fmt: skip


def main(config: Config) -> None:
    """Measure what is not known yet."""
    config = replace(config, **chosen(config, **SMALL))
    results = Results(config, "targeting")
    grammar, rows = Bench(config), {}
    rows |= {f"grammar/{name}": make for name, make in grammar.rows().items()}
    if config.data is not None:
        rows |= {f"model/{name}": make for name, make in Model(config).rows().items()}
    results.planned(rows)
    for name, make in rows.items():
        results.row(name, make)


class Bench:
    """The bundled model, and what is measured of it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.study = Study(
            StudyConfig(
                small=config.small, work=config.work / "grammar", layers=(2,), layer=2, d_sae=GRAMMAR_FEATURES, k=16,
                tokens=min(config.tokens, 400_000), threads=config.threads, device=config.device, seed=config.seed,
            )
        )  # fmt: skip
        self.lm = self.study.lm

    @cached_property
    def place(self) -> Grammar:
        """Where outcomes are measured."""
        topics, c = grammar_topics(self.lm, self.study.sae(), self.config.concepts), self.config
        return Grammar(
            lm=self.lm, sae=self.study.sae(), topics=topics, prompts=c.prompts, tokens=c.new_tokens, seed=c.seed
        )

    @property
    def few(self) -> int:
        """Vectors of most experiments."""
        return self.config.vectors // 8

    def measured(self, name: str, seed: int, vectors: Tensor | str, kl: float, **settings: Any) -> Effects:
        """Effects of steering on texts, at the KL that the vectors cost."""
        given: dict[str, Any] = {
            "scale_rule": "kl", "scale_target": kl, "heldout_texts": 4, "heldout_tokens": 24, "seed": seed,
            "rollouts": self.config.rollouts, "new_tokens": self.config.new_tokens,
            "base_rollouts": 128 if self.config.small else 512, "prompts": self.study.rollout_prompts()[-14:],
            "out": str(self.config.work / "grammar" / name), "scale_limit": 4.0,
        }  # fmt: skip
        texts = self.study.material.held_out
        return collect_effects(self.lm, self.study.sae(), texts, EffectsConfig(**(given | settings)), vectors=vectors)

    def random(self, n: int, seed: int) -> Tensor:
        """n directions [n, D], uniform on the sphere."""
        x = torch.randn(n, self.lm.d_model, generator=torch.Generator().manual_seed(1000 + seed))
        return x / x.norm(dim=1, keepdim=True)

    @cached_property
    def many(self) -> Measured:
        """The effects of the learning curve's vectors, at `AT`; the last eighth is for tests."""
        seed = self.config.seed
        return Measured.of(self.measured("many", seed, self.random(self.config.vectors, seed), AT))

    @property
    def some(self) -> Measured:
        """The first of them: as many as most experiments have."""
        return self.many.first(self.few)

    @property
    def test(self) -> Measured:
        """Vectors that no map is fitted to."""
        return self.many.last(self.few)

    def outcome(self, vectors: Tensor, kl: float = AT) -> list[float | None]:
        """The words per 100 of each concept."""
        return [v if v is None else round(v, 3) for v in self.place.outcome(vectors, kl)]

    def both(self, fitted: Linear) -> dict[str, Any]:
        """What a map predicts of the vectors of `test`, and what its vectors do, with the paper's bias and without."""
        features = self.place.topics.features
        return {
            "r2": fitted.r2(self.test),
            "outcome": {
                "bias 1": self.outcome(fitted.vectors(features, 1.0)),
                "bias 0": self.outcome(fitted.vectors(features, 0.0)),
            },
        }

    def rows(self) -> dict[str, Callable[[], Any]]:
        """The experiments, in their order."""
        c = self.config
        counts = [n for n in (160, 256, 512, 1024, 1792, 3584) if n <= c.vectors - self.few]
        texts = [n for n in (256, 1024, 4096, 16384) if n <= c.gradient_texts]
        found: dict[str, Callable[[], Any]] = {"plain": self.plain}
        found |= {f"gradients {n}": partial(self.gradients, n) for n in texts[::-1]}
        found |= {"own texts": self.own}
        found |= {f"vectors {n}": lambda n=n: self.both(Linear.fit(self.many.first(n))) for n in counts}
        found |= {f"compare {c.budgets[0]:g}": partial(self.compare, c.budgets[0]), "ceiling": self.reliability}
        found |= {f"scale {kl:g}": partial(self.at_scale, kl) for kl in KLS}
        found |= {"target": self.target, "signal": self.signal, "rank": self.rank, "encoder": self.encoder}
        found |= {"normalised": lambda: self.both(Linear.fit(self.some.raw()))}
        found |= {f"ridge {times:g}": partial(self.ridge, times) for times in (0.0, 0.1, 10.0)}
        found |= {f"kind {kind}": partial(self.kind, kind) for kind in ("decoder", "differences")}
        found |= {"prompts": self.with_prompts}
        found |= {f"compare {kl:g}": partial(self.compare, kl) for kl in c.budgets[1:]}
        return found

    def plain(self) -> dict[str, Any]:
        """The features' own directions, and random ones."""
        rows, topics = self.study.sae().W_dec.detach().float(), self.place.topics
        return {
            "concepts": topics.names, "features": topics.features, "writing": topics.writing,
            "outcome": {
                "feature": self.outcome(rows[topics.features]), "writing": self.outcome(rows[topics.writing]),
                "random": self.outcome(self.random(len(topics.names), 1)),
            },
        }  # fmt: skip

    def by_gradients(self, n: int) -> Effects:
        """The gradients of n unsteered texts: the first of those of a larger n."""
        return self.study.measured(
            f"gradients-{n}", n_vectors=n, new_tokens=self.config.new_tokens,
            prompts=self.study.rollout_prompts()[-14:],
        )  # fmt: skip

    def gradients(self, n: int) -> dict[str, Any]:
        """Maps of gradients: the derivative alone, and with the metric."""
        fitted, features = self.by_gradients(n).fit(), self.place.topics.features
        assert fitted.metric is not None
        return {
            "damping": fitted.provenance["damping"] / float(fitted.metric.trace() / fitted.d_in),
            "known": int((fitted.signal >= 2).sum()),
            "outcome": {
                "derivative": self.outcome(solved(fitted, features)),
                "natural": self.outcome(solved(fitted, features, metric=True)),
            },
        }  # fmt: skip

    def own(self) -> dict[str, Any]:
        """Gradients of the texts of the store in which each feature fires most."""
        own = OwnTexts(self.study, self.place.topics.features)
        found = [own.vector(feature) for feature in self.place.topics.features]
        return {
            "signal": [round(v.metadata["signal"], 2) for v in found],
            "outcome": {"texts": self.outcome(torch.stack([v.vector for v in found]))},
        }

    def at_scale(self, kl: float) -> dict[str, Any]:
        """Vectors measured at another KL, twice, so that what the texts' sampling hides is known."""
        seed, x = self.config.seed, self.random(self.few, self.config.seed)
        twice = [self.measured(f"scale-{kl:g}-{i}", seed + i, x, kl) for i in range(2)]
        keep = twice[0].column("reached") & twice[1].column("reached")
        a, b = (Measured.of(one, keep) for one in twice)
        tests = len(a.x) // 8
        fitted = Linear.fit(a.first(len(a.x) - tests))
        return {
            "r2": fitted.r2(a.last(tests)), "ceiling": ceiling(a.last(tests), b.last(tests)), "n": len(a.x) - tests,
            "outcome": {
                f"bias {w:g}": self.outcome(fitted.vectors(self.place.topics.features, w)) for w in (1.0, 0.0)
            },
        }  # fmt: skip

    def reliability(self) -> dict[str, float]:
        """The ceiling of R2 on the test vectors of the learning curve, by measuring them again."""
        x = self.random(self.config.vectors, self.config.seed)[-self.few :]
        again = self.measured("again", self.config.seed + 1, x, AT)
        first = self.measured("many", self.config.seed, self.random(self.config.vectors, self.config.seed), AT)
        keep = first.column("reached")[-self.few :] & again.column("reached")
        whole = torch.zeros(self.config.vectors, dtype=torch.bool)
        whole[-self.few :] = keep
        return {"ceiling": ceiling(Measured.of(first, whole), Measured.of(again, keep))}

    def kind(self, kind: str) -> dict[str, Any]:
        """Other vectors to measure with: as many decoder rows, or differences of two states."""
        if kind == "decoder":
            rows = self.study.sae().W_dec.detach().float()
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: self.few]
            x = rows[order][rows[order].norm(dim=1) > 0]
        else:
            batch = self.lm.encode(self.study.material.held_out[:40])
            h = self.lm.capture(batch, hooks=[self.study.hook()])[self.study.hook()][batch.attention_mask.bool()]
            g = torch.Generator().manual_seed(0)
            a, b = (torch.randint(len(h), (self.few,), generator=g) for _ in range(2))
            x = (h[a] - h[b])[a != b].float()
            x = x[x.norm(dim=1) > 0]
        return self.both(Linear.fit(Measured.of(self.measured(f"kind-{kind}", self.config.seed, x, AT))))

    def ridge(self, times: float) -> dict[str, Any]:
        """The ridge that cross-validation chooses, times a number."""
        best = ridge_fit([(self.some.x, self.some.y)], None, torch.float32).ridge
        return {"ridge": best * times} | self.both(Linear.fit(self.some, best * times))

    def with_prompts(self) -> dict[str, Any]:
        """Features averaged over the prompts too."""
        x = self.random(self.few, self.config.seed)
        found = self.measured("prompts", self.config.seed, x, AT, positions="text")
        features, fitted = self.place.topics.features, Linear.fit(Measured.of(found))
        return {"outcome": {f"bias {w:g}": self.outcome(fitted.vectors(features, w)) for w in (1.0, 0.0)}}

    def rank(self) -> dict[str, Any]:
        """Reduced-rank regression."""
        fitted, features = Linear.fit(self.some), self.place.topics.features
        low = {str(r): fitted.of_rank(r, self.some) for r in RANKS}
        return {
            "r2": {name: one.r2(self.test) for name, one in low.items()},
            "outcome": {name: self.outcome(one.vectors(features, 0.0)) for name, one in low.items()},
        }

    def encoder(self) -> dict[str, Any]:
        """M shrunk towards the SAE's own response to a vector, its encoder."""
        features = self.place.topics.features
        column = Linear.fit(self.some).vectors(features, 0.0)
        own = self.study.sae().W_enc.detach().float().T[features]
        own = own / own.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return {"outcome": {f"{p:g}": self.outcome(column + p * own) for p in PRIORS} | {"alone": self.outcome(own)}}

    def target(self) -> dict[str, Any]:
        """The others kept still, and the general effect worked against in part, on the map of most vectors."""
        fitted = Linear.fit(self.many.first(self.config.vectors - self.few))
        features = self.place.topics.features
        ways = {f"still {mu:g}": fitted.still(features, mu) for mu in STILL}
        ways |= {f"bias {w:g}": fitted.vectors(features, w) for w in (0.0, 0.25, 0.5, 1.0)}
        return {"outcome": {name: self.outcome(x) for name, x in ways.items()}}

    def signal(self) -> dict[str, Any]:
        """How strong each concept's column is against noise, in the map of steering and in that of gradients."""
        features = self.place.topics.features
        steered = ridge_fit([(self.some.x, self.some.y)], None, torch.float32).signal[features]
        natural = self.by_gradients(self.most()).fit().signal[features]
        return {"steered": [round(v, 2) for v in steered.tolist()], "natural": [round(v, 2) for v in natural.tolist()]}

    def most(self) -> int:
        """Texts of the largest map of gradients."""
        return max(n for n in (256, 1024, 4096, 16384) if n <= self.config.gradient_texts)

    def compare(self, kl: float) -> dict[str, Any]:
        """The ways beside each other, on more prompts, for the features that read a concept and those that write it."""
        wide = replace(self.place, prompts=2 * self.config.prompts, seed=self.config.seed + 1)
        topics, rows = self.place.topics, self.study.sae().W_dec.detach().float()
        steered, fitted = Linear.fit(self.some), self.by_gradients(self.most()).fit()
        found: dict[str, Any] = {}
        for aim, features in (("reading", topics.features), ("writing", topics.writing)):
            ways = {
                "feature": rows[features], "paper": steered.vectors(features, 1.0),
                "steered, no bias": steered.vectors(features, 0.0),
                "derivative": solved(fitted, features), "natural": solved(fitted, features, metric=True),
            }  # fmt: skip
            found[aim] = {
                name: [v if v is None else round(v, 3) for v in wide.outcome(x, kl)] for name, x in ways.items()
            }
        return {"outcome": found}


class Model:
    """The study's model."""

    def __init__(self, config: Config) -> None:
        self.config, self.study = config, Study(config)
        self.held = self.study.material.held_out[:6]
        self.tokens = 16 if config.small else 32

    def rows(self) -> dict[str, Callable[[], Any]]:
        """What is measured, the most telling first."""
        topics = self.study.material.concepts[: self.config.model_concepts]
        found: dict[str, Callable[[], Any]] = {
            "effects": self.effects, "one at a time": self.one_at_a_time, "together": self.together,
            "all together": self.all_together,
        }  # fmt: skip
        for concept in topics:
            found |= {f"{concept.name}, {group}": partial(self.concept, concept, group) for group in WAYS}
        return found

    def effects(self) -> dict[str, Any]:
        """The map that the study uses."""
        found = self.study.effects()
        assert found.metric is not None
        return {
            "texts": found.provenance["n_vectors"], "known": int((found.signal >= 2).sum()), "features": found.d_sae,
            "damping": found.provenance["damping"] / float(found.metric.trace() / found.d_in),
        }  # fmt: skip

    def settings(self, **changes: Any) -> dict[str, Any]:
        """How vectors are measured: the paper's rollouts, fewer."""
        rows = self.study.sae().W_dec.detach().float()
        pilot = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:6]]
        unit = pilot / pilot.norm(dim=1, keepdim=True)
        if "scale_target" not in changes:
            found = scales_at(self.study.lm, self.study.sae(), unit, 0.5, self.held, self.tokens)
            changes["scale_target"] = float(found.nanmedian())
        return {
            "vectors": "decoder", "n_vectors": self.config.model_vectors, "rollouts": 16, "new_tokens": 16,
            "base_rollouts": 512, "scale_rule": "fixed", "shard_vectors": 50, "batch_rows": 512, **changes,
        }  # fmt: skip

    def one_at_a_time(self, n: int = 4) -> dict[str, Any]:
        """Seconds of the processor for each vector by a loop: generate, read the texts again, encode."""
        lm, sae = self.study.lm, self.study.sae()
        config = EffectsConfig(**self.settings(), prompts=self.study.rollout_prompts())
        prompts = [config.openings[i % len(config.openings)] for i in range(config.rollouts)]
        rows = sae.W_dec.detach().float()[: n + 1]
        start = 0.0
        for i, row in enumerate(rows):
            if i == 1:
                start = time.process_time()  # the first warms up
            with Steerer(lm).vector(row / row.norm(), scale=config.target, hook=self.study.hook()):
                made = lm.generate(prompts, max_new_tokens=config.new_tokens, do_sample=True, seed=i)
            h = lm.capture(made.tokens, made.attention_mask, hooks=[self.study.hook()])[self.study.hook()]
            sae.encode(h[:, made.prompt_columns :][made.new_mask.bool()]).mean(0)
        return {"vectors": n, "scale": config.target, "seconds": (time.process_time() - start) / n}

    def steered(self) -> Effects:
        """The effects of steering by decoder rows."""
        return self.study.measured("effects-steered", **self.settings())

    def together(self, n: int = 48) -> dict[str, Any]:
        """The same for a few vectors, measured together, with what all share left out."""
        rows = self.study.sae().W_dec.detach().float()[:n]
        settings = self.settings(out=None, base_rollouts=2, vectors="decoder", n_vectors=None)
        config = EffectsConfig(**settings, prompts=self.study.rollout_prompts())
        start = time.process_time()
        collect_effects(self.study.lm, self.study.sae(), (), config, vectors=rows)
        return {"vectors": n, "seconds": (time.process_time() - start) / n}

    def all_together(self) -> dict[str, Any]:
        """All vectors of the paper's way, and how well their map holds."""
        settings = self.settings()
        folder = self.config.work / "effects-steered"
        done = settings["shard_vectors"] * len(list(folder.glob("0*.safetensors")))
        start, wall = time.process_time(), time.monotonic()
        found = self.study.measured(folder.name, **settings)
        seconds, wall = time.process_time() - start, time.monotonic() - wall
        n = len(found)
        fitted = found.fit(heldout=0.1) if n > 1.2 * self.study.lm.d_model + 2 else None
        return {
            "vectors": n, "timed": n - done, "seconds": seconds / max(1, n - done), "minutes": wall / 60,
            "r2": None if fitted is None else fitted.provenance["r2"],
        }  # fmt: skip

    def vectors(self, group: str, feature: int) -> dict[str, Tensor]:
        """The vectors of a group of ways, unit."""
        if group == "plain":
            row = self.study.sae().W_dec[feature].detach().float()
            g = torch.Generator().manual_seed(self.config.seed + feature)
            random = torch.randn(len(row), generator=g)
            found = {"feature": row / row.norm(), "random": random / random.norm()}
            return found | self._solved(self.study.effects(), GRADIENTS, feature)
        if group == "own texts":
            return {"own texts": self.own.vector(feature).vector}
        general = -self.steered_map.M @ self.steered_map.b
        return self._solved(self.steered_map, STEERED, feature) | {"general": general / general.norm()}

    def _solved(self, effects: EffectMap, ways: Mapping[str, Mapping[str, Any]], feature: int) -> dict[str, Tensor]:
        return {name: effects.solve(feature, min_signal=0.0, **given).vector for name, given in ways.items()}

    @cached_property
    def own(self) -> OwnTexts:
        """The vectors of the concepts' features from their own texts."""
        topics = self.study.material.concepts[: self.config.model_concepts]
        return OwnTexts(self.study, [best_features(self.study, concept)[0] for concept in topics])

    @cached_property
    def steered_map(self) -> EffectMap:
        """The map of the vectors that were steered with."""
        return self.steered().fit(heldout=0.0)

    def texts(self, concept: Concept, n: int) -> list[str]:
        """Evaluation texts of a concept."""
        return ["".join(cut(self.study, one, 2 * self.tokens)) for one in spread(held_out(concept).positive, n)]

    def of_others(self, concept: Concept) -> list[str]:
        """As many evaluation texts of other concepts: texts of the same kind, which a vector that likes all such texts
        likes no less."""
        others = of_others(self.study.material, concept, held_out, self.config.model_texts)
        return ["".join(cut(self.study, one, 2 * self.tokens)) for one in others]

    def concept(self, concept: Concept, group: str) -> dict[str, Any]:
        """What the vectors of a group of ways for the concept's best feature prefer, at `AT`."""
        feature = best_features(self.study, concept)[0]
        made = self.vectors(group, feature)
        vectors = torch.stack(list(made.values()))
        scale = scales_at(self.study.lm, self.study.sae(), vectors, AT, self.held, self.tokens)
        positive, others = self.texts(concept, self.config.model_texts), self.of_others(concept)
        found = {
            name: round(preference(self.study.lm, self.study.hook(), v * s, positive, others, 2 * self.tokens), 5)
            for name, v, s in zip(made, vectors, scale)
            if s.isfinite()
        }
        signal = float(self.study.effects().signal[feature])
        return {"concept": concept.name, "feature": feature, "signal": round(signal, 2), "outcome": found}
