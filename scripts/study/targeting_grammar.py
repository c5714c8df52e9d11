"""Part 3, the causes on the bundled model: an experiment of each, judged by the grammar's words at equal KL."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from steersman import collect_effects
from steersman.steer import Effects, EffectsConfig, ridge_fit
from study.common import Study, StudyConfig
from study.targeting_words import AT, GRAMMAR_FEATURES
from study.ways import Grammar, Linear, Measured, OwnTexts, ceiling, grammar_topics, solved

KLS = (0.03, 0.1, 0.3, 1.0)
"""Nats per token that the measuring vectors cost."""
RANKS = (8, 16, 32, 64)
STILL = (0.01, 0.1, 1.0, 10.0)
PRIORS = (0.3, 1.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class GrammarConfig(StudyConfig):
    """Settings of the experiments."""

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


class Bench:
    """The bundled model, and what is measured of it."""

    def __init__(self, config: GrammarConfig) -> None:
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
