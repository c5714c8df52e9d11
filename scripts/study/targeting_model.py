"""Part 3, targeting on the study's model: the ways for a concept's feature, and what measuring effects takes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from steersman import EffectMap, Steerer, collect_effects
from steersman.steer import Effects, EffectsConfig
from study.common import MORE_TEXTS, Study, StudyConfig
from study.material import Concept
from study.targeting_words import AT
from study.vectors import best_features, cut, held_out, of_others, spread
from study.ways import OwnTexts, preference, scales_at

WAYS = ("plain", "own texts", "paper", "more texts")
"""Groups of the ways that are compared, each a row of a concept."""
GRADIENTS: Mapping[str, Mapping[str, Any]] = {"derivative": {}, "natural": {"metric": True}}
STEERED: Mapping[str, Mapping[str, Any]] = {"paper": {}, "steered, no bias": {"bias_weight": 0.0}}
"""Ways to use a map -> settings of `EffectMap.solve`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(StudyConfig):
    """Settings of what is measured on the study's model."""

    model_vectors: int = 1000
    """Vectors to steer the study's model with."""
    model_concepts: int = 20
    """Concepts of the papers to compare on."""
    model_texts: int = 12
    """Evaluation texts of each side."""


class Model:
    """The study's model."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.study = config, Study(config)
        self.held = self.study.material.held_out[:6]
        self.tokens = 16 if config.small else 32

    def rows(self) -> dict[str, Callable[[], Any]]:
        """What is measured, the most telling first."""
        topics = self.study.material.concepts[: self.config.model_concepts]
        found: dict[str, Callable[[], Any]] = {
            "effects": self.effects, "one at a time": self.one_at_a_time, "together": self.together,
            "all together": self.all_together, "more effects": partial(self.effects, MORE_TEXTS),
        }  # fmt: skip
        for concept in topics:
            found |= {f"{concept.name}, {group}": partial(self.concept, concept, group) for group in WAYS}
        return found

    def effects(self, times: int = 1) -> dict[str, Any]:
        """The map that the study uses, or the one of more texts."""
        found = self.study.effects(times)
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
        if group == "more texts":
            return self._solved(self.study.effects(MORE_TEXTS), {"derivative, more": {}}, feature)
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
        effects = self.study.effects(MORE_TEXTS if group == "more texts" else 1)
        signal = float(effects.signal[feature])
        return {"concept": concept.name, "feature": feature, "signal": round(signal, 2), "outcome": found}
