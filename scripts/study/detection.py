"""Part 5: which directions and features find a concept in texts that they were not made from.

AxBench's concept detection (arXiv 2501.17148): the score of a text is the largest activation over the tokens of its
answer, of a direction h . v / |v|, of a feature its own; AUROC of evaluation texts with the concept against texts
without it, and against hard negatives, which use the concept's words in another sense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.ranking import auroc
from steersman.steer import Estimate, bootstrap
from study import report
from study.common import PAPERS, Results, Study, StudyConfig, chosen
from study.material import Concept
from study.vectors import METHODS, States, best_features, read, sizes, spread, training, vector

FEATURES = ("feature", "feature_output")
"""Methods whose score is the feature's activation."""
VECTORS, FEW = "vectors", " (few texts)"
"""The row that says how the vectors were made; and how rows of `from_few` end."""
TITLES = {
    "diffmean": "difference of the means", "caa": "CAA", "probe": "probe", "reft_r1": "ReFT-r1",
    "ssv": "supervised steering vector", "feature": "feature by AUROC", "features": "8 features by AUROC, summed",
    "feature_output": "feature by output score", "feature_row": "the feature's decoder row as a direction",
    "pca": "PCA of paired texts", "pca_tokens": "PCA of all tokens", "random": "random direction",
}  # fmt: skip
"""What the page calls the methods."""
LEADING, BEHIND = ("diffmean", "probe", "reft_r1"), ("feature", "pca_tokens")
"""What the paper finds to detect well, and what it finds behind."""


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of this part."""

    concepts: int = 40
    """Concepts to measure."""
    texts: int = 36
    """Evaluation texts of each kind."""
    eval_tokens: int = 64
    """Tokens of a text, of its prompt a third at most."""
    few: int = 12
    """Concepts for which the difference of the means is made from what ReFT-r1 is trained on, too."""


def main(config: Config) -> None:
    """Measure what is not known yet, a row for each concept; vectors that are not there are made."""
    config = replace(config, **chosen(config, texts=12))
    results, study = Results(config, "detection"), Study(config)
    concepts = {f"{concept.group}: {concept.name}": concept for concept in study.material.concepts[: config.concepts]}
    few = {f"{name}{FEW}": concept for name, concept in list(concepts.items())[: config.few]}
    results.planned([VECTORS, *concepts, *few])
    results.row(VECTORS, lambda: asdict(sizes(study)) | {"hook": study.hook()})
    for name, concept in concepts.items():
        results.row(name, partial(measured, study, config, concept))
    for name, concept in few.items():
        results.row(name, partial(from_few, study, config, concept))


def from_few(study: Study, config: Config, concept: Concept) -> dict[str, float]:
    """How the difference of the means of the texts that ReFT-r1 is trained on tells evaluation texts apart."""
    size, texts = sizes(study), training(concept)
    plus, minus = (
        read(study, spread(side, size.trained), size.trained_tokens) for side in (texts.positive, texts.negative)
    )
    v = plus.x.mean(0) - minus.x.mean(0)
    found = {}
    for kind, side in (("positive", concept.eval_positive), ("negative", concept.eval_negative)):
        states = read(study, spread(side, config.texts), config.eval_tokens)
        found[kind] = {"diffmean": _pooled(states, states.x @ (v / v.norm()))}
    return _told("diffmean", found)


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


# The page


def page(results: dict[str, Any]) -> report.Page:
    """The page of this part."""
    rows = {name: row for name, row in results["rows"].items() if name != VECTORS and not name.endswith(FEW)}
    few = {name.removesuffix(FEW): row for name, row in results["rows"].items() if name.endswith(FEW)}
    made, settings = results["rows"][VECTORS], results["settings"]
    known = {kind: {m: column(rows, m, kind) for m in TITLES} for kind in ("auroc", "hard", "mean")}
    means = {kind: {m: estimate(values) for m, values in found.items()} for kind, found in known.items()}
    order = sorted(TITLES, key=lambda m: -means["auroc"][m].mean)
    behind = {m: estimate(known["auroc"][m] - known["auroc"]["diffmean"]) for m in TITLES if m != "diffmean"}
    over = f"{len(rows)} concepts"
    main_table = report.Table(
        caption=f"AUROC of texts with a concept, mean over {over} with the 95 % interval over concepts; 0.5 is chance. "
        "The last column is the difference to the difference of the means, concept by concept.",
        header=["method", "against texts without it", "against hard negatives", "by the mean over tokens",
                "less difference of the means"],
        rows=[
            [TITLES[m], *(report.cell(means[kind][m]) for kind in ("auroc", "hard", "mean")),
             report.cell(behind.get(m), signed=True)]
            for m in order
        ],
    )  # fmt: skip
    feature = [row["feature"] for row in rows.values()]
    fires = [estimate(np.array([one["fires_on"][i] for one in feature])) for i in (0, 1)]
    trained = estimate(np.array([one["auroc_in_training"] for one in feature]))
    explained = report.Table(
        caption=f"The feature of the best AUROC, means over {over}: what it reaches on the training texts that it was "
        "chosen by and on evaluation texts, and on how many of those it fires at all.",
        header=["AUROC in training", "AUROC on evaluation texts", "fires on texts with the concept", "without it"],
        rows=[[report.cell(trained), report.cell(means["auroc"]["feature"]),
               *(report.cell(one, percent=True) for one in fires)]],
    )  # fmt: skip
    shown = {
        "against texts without it": {TITLES[m]: means["auroc"][m] for m in order},
        "against hard negatives": {TITLES[m]: means["hard"][m] for m in order},
    }
    figure = report.Figure(
        name="auroc", alt=f"AUROC of every method with its interval over {over}, against both kinds of negatives",
        draw=lambda: report.intervals(shown, "AUROC", at=0.5),
    )  # fmt: skip
    return report.Page(
        name="detection", title="Concepts told from texts", tables=[main_table, explained], figures=[figure],
        asked="Which direction or feature finds a concept in texts that it was not made from? AxBench "
        "([arXiv 2501.17148](https://arxiv.org/abs/2501.17148)) found the difference of the means, a probe and ReFT-r1 "
        "to detect well, and an SAE's feature, which came with its label, and PCA behind them.",
        how=HOW.format(
            n=len(rows), source=SOURCES[settings["data"] == PAPERS], texts=settings["texts"],
            tokens=settings["eval_tokens"], hook=made["hook"],
            positives=made["positives"], negatives=made["negatives"], training_tokens=made["tokens"],
            trained=made["trained"], trained_tokens=made["trained_tokens"], epochs=made["epochs"],
            batch=made["batch"], reft_rate=made["reft_r1_rate"], ssv_rate=made["ssv_rate"],
        ),
        means=meaning(means["auroc"], means["hard"], known["auroc"], trained, fires) + "\n\n" + as_few(rows, few),
        change=CHANGE, answer=answer(known["auroc"]),
    )  # fmt: skip


HOW = """\
{n} concepts of {source}. A text is a request and its answer, cut to {tokens} tokens, at `{hook}`. Its score is the
largest activation over the tokens of the answer, as in the paper: of a direction `h . v / |v|`, of a feature its own
activation; beside it the mean over the tokens. Up to {texts} evaluation texts of each kind: with the concept, without
it, and hard negatives, which use its words in another sense (few, so that their column is wide).

Directions and features come from training texts alone: {positives} with the concept and {negatives} of its set's
without any, {training_tokens} tokens each. The feature is the one whose largest activation in a text has the best AUROC
there; of the best 8 that of the highest output score
([arXiv 2505.20063](https://arxiv.org/abs/2505.20063)); all 8, each as a fraction of its largest activation, summed.
ReFT-r1 and the supervised vector are trained on {trained} texts a side of {trained_tokens} tokens, {epochs} times,
in steps of {batch}, at learning rates of {reft_rate:g} and {ssv_rate:g} (the paper: 72 a side, whole, at 0.01, with
which so few steps hardly move the second). PCA is shown twice: the first component of all tokens about
their mean, which is the paper's, and that of the differences of paired texts. Its sign, as that of the probe, is the
difference of the means'."""
CHANGE = """\
Longer texts, and ReFT-r1 trained on as many as the paper has: it saw a fraction of what the others read. A wider SAE,
or one of a larger model, whose features may be nearer to one concept each. Features chosen as the paper's were, by a
label that was written before, instead of by AUROC on training texts. Another layer: these are of the middle of the
model. The negatives are of all kinds of text (prose, code, mathematics), so that part of what is found for concepts of
code is that a text is code; the paper takes training negatives of the concept's own kind."""
SOURCES = ("the story grammar", "AxBench's concept10 sets")


def column(rows: Mapping[str, Any], method: str, kind: str) -> np.ndarray:
    """[concepts]: a figure of a method; NaN where a concept has no such texts."""
    return np.array([row["methods"][method].get(kind, np.nan) for row in rows.values()])


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean over concepts with its interval."""
    found = bootstrap(values)
    return Estimate(mean=np.nan, low=np.nan, high=np.nan, n=0) if found is None else found


def ahead(known: Mapping[str, np.ndarray], a: str, b: str) -> int:
    """1 where method a detects better than b beyond chance over concepts, -1 where worse, else 0."""
    return report.side(estimate(known[a] - known[b]))


def answer(known: Mapping[str, np.ndarray]) -> str:
    """The paper's ordering, in one sentence."""
    pairs = [(a, b, ahead(known, a, b)) for a in LEADING for b in BEHIND]
    if all(sign > 0 for *_, sign in pairs):
        return (
            "The paper's ordering is found again: the difference of the means, the probe and ReFT-r1 each detect "
            "concepts better than the best feature and than PCA."
        )
    found = [f"{TITLES[a]} over {TITLES[b]}" for a, b, sign in pairs if sign > 0]
    tied = [f"{TITLES[a]} and {TITLES[b]}" for a, b, sign in pairs if sign == 0]
    turned = [f"{TITLES[b]} over {TITLES[a]}" for a, b, sign in pairs if sign < 0]
    parts = [f"found again: {report.listed(found)}"] if found else []
    parts += [f"not told apart: {report.listed(tied)}"] if tied else []
    parts += [f"the other way round: {report.listed(turned)}"] if turned else []
    return f"Of the paper's ordering: {'; '.join(parts)}."


def as_few(rows: Mapping[str, Any], few: Mapping[str, Any]) -> str:
    """Whether what ReFT-r1 lacks is texts."""
    names = [name for name in few if name in rows]
    if not names:
        return ""
    means, reft, all_ = (
        np.array([found[name] for name in names])
        for found in (
            {name: row["auroc"] for name, row in few.items()},
            *({name: row["methods"][m]["auroc"] for name, row in rows.items()} for m in ("reft_r1", "diffmean")),
        )
    )
    lead, lost = estimate(reft - means), estimate(means - all_)
    return (
        f"ReFT-r1 saw less than the others: from the same few short texts the difference of the means reaches "
        f"{report.cell(estimate(means))} over {len(names)} of the concepts ({report.cell(lost, signed=True)} to what "
        f"it reaches from all), and ReFT-r1 {report.cell(estimate(reft))}: "
        + {
            1: "given the same texts, training adds to it.",
            0: "given the same texts they are not told apart.",
            -1: "given the same texts, training takes away from it.",
        }[report.side(lead)]
    )


def meaning(
    means: Mapping[str, Estimate], hard: Mapping[str, Estimate], known: Mapping[str, np.ndarray], trained: Estimate,
    fires: Sequence[Estimate],
) -> str:  # fmt: skip
    """What the figures mean."""
    best = max(means, key=lambda m: means[m].mean)
    parts = [
        answer(known),
        f"Best on average is {TITLES[best]} ({report.cell(means[best])}); a random direction reaches "
        f"{report.cell(means['random'])}.",
    ]
    lost = trained.mean - means["feature"].mean
    feature = (
        f"The feature of the best AUROC reaches {report.number(trained.mean)} on the training texts and "
        f"{report.number(means['feature'].mean)} on evaluation texts: {report.number(lost)} is lost to the choice "
        "among thousands, and to whatever else differs between the two sets. "
        if lost > 0.005
        else f"The feature keeps on evaluation texts the AUROC of {report.number(trained.mean)} that it was chosen by. "
    )
    feature += (
        f"It fires on {report.number(fires[0].mean, percent=True)} of the texts with the concept and on "
        f"{report.number(fires[1].mean, percent=True)} of those without"
    )
    several = ahead(known, "features", "feature")
    feature += (
        ", and eight features together do better: no single one has all that the SAE tells about a concept."
        if several > 0
        else ", and eight features together are not told apart from it."
        if several == 0
        else ", and eight features together do worse: the others add noise."
    )
    row = ahead(known, "feature_row", "feature")
    feature += " Its decoder row, read as a direction, detects " + (
        "better than its activation: the encoder's threshold cuts away some of what the direction tells."
        if row > 0
        else "worse than its activation: the encoder suppresses what else lies along the direction."
        if row < 0
        else "with an AUROC that is not told apart from its activation's."
    )
    parts.append(feature)
    against = ahead(known, "feature_output", "feature")
    parts.append(
        "Choosing by the output score "
        + {
            -1: "costs detection: features that write a concept are not those that read it.",
            0: "is not told apart from the other choice in detection.",
            1: "helps detection.",
        }[against]
    )
    pca = ahead(known, "pca", "pca_tokens")
    parts.append(
        f"PCA of all tokens reaches {report.cell(means['pca_tokens'])}: what varies most among tokens is not the "
        "concept. "
        + (
            "Of paired differences it finds more, as what the pairs have in common is the concept."
            if pca > 0
            else "Of paired differences what it finds is not told apart."
            if pca == 0
            else "Of paired differences it finds less still."
        )
    )
    close = [m for m in means if m != best and report.side(estimate(known[best] - known[m])) == 0]
    if close:
        parts.append(f"Not told apart from the best over these concepts: {report.listed([TITLES[m] for m in close])}.")
    easier = hard[best].mean - means[best].mean
    parts.append(
        f"Against hard negatives {TITLES[best]} reaches {report.cell(hard[best])}, "
        + ("less than" if easier < -0.01 else "more than" if easier > 0.01 else "as much as")
        + " against texts without the concept."
    )
    return "\n\n".join(parts)
