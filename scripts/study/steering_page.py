"""The page of `study.steering`, from its results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from steersman.steer import Estimate, bootstrap
from study.common import MORE_TEXTS
from study.report import Figure, Page, Table, bounds, cell, curves, intervals, listed, number, side

NAMES = {
    "feature": "SAE feature (AUROC)", "feature_output": "SAE feature (output score)", "sae_ts": "SAE-TS",
    "sae_ts_more": f"SAE-TS, {MORE_TEXTS} x texts", "own_texts": "SAE-TS, own texts", "rotation": "SAE-TS rotation",
    "fgaa": "FGAA", "fgaa_rows": "FGAA's features", "diffmean": "diffmean", "caa": "CAA", "pca": "PCA",
    "probe": "probe", "reft_r1": "ReFT-r1",
    "ssv": "supervised vector", "random": "random", "prompting": "prompting",
}  # fmt: skip
"""What tables call a way, in their order."""
DETAILS = {
    "concept": "concept, 0 to 2", "fluency": "fluency, 0 to 2", "words": "words in 100", "likelihood": "likelihood",
    "nll": "NLL", "repeated": "repeated", "kl": "KL", "kl_written": "KL written", "relevance": "on the request",
}  # fmt: skip
GROUPS = {
    "": ("prompting",),
    "vectors": ("feature", "feature_output", "diffmean", "caa", "pca", "probe", "reft_r1", "ssv", "random"),
    "targeted": ("sae_ts", "rotation", "fgaa"), "own": ("own_texts",), "more": ("sae_ts_more",),
    "rows": ("fgaa_rows",),
}  # fmt: skip
"""What the rows of a topic are called after its name, and the ways that are measured in each."""
BEST = "best scale"
UNSTEERED = "unsteered"
TOLERANCE = 0.1
"""By which fraction a KL may miss its budget."""
Point = Mapping[str, Any]
Points = dict[str, dict[str, Point]]
"""Topic -> scale (a budget as text, or `BEST`) -> figures, of one way."""


class Found:
    """The results by way, topic and scale: topics whose rows are all there, or all that have vectors while those of
    SAE-TS are missing everywhere."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        rows, self.settings = results["rows"], results["settings"]
        self.about, self.budgets = rows["about"], [f"{budget:g}" for budget in results["settings"]["budgets"]]
        every = [name for name in rows if name != "about" and f"{name} vectors" in rows]
        groups = [group for group in GROUPS if any(f"{name} {group}".strip() in rows for name in every)]
        whole = [name for name in every if all(f"{name} {group}".strip() in rows for group in groups)]
        self.topics = whole or every
        self.own = {topic: rows[topic] for topic in self.topics}
        self.ways: dict[str, Points] = {name: {} for name in NAMES}
        self.missing: dict[str, int] = {}
        for topic in self.topics:
            for group in GROUPS:
                row = rows.get(f"{topic} {group}".strip(), {"methods": {}})
                for method, points in row["methods"].items():
                    self.ways[method][topic] = self._scales([self._point(point) for point in points])
                for method in row.get("missing", {}):
                    self.missing[method] = self.missing.get(method, 0) + 1
        self.ways = {name: points for name, points in self.ways.items() if points}
        self.unsteered = {topic: self._point(own["unsteered"]) for topic, own in self.own.items()}

    def _point(self, values: Sequence[Any]) -> Point:
        return dict(zip(self.about["columns"], values))

    def _scales(self, points: list[Point]) -> dict[str, Point]:
        if points[0]["budget"] is None:
            return {BEST: points[0]}
        best = max(points, key=lambda point: point["chosen_by"])
        return dict(zip(self.budgets, points)) | {BEST: best}

    def of(self, way: str, scale: str, figure: str = "overall", kind: str = "") -> Estimate | None:
        """Mean over topics; None for what was not measured."""
        values = [self.value(way, topic, scale, figure) for topic in self.topics if topic.startswith(kind)]
        return bootstrap([np.nan if value is None else value for value in values])

    def value(self, way: str, topic: str, scale: str, figure: str) -> float | None:
        if way == UNSTEERED:
            return self.unsteered[topic][figure]
        point = self.ways.get(way, {}).get(topic, {}).get(scale)
        return None if point is None else point[figure]

    def plain(self, figure: str = "overall", kind: str = "") -> Estimate | None:
        """The unsteered model's."""
        return bootstrap([point[figure] for topic, point in self.unsteered.items() if topic.startswith(kind)])

    def less(self, way: str, other: str, scale: str, figure: str = "overall", kind: str = "") -> Estimate | None:
        """The mean over topics of what one way has more than another."""
        both = [
            (self.value(way, topic, scale, figure), self.value(other, topic, scale, figure))
            for topic in self.topics
            if topic.startswith(kind)
        ]
        return bootstrap([a - b for a, b in both if a is not None and b is not None])

    def over_prompts(self, way: str, scale: str) -> Estimate | None:
        """The overall score, the interval over prompts: of each the mean over the topics that it was given for."""
        by_prompt: dict[tuple[str, int], list[float]] = {}
        for topic, scales in self.ways[way].items():
            if scale in scales:
                for prompt, score in zip(self.own[topic]["asked"], scales[scale]["each"]):
                    by_prompt.setdefault((topic.split()[0], prompt), []).append(score)
        return bootstrap([float(np.mean(scores)) for scores in by_prompt.values()])

    def missed(self) -> tuple[int, int]:
        """Scales whose KL is further than a tenth from the budget, and all."""
        points = [p for scales in self.ways.values() for one in scales.values() for k, p in one.items() if k != BEST]
        return sum(abs(p["kl"] / p["budget"] - 1) > TOLERANCE for p in points), len(points)

    def at_the_largest(self, way: str) -> float:
        """The share of topics whose chosen scale is the largest."""
        scales = self.ways[way].values()
        return float(np.mean([one[BEST]["budget"] == self.settings["budgets"][-1] for one in scales]))


def page(results: Mapping[str, Any]) -> Page:
    """The page."""
    found = Found(results)
    goals = sum(topic.startswith("goal") for topic in found.topics)
    n = f"{goals} goals and {len(found.topics) - goals} concepts"
    return Page(
        name="steering",
        title="Ways to steer, at equal cost",
        asked=ASKED,
        how=how(found, n),
        tables=[overall_table(found, n), best_table(found), differences(found), *details(found)],
        figures=[score_figure(found), best_figure(found)],
        means=means(found),
        change=CHANGE.format(last=found.budgets[-1], tokens=found.settings["new_tokens"]),
        answer=answer(found),
        not_run=[f"{NAMES[m]} on {k} of {len(found.topics)} topics, which gave it no vector"
                 for m, k in found.missing.items()],
    )  # fmt: skip


ASKED = """\
Which way of steering shows a concept best for what it costs: an SAE's feature, a vector that aims at a feature (SAE-TS,
its rotation, FGAA), a vector from contrasted texts (diffmean, CAA, PCA, a probe), a trained one (ReFT-r1, a supervised
steering vector), or an instruction in the prompt? And does SAE-TS beat the plain feature at equal KL?"""
CHANGE = """\
A larger model, which follows vectors and instructions otherwise; completions longer than {tokens} tokens; a judge in
place of the classifier; an SAE trained on more tokens, whose features are finer; more texts for the effect
map; prompts that a language model writes for each concept, as AxBench's are; scales beyond a KL of {last}."""


def how(found: Found, n: str) -> str:
    """What was done."""
    s, about = found.settings, found.about
    auroc, others = (cell(bootstrap([own[k] for own in found.own.values()])) for k in ("auroc", "auroc_others"))
    half, (missed, scales) = s["prompts"] // 2, found.missed()
    return f"""\
Topics: {n}, the goals of SAE-TS (arXiv 2411.02193) and the concepts of AxBench (arXiv 2501.17148). Each vector is made
from a topic's training texts (of a goal: every other contrast prompt) at layer {s["layer"]}. SAE-TS and its rotation
aim at the feature that is best by AUROC, FGAA at several. The effect map is the study's, measured by gradients of
unsteered texts' likelihood in place of the paper's regression on steered texts: SAE-TS and FGAA are the directions in
which small vectors raise the targets most (the page on targeting compares such choices). SAE-TS of own texts takes the
gradients of the cached texts in which the feature fires most in place of those of what the model writes. "FGAA's
features" is the sum of the decoder rows of the features that FGAA aims at, by its weights: beside FGAA it says what the
map is worth for the same target. Vectors are
scaled to KL(steered || unsteered) of {listed(found.budgets)} nats per token on the same {about["neutral_tokens"]}
tokens of neutral texts, within {number(TOLERANCE, percent=True)} ({missed} of {scales} searches ended further off).
Prompting puts one sentence with the concept's name before the text and has the KL that it has. The model continues
{s["prompts"]} prompts a topic (requests in its chat template for concepts, openings for goals) by {s["new_tokens"]}
tokens, greedily; the prompt's last token and what follows are steered. At its best scale a way has, topic by topic,
the KL whose overall score is highest on {half} of the prompts; every figure here is of the other
{s["prompts"] - half}.

Measures, none of which asks a judge:

- **Likelihood**: rise of log p of held-out texts with the concept less that of texts of other concepts, nats per
  token ({s["items"]} texts of each side, {s["item_tokens"]} tokens of each).
- **Words in 100**: of the completion, those among the 20 most characteristic of the training texts, against as many
  texts without the topic and as many of other topics (z-scored log-odds, stop words out).
- **Classifier**: logistic regression on embeddings ({about["embedding"]}) of the same texts, cut as short as
  completions; on held-out texts its AUROC is {auroc} against texts without the topic and {others} against texts of
  other topics, the means over topics.
- **Cost**: KL on neutral texts and on what is written, negative log-likelihood (NLL) of what is written under the
  unsteered model, the share of its 4-grams that it wrote before.
- **Overall**, AxBench's harmonic mean, in place of whose judge's marks stand
  concept = 2 P and fluency = 2 min(1, e^({about["natural_nll"]:.2f} - NLL)) (1 - repeated): P is the classifier's
  probability, {about["natural_nll"]:.2f} the NLL of neutral texts. It is 0 where either is 0. AxBench's third mark, for
  following the instruction, has nothing here that could stand for its judge; the cosine of the embeddings of
  completion and request is in the tables and takes no part.

Intervals are 95 % bootstrap intervals over topics where nothing else is said, differences those of the same topics."""


def listed_ways(found: Found) -> list[str]:
    """The ways that were measured, in the tables' order."""
    return [way for way in NAMES if way in found.ways]


def overall_table(found: Found, n: str) -> Table:
    """The overall score at each budget."""
    rows = [
        [NAMES[way], *(cell(found.of(way, budget)) for budget in found.budgets), cell(found.of(way, BEST))]
        for way in listed_ways(found)
    ]
    rows.append(["unsteered", *["-"] * len(found.budgets), cell(found.plain())])
    return Table(
        caption=f"Overall score (0 to 2) of {n}: at each KL, nats per token, and at the scale that the other half of "
        "the prompts chose; prompting at the KL that it has.",
        header=["", *(f"KL {budget}" for budget in found.budgets), BEST], rows=rows,
    )  # fmt: skip


def best_table(found: Found) -> Table:
    """At the best scale: by kind of topic, over prompts."""
    rows = []
    for way in listed_ways(found):
        share = "-" if way == "prompting" else number(found.at_the_largest(way), percent=True)
        kinds = [cell(found.of(way, BEST, kind=kind)) for kind in ("goal", "concept")]
        rows.append([NAMES[way], *kinds, cell(found.over_prompts(way, BEST)), cell(found.of(way, BEST, "kl")), share])
    rows.append(["unsteered", *(cell(found.plain(kind=kind)) for kind in ("goal", "concept")), "-", "-", "-"])
    return Table(
        caption="Overall score at the best scale: of goals and of concepts; of all with the interval over prompts; the "
        "mean KL there, and the share of topics that chose the largest.",
        header=["", "goals", "concepts", "over prompts", "KL", "largest"], rows=rows,
    )  # fmt: skip


def differences(found: Found) -> Table:
    """What each way has more than the plain feature, and than diffmean."""
    scales = [*found.budgets, BEST]
    rows = []
    for way in listed_ways(found):
        if way in ("feature", "diffmean"):
            continue
        own = scales if way != "prompting" else [BEST]
        for other in ("feature", "diffmean"):
            cells = [cell(found.less(way, other, s), signed=True) if s in own else "-" for s in scales]
            rows.append([f"{NAMES[way]} less {'the feature' if other == 'feature' else other}", *cells])
    return Table(
        caption="Paired differences of the overall score, the same topics.",
        header=["", *(f"KL {budget}" for budget in found.budgets), BEST], rows=rows,
    )  # fmt: skip


def details(found: Found) -> list[Table]:
    """Every measure, a table for each scale."""
    tables = []
    for scale in [*found.budgets, BEST]:
        rows = []
        for way in listed_ways(found):
            estimates = [found.of(way, scale, figure) for figure in DETAILS]
            if estimates[0] is not None:
                rows.append([NAMES[way], *map(cell, estimates)])
        where = f"At a KL of {scale} nats per token" if scale != BEST else "At the best scale"
        tables.append(Table(caption=f"{where}: every measure.", header=["", *DETAILS.values()], rows=rows))
    return tables


def score_figure(found: Found) -> Figure:
    """The overall score against the KL."""

    def series() -> dict[str, list[tuple[float, float]]]:
        lines = {}
        for way in listed_ways(found):
            scales = [BEST] if way == "prompting" else found.budgets
            points = [(found.of(way, scale, "kl"), found.of(way, scale)) for scale in scales]
            lines[NAMES[way]] = [(kl.mean, score.mean) for kl, score in points if kl is not None and score is not None]
        return lines

    plain = found.plain()
    assert plain is not None  # of at least one topic
    return Figure(
        name="kl", alt="Overall score against the KL of each way; the dotted line is the unsteered model",
        draw=lambda: curves(series(), "KL(steered || unsteered), nats per token", "overall score", log=True,
                            at=plain.mean),
    )  # fmt: skip


def best_figure(found: Found) -> Figure:
    """The overall score at the best scale."""
    plain = found.plain()
    assert plain is not None
    rows = {NAMES[way]: found.of(way, BEST) for way in listed_ways(found)}
    return Figure(
        name="best", alt="Overall score of each way at its best scale, with intervals over topics",
        draw=lambda: intervals({name: one for name, one in rows.items() if one is not None}, "overall score",
                               at=plain.mean),
    )  # fmt: skip


def verdicts(
    compare: Callable[[str], Estimate | None], scales: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:  # fmt: skip
    """Scales at which a difference is above 0, below 0, and neither."""
    sides = {scale: side(estimate) for scale in scales if (estimate := compare(scale)) is not None}
    return tuple([scale for scale, where in sides.items() if where == sign] for sign in (1, -1, 0))  # pyright: ignore[reportReturnType]


def against(found: Found, way: str, other: str) -> str:
    """At which budgets a way is better than another, in words."""
    above, below, same = verdicts(lambda scale: found.less(way, other, scale), found.budgets)
    parts = [f"{what} at a KL of {listed(scales)}" for what, scales in (
        ("scores higher", above), ("scores lower", below), ("is not told apart", same)) if scales]  # fmt: skip
    return ", ".join(parts)


def answer(found: Found) -> str:
    """The question in one sentence."""
    if "sae_ts" not in found.ways:
        return "SAE-TS was not measured yet; the other ways are compared below."
    above, below, _ = verdicts(lambda scale: found.less("sae_ts", "feature", scale), found.budgets)
    told = against(found, "sae_ts", "feature")
    if len(above) == len(found.budgets):
        return f"SAE-TS beats the plain feature at every KL that was measured ({listed(found.budgets)} nats per token)."
    if above and not below:
        return f"SAE-TS beats the plain feature at some budgets only: against it, it {told}."
    if above:
        return f"Whether SAE-TS beats the plain feature depends on the budget: against it, it {told}."
    if not below:
        return f"SAE-TS is not shown to beat the plain feature here: against it, it {told}."
    return f"SAE-TS does not beat the plain feature here: against it, it {told}."


def means(found: Found) -> str:
    """What the figures say, in words that they choose."""
    paragraphs = [answer(found)]
    if "sae_ts" in found.ways:
        gaps = [f"{cell(found.less('sae_ts', 'feature', s), signed=True)} at {s}" for s in found.budgets]
        best = found.less("sae_ts", "feature", BEST)
        paragraphs[0] += f" The differences of the overall score are {listed(gaps)} nats per token."
        for kind in ("goal", "concept"):
            of_kind = [found.less("sae_ts", "feature", scale, kind=kind) for scale in found.budgets]
            if all(of_kind):
                paragraphs[0] += f" Of the {kind}s alone: {listed([cell(one, signed=True) for one in of_kind])}."
        paragraphs[0] += f" Of all, at each one's best scale, it is {cell(best, signed=True)}, {word(best)}."
        if "sae_ts_more" in found.ways:
            told = listed([cell(found.less("sae_ts_more", "feature", s), signed=True) for s in found.budgets])
            more = listed([cell(found.less("sae_ts_more", "sae_ts", s), signed=True) for s in found.budgets])
            paragraphs.append(
                f"From {MORE_TEXTS} times as many texts, SAE-TS less the feature is {told}, and less SAE-TS from the "
                f"study's {more}."
            )
        if "fgaa" in found.ways:
            told = listed([cell(found.less("fgaa", "sae_ts", s), signed=True) for s in found.budgets])
            paragraphs.append(f"FGAA, which aims at several features through the same map, less SAE-TS: {told}.")
        if "fgaa_rows" in found.ways:
            told = listed([cell(found.less("fgaa", "fgaa_rows", s), signed=True) for s in found.budgets])
            likelier = [cell(found.less("fgaa", "fgaa_rows", s, "likelihood"), signed=True) for s in found.budgets]
            paragraphs[-1] += (
                f" Less the sum of the decoder rows of the same features, without the map: {told}; by likelihood "
                f"{listed(likelier)} nats per token."
            )
        last = found.budgets[-1]
        parts = [
            f"{DETAILS[name].split(',')[0]} {cell(found.less('sae_ts', 'feature', last, name), signed=True)}"
            for name in ("concept", "fluency", "words", "likelihood")
        ]
        paragraphs.append(
            f"By measure, at a KL of {last}, SAE-TS less the feature: {listed(parts)}. "
            "The page on targeting follows the causes up."
        )
    ranked = sorted(
        ((way, one) for way in listed_ways(found) if (one := found.of(way, BEST)) is not None),
        key=lambda item: -item[1].mean,
    )
    order = ", ".join(f"{NAMES[way]} ({number(one.mean)})" for way, one in ranked)
    paragraphs.append(f"By the mean at their best scale, in order: {order}; unsteered {number(mean(found.plain()))}.")
    last = found.budgets[-1]
    measured = [(way, found.of(way, last, "likelihood")) for way in listed_ways(found)]
    rises = sorted(((way, rise) for way, rise in measured if rise is not None), key=lambda item: -item[1].mean)
    order = ", ".join(f"{NAMES[way]} ({number(rise.mean, 2, signed=True)})" for way, rise in rises)
    paragraphs.append(f"By the likelihood of held-out texts at a KL of {last}, nats per token, in order: {order}.")
    vectors = [way for way, _ in ranked if way != "prompting"]
    if vectors:
        paragraphs.append(
            f"Above a random direction at their best scale: {better(found, 'random')}. Above the unsteered model: "
            f"{better(found, UNSTEERED)}."
        )
        share = [found.at_the_largest(way) for way in vectors]
        paragraphs[-1] += (
            f" On {number(float(np.mean(share)), 2, percent=True)} of topics and ways the scale that was chosen is the "
            f"largest, a KL of {last}"
            + (", so that a search further up might find better ones." if np.mean(share) > 0.3 else ".")
        )
        if told := kinds(found):
            paragraphs.append(told)
        first = vectors[0]
        if "prompting" in found.ways:
            gap = found.less("prompting", first, BEST)
            paragraphs.append(
                f"Prompting less the best vector ({NAMES[first]}): {cell(gap, signed=True)}, {word(gap)}; its KL on "
                f"neutral texts is {cell(found.of('prompting', BEST, 'kl'))}."
            )
    return "\n\n".join(paragraphs)


def kinds(found: Found) -> str:
    """How far the measures take another thing for the concept: the unsteered model's mark, and what a random direction
    gains; empty where either is not known."""
    plain, last = found.plain("concept", "concept"), found.budgets[-1]
    gained = found.of("random", last, "likelihood", "concept")
    if plain is None or gained is None:
        return ""
    noted = {
        1: "so that some of what the likelihood gains at this KL is not of the concept",
        0: "so that what the likelihood gains is of the concept",
        -1: "so that the likelihood gains less than it shows",
    }[side(gained)]
    return (
        "AxBench's texts without a concept are of another kind than those with it; texts of other concepts are of the "
        "same kind, which is why the measures set both against the concept's. The unsteered model's answers have "
        f"{cell(plain)} of 2 for the concepts by the classifier; a random direction at a KL of {last} moves the "
        f"likelihood of texts with the concept over those of other concepts by {cell(gained, signed=True)} nats per "
        f"token, {noted}."
    )


def better(found: Found, other: str) -> str:
    """The ways that score higher than another at their best scale, by more than the interval; or "none"."""
    above = [way for way in listed_ways(found) if way != other and side(found.less(way, other, BEST)) > 0]
    return listed([NAMES[way] for way in above]) if above else "none by more than its interval"


def word(estimate: Estimate | None) -> str:
    """Which side of 0 an interval is on."""
    return {1: "above 0", -1: "below 0", 0: "not told from 0"}[side(estimate)]


def mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else bounds(estimate)[0]
