"""What the experiments on targeting say, read off their results, in words that the figures choose."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from steersman.steer import Estimate, bootstrap
from study import report
from study.common import MORE_TEXTS

AT = 0.3
"""Nats per token at which outcomes of the experiments are compared."""
GRAMMAR_FEATURES = 512
"""Features of the bundled model's SAE."""
TITLES = {
    "feature": "the feature's own direction", "paper": "SAE-TS as in the paper",
    "steered, no bias": "SAE-TS without the bias term", "general": "the bias term alone",
    "derivative": "gradients of unsteered texts (the default)",
    "derivative, more": f"gradients of {MORE_TEXTS} times as many texts", "natural": "gradients, with the metric",
    "own texts": "gradients of texts in which the feature fires", "random": "a random direction",
    "writing": "direction of the feature that writes most",
}  # fmt: skip
NULLS = ("random", "general")
"""Directions that know nothing of the feature."""
CAUSES = {
    "scale": "measured at a KL of {}", "vectors": "{} random vectors", "kind": "measured with {}",
    "normalised": "regressed on what was added, not on its direction", "ridge": "ridge of cross-validation times {}",
    "prompts": "averaged over the prompts too", "own": TITLES["own texts"], "rank": "rank {}",
    "encoder": "shrunk to the encoder, {}", "target": "{}", "gradients": "gradients of {} texts, {}",
}  # fmt: skip


def values(row: Any) -> np.ndarray:
    """[concepts], NaN where a vector could not be made or its budget was out of reach."""
    return np.array([np.nan if v is None else v for v in row], dtype=float)


def estimate(x: np.ndarray) -> Estimate | None:
    """The mean over concepts with its interval."""
    kept = x[np.isfinite(x)]
    return bootstrap(kept) if len(kept) else None


class Read:
    """The results, and what is asked of them."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.rows: Mapping[str, Any] = results["rows"]
        self.settings: Mapping[str, Any] = results["settings"]

    def grammar(self, name: str) -> Any:
        """A row of the bundled model, or None."""
        return self.rows.get(f"grammar/{name}")

    def outcome(self, name: str, way: str) -> np.ndarray | None:
        """The outcome of a way in a row."""
        row = self.grammar(name)
        return None if row is None else values(row["outcome"][way])

    def named(self, prefix: str) -> list[tuple[float, Any]]:
        """(number, row) of the rows of the bundled model whose name is the prefix and a number, rising."""
        found = [
            (float(name.rpartition(" ")[2]), row)
            for name, row in self.rows.items()
            if name.rpartition(" ")[0] == f"grammar/{prefix}"
        ]
        return sorted(found, key=lambda pair: pair[0])

    def concepts(self) -> dict[str, Any]:
        """Of each concept that the study's model was measured on the outcome by way, and the signal of its feature."""
        found: dict[str, Any] = {}
        for name, row in self.rows.items():
            if name.startswith("model/") and "outcome" in row:
                one = found.setdefault(row["concept"], {"outcome": {}})
                one["outcome"] |= row["outcome"]
                one["more signal" if name.endswith(", more texts") else "signal"] = row["signal"]
        return {name: one for name, one in found.items() if "feature" in one["outcome"]}

    @property
    def enough(self) -> bool:
        """Whether the study's model was measured on enough concepts to say something of the mean."""
        return len(self.concepts()) >= 5

    def model(self, way: str, less: str | None = None) -> Estimate | None:
        """The preference under a way, or its difference to another's on the same concepts."""
        rows = [r["outcome"] for r in self.concepts().values()]
        if less is None:
            return estimate(np.array([r[way] for r in rows if way in r]))
        return estimate(np.array([r[way] - r[less] for r in rows if way in r and less in r]))

    def ways(self) -> list[str]:
        """The ways that were measured on the study's model."""
        return list(dict.fromkeys(way for row in self.concepts().values() for way in row["outcome"]))


def said(sign: int, above: str, below: str, level: str) -> str:
    """The words for an interval above, below or about 0."""
    return {1: above, -1: below, 0: level}[sign]


def by_halves(read: Read) -> tuple[str, Estimate | None, Estimate | None] | None:
    """The way to use gradients that is best on every other concept; on the rest of them, what it is better by than the
    feature that reads the concept, and than the one that writes it."""
    texts, plain = read.named("gradients"), read.grammar("plain")
    if not texts or plain is None:
        return None
    found = {way: values(x) for way, x in texts[-1][1]["outcome"].items()}
    best = max(found, key=lambda way: float(np.nanmean(found[way][::2])))
    less = [estimate((found[best] - values(plain["outcome"][name]))[1::2]) for name in ("feature", "writing")]
    return best, less[0], less[1]


def answer(read: Read) -> str:
    """The question, answered."""
    parts = []
    chosen = by_halves(read)
    if chosen is not None:
        best, reading, writing = chosen
        words = ("beats", "does worse than", "is not told apart from")
        parts.append(
            f"On the bundled model, at a KL of {AT:g}, the vector from {TITLES[best]}, the way chosen on half of the "
            f"concepts, {said(report.side(reading), *words)} the direction of the same feature on the other half by "
            f"{report.cell(reading, signed=True)} of the concept's words per 100, and "
            f"{said(report.side(writing), *words)} the direction of the feature that writes the concept's words most "
            f"({report.cell(writing, signed=True)})."
        )
    if read.enough:
        parts.append(f"On the study's model, against the feature's direction, nats per token: {on_model(read)}.")
    else:
        parts.append(
            f"On the study's model {len(read.concepts())} of the concepts were measured here, too few to say: the part "
            "on steering compares SAE-TS with the feature there."
        )
    return " ".join(parts)


def on_model(read: Read) -> str:
    """The ways on the study's model by what they are to the feature's direction."""
    less = {way: read.model(way, "feature") for way in read.ways() if way not in ("feature", *NULLS)}
    told = []
    for sign, words in ((1, "better"), (-1, "worse"), (0, "not told apart")):
        mine = [f"{TITLES[w]} ({report.cell(one, signed=True)})" for w, one in less.items() if report.side(one) == sign]
        told += [f"{words}: {report.listed(mine)}"] if mine else []
    return "; ".join(told)


def pair(read: Read, a: tuple[str, str], b: tuple[str, str]) -> Estimate | None:
    """The difference of two outcomes on the bundled model."""
    x, y = read.outcome(*a), read.outcome(*b)
    return None if x is None or y is None else estimate(x - y)


def told_of(kind: str, detail: str, way: str) -> str:
    """What an experiment is called."""
    return CAUSES[kind].format(*(x for x in (detail, way) if x)) if "{}" in CAUSES[kind] else CAUSES[kind]


def changes(read: Read) -> list[tuple[str, Estimate]]:
    """What each change to a map of steered effects does to its outcome, the paper's bias left out on both sides."""
    few = f"vectors {read.settings['vectors'] // 8}"
    against = dict.fromkeys(("normalised", "ridge", "kind", "prompts", "rank", "encoder"), few)
    against |= {"scale": f"scale {AT:g}", "target": "target"}
    found: list[tuple[str, Estimate]] = []
    for name, row in read.rows.items():
        label = name.removeprefix("grammar/")
        kind, _, detail = label.partition(" ")
        if kind not in against or read.grammar(against[kind]) is None:
            continue
        base = read.outcome(against[kind], "bias 0")
        for way, given in row["outcome"].items():
            itself = (label, way) == (against[kind], "bias 0")
            if base is None or itself or (way == "bias 1" and kind != "target"):
                continue
            if (one := estimate(values(given) - base)) is not None:
                found.append((told_of(kind, detail, "" if way == "bias 0" else way), one))
    return found


def listed_changes(read: Read) -> str:
    """The changes that help, that harm, and those that are not told apart, in words."""
    every = changes(read)
    parts = []
    for sign, word in ((1, "Better"), (-1, "Worse"), (0, "Not told apart")):
        mine = [f"{told} ({report.cell(one, signed=True)})" for told, one in every if report.side(one) == sign]
        if mine:
            parts.append(f"{word}: {', '.join(mine)}.")
    return " ".join(parts)


def noise(read: Read) -> list[str]:
    """How strong the features' columns are against noise, and what texts in which the features fire change."""
    parts = []
    signals = read.grammar("signal")
    ours = [row["signal"] for row in read.concepts().values()]
    if signals is not None and ours:
        medians = [float(np.median(signals[name])) for name in ("natural", "steered")]
        parts.append(
            f"**Noise**: the derivative of the median concept's feature is {report.number(medians[0])} times its noise "
            f"on the bundled model (a map of {read.settings['vectors'] // 8} steered vectors: "
            f"{report.number(medians[1])}) and {report.number(float(np.median(ours)))} times on the study's model, "
            "whose texts seldom come to these concepts."
        )
    more, plain = (read.rows.get(f"model/{name}") for name in ("more effects", "effects"))
    if read.enough and more is not None and plain is not None and "derivative, more" in read.ways():
        known = [one for one in read.concepts().values() if "more signal" in one]
        signals = [report.number(float(np.median([one[key] for one in known]))) for key in ("signal", "more signal")]
        gain, over = read.model("derivative, more", "derivative"), read.model("derivative, more", "feature")
        parts.append(
            f"**More texts on the study's model**, {more['texts']:,} in place of {plain['texts']:,}: "
            f"{more['known']:,} features in place of {plain['known']:,} have a derivative of twice its noise, and that "
            f"of the median concept's feature is {signals[1]} times its noise in place of {signals[0]}. Its vectors "
            f"prefer the concept's texts by {report.cell(gain, signed=True)} nats per token more "
            f"({said(report.side(gain), 'better', 'worse', 'not told apart')}), and by "
            f"{report.cell(over, signed=True)} more than the feature's direction "
            f"({said(report.side(over), 'better', 'worse', 'not told apart')})."
        )
    if read.enough and set(NULLS) <= set(read.ways()):
        told = [f"{TITLES[name]} {report.cell(read.model(name), signed=True)}" for name in NULLS]
        parts.append(
            f"**Nulls**: on the study's model {report.listed(told)} nats per token, the feature's direction "
            f"{report.cell(read.model('feature'), signed=True)}."
        )
    if read.enough and "own texts" in read.ways():
        found, other = read.model("own texts", "feature"), read.model("own texts", "derivative")
        parts.append(
            "**Texts in which the feature fires**, taken from the store in place of what the model writes, less the "
            f"feature's direction on the study's model: {report.cell(found, signed=True)} nats per token "
            f"({said(report.side(found), 'better', 'worse', 'not told apart')}), and less the default's gradients "
            f"{report.cell(other, signed=True)} ({said(report.side(other), 'better', 'worse', 'not told apart')})."
        )
        own, most = pair(read, ("own texts", "texts"), ("plain", "feature")), read.named("gradients")
        if own is not None and most:
            less = pair(read, ("own texts", "texts"), (f"gradients {most[-1][0]:g}", "derivative"))
            parts[-1] += (
                f" On the bundled model, whose own texts show every concept: {report.cell(own, signed=True)} words per "
                f"100 against the feature's direction, {report.cell(less, signed=True)} against the default's."
            )
    return parts


def meaning(read: Read) -> str:
    """What the figures mean."""
    parts = [answer(read)]
    texts, counts = read.named("gradients"), read.named("vectors")
    if texts:
        most, least = (f"gradients {n:g}" for n, _ in (texts[-1], texts[0]))
        metric = pair(read, (most, "natural"), (most, "derivative"))
        parts.append(
            "**What steering costs**: dividing by the metric of small pushes "
            + said(report.side(metric), "adds", "takes away", "changes nothing that is told apart:")
            + f" {report.cell(metric, signed=True)} words per 100 at equal KL."
        )
        if most != least:
            more = pair(read, (most, "derivative"), (least, "derivative"))
            parts.append(
                f"**More texts**, {texts[-1][0]:g} against {texts[0][0]:g}: {report.cell(more, signed=True)} words per "
                f"100 ({said(report.side(more), 'better', 'worse', 'not told apart')})."
            )
    effects = read.rows.get("model/effects")
    if effects is not None:
        parts.append(
            f"**Signal over noise**: on the study's model {effects['texts']:,} texts leave "
            f"{effects['known']:,} of {effects['features']:,} features with a derivative of at least twice its noise "
            f"({report.number(effects['known'] / effects['features'], percent=True)}). `EffectMap.solve` refuses the "
            "others unless it is told not to."
        )
    if not (counts and read.named("scale") and read.named("compare")):
        parts.append(
            "Causes whose rows are not in the table were not measured: what is said here is of those that are."
        )
    if counts:
        first, last = (f"vectors {n:g}" for n, _ in (counts[0], counts[-1]))
        gain, bias = pair(read, (last, "bias 0"), (first, "bias 0")), pair(read, (last, "bias 0"), (last, "bias 1"))
        parts.append(
            f"**More vectors**, {counts[-1][0]:g} against {counts[0][0]:g}: {report.cell(gain, signed=True)} words per "
            f"100 ({said(report.side(gain), 'better', 'worse', 'not told apart')}), and R2 from "
            f"{report.number(counts[0][1]['r2'])} to {report.number(counts[-1][1]['r2'])}. **The bias term**: leaving "
            f"it out changes {report.cell(bias, signed=True)} "
            f"({said(report.side(bias), 'better', 'worse', 'not told apart')})."
        )
    if told := listed_changes(read):
        parts.append(
            "**Other changes to a map of steered effects**, each against the same map without it, the bias left out of "
            f"both, words per 100. {told}"
        )
    parts += noise(read)
    roof = read.grammar("ceiling")
    if roof is not None and counts:
        top, r2 = roof["ceiling"], counts[-1][1]["r2"]
        parts.append(
            "**The noise ceiling** of R2 at these rollouts, the share of the effects' variance that a second "
            f"measurement finds again, is {report.number(top)}: the map of the most vectors "
            f"reaches {report.number(r2)} of it."
        )
    return "\n\n".join(parts)
