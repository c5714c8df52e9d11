"""Part 5: which directions and features find a concept in texts that they were not made from.

AxBench's concept detection (arXiv 2501.17148): the score of a text is the largest activation over the tokens of its
answer, of a direction h . v / |v|, of a feature its own; AUROC of evaluation texts with the concept against texts
without it, and against hard negatives, which use the concept's words in another sense.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steersman.ranking import auroc
from study.common import Results, Study, StudyConfig, chosen
from study.material import Concept
from study.vectors import METHODS, States, best_features, read, sizes, spread, vector

FEATURES = ("feature", "feature_output")
"""Methods whose score is the feature's activation."""


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of this part."""

    concepts: int = 40
    """Concepts to measure."""
    texts: int = 36
    """Evaluation texts of each kind."""
    eval_tokens: int = 64
    """Tokens of a text, of its prompt a third at most."""


def main(config: Config) -> None:
    """Measure what is not known yet, a row for each concept; vectors that are not there are made."""
    config = replace(config, **chosen(config, texts=12))
    results, study = Results(config, "detection"), Study(config)
    results.row("vectors", lambda: asdict(sizes(study)) | {"hook": study.hook()})
    for concept in study.material.concepts[: config.concepts]:
        results.row(f"{concept.group}: {concept.name}", lambda: measured(study, config, concept))


def measured(study: Study, config: Config, concept: Concept) -> dict[str, Any]:
    """How every method tells the evaluation texts of a concept apart."""
    kinds = {"positive": concept.eval_positive, "negative": concept.eval_negative, "hard": concept.eval_hard}
    given = {kind: spread(texts, config.texts) for kind, texts in kinds.items() if texts}
    vectors = {method: vector(study, concept, method) for method in METHODS}
    best, sae = best_features(study, concept), study.sae()
    stats = sae.feature_stats
    assert stats is not None  # as of every SAE that was trained here
    range_of = stats.max_act[best].clamp_min(1e-6)
    directions = {name: v.vector / v.vector.norm() for name, v in vectors.items() if name not in FEATURES}
    directions["feature_row"] = sae.W_dec[best[0]].detach().float().cpu()

    def latents(x: Tensor) -> dict[str, Tensor]:
        """Method -> the activation of each token [N]."""
        codes = sae.encode_features(x.to(sae.device), torch.tensor(best, device=sae.device)).detach().float().cpu()
        found = {name: codes[:, best.index(int(vectors[name].metadata["feature"]))] for name in FEATURES}
        found["features"] = (codes / range_of).sum(1)
        return found | {name: x @ v for name, v in directions.items()}

    pooled: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for kind, texts in given.items():
        states = read(study, texts, config.eval_tokens)
        pooled[kind] = {name: _pooled(states, values) for name, values in latents(states.x).items()}
    fired = [float((pooled[kind]["feature"][0] > 0).float().mean()) for kind in ("positive", "negative")]
    return {
        "texts": {kind: len(texts) for kind, texts in given.items()},
        "methods": {name: _told(name, pooled) for name in pooled["positive"]},
        "feature": {"id": best[0], "auroc_in_training": vectors["feature"].metadata["auroc"][0], "fires_on": fired},
    }


def _pooled(states: States, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [N] the largest over the tokens of each text, and their mean."""
    column = values[:, None]
    return states.largest(column)[:, 0], replace(states, x=column).means()[:, 0]


def _told(method: str, pooled: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """AUROC of positives against negatives by the largest (`auroc`) and the mean activation, and of hard negatives."""
    plus, minus = pooled["positive"][method], pooled["negative"][method]
    told = {"auroc": _auroc(plus[0], minus[0]), "mean": _auroc(plus[1], minus[1])}
    if "hard" in pooled:
        told["hard"] = _auroc(plus[0], pooled["hard"][method][0])
    return {name: round(value, 4) for name, value in told.items()}


def _auroc(plus: Tensor, minus: Tensor) -> float:
    labels = torch.tensor([True] * len(plus) + [False] * len(minus))
    return float(auroc(torch.cat([plus, minus])[:, None], labels[:, None]))
