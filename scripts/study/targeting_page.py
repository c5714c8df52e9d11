"""The page on what decides whether SAE-TS beats the plain feature, from its results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from study import report
from study.targeting_words import AT, CAUSES, GRAMMAR_FEATURES, TITLES, Read, answer, estimate, meaning, told_of, values

ASKED = """\
Does the vector that SAE-TS makes for a feature steer better than the feature's own direction at equal KL, and if not,
why? Each suspected cause has an experiment that changes it alone: the scale that effects are measured at, how many
vectors and which, the noise of the measurement, the ridge, what is added to the direction, and whether anything has
to be steered at all to know what steering does."""
CHANGE = """\
Texts in which the concepts occur more often: a gradient says of a feature only what the texts show. Longer texts, whose
later tokens answer to earlier ones. More concepts and a second model. The metric is that of small pushes, and the
budgets are not small: averaging the gradients over texts that are steered already would measure it where one steers.
The paper's scale, 50,000 vectors with 896 texts each, was not tried."""


def model_table(read: Read) -> report.Table:
    """The study's model."""
    rows = [
        [TITLES[way], report.cell(read.model(way), signed=True),
         "" if way == "feature" else report.cell(read.model(way, "feature"), signed=True)]
        for way in read.ways()
    ]  # fmt: skip
    caption = (
        f"**The study's model**, {len(read.concepts())} concepts of AxBench, each by its best feature (AUROC on "
        f"training texts), at {AT:g} nats of KL per token: rise of the log-likelihood of evaluation texts with the "
        "concept less that of texts of other concepts, nats per token; 95 % intervals over concepts. Nothing was "
        "chosen on these. (Texts without any concept are of another kind, and many a direction tells the kinds apart.)"
    )
    return report.Table(caption=caption, header=["way", "preference", "less the feature"], rows=rows)


def compare_table(read: Read) -> report.Table:
    """The ways on the bundled model."""
    rows = []
    for kl, row in read.named("compare"):
        for aim, found in row["outcome"].items():
            for way, given in found.items():
                x, plain = values(given), values(found["feature"])
                difference = "" if way == "feature" else report.cell(estimate(x - plain), signed=True)
                rows.append([report.number(kl), aim, TITLES[way], report.cell(estimate(x)), difference])
    caption = (
        "**The bundled model**: the concept's words per 100 of continuations, at equal KL (nats per token), for the "
        "feature that *reads* each concept best and for the one that *writes* it most; 95 % intervals over concepts."
    )
    return report.Table(caption=caption, header=["KL", "feature that", "way", "words", "less the feature"], rows=rows)


def cause_rows(read: Read) -> list[tuple[str, np.ndarray, float | None, float | None]]:
    """(experiment, outcome, R2, ceiling)."""
    found: list[tuple[str, np.ndarray, float | None, float | None]] = []
    plain = read.grammar("plain")
    if plain is not None:
        found += [(TITLES[w], values(plain["outcome"][w]), None, None) for w in ("feature", "writing", "random")]
    roof = read.grammar("ceiling")
    for name, row in read.rows.items():
        kind, _, detail = name.removeprefix("grammar/").partition(" ")
        if not name.startswith("grammar/") or kind not in CAUSES:
            continue
        for way, given in row["outcome"].items():
            told = told_of(kind, detail, way)
            known = row.get("r2")
            r2 = known.get(way) if isinstance(known, dict) else known
            top = row.get("ceiling", None if roof is None or r2 is None else roof["ceiling"])
            told += f", {way}" if way.startswith("bias") and kind != "target" else ""
            found.append((told, values(given), r2, top))
    return found


def cause_table(read: Read) -> report.Table:
    """Each cause."""
    reference = read.outcome("plain", "feature")
    rows = []
    for told, x, r2, top in cause_rows(read):
        less = None if reference is None else estimate(x - reference)
        share = None if r2 is None or not top or top <= 0 else r2 / top
        rows.append([told, report.cell(estimate(x)), report.cell(less, signed=True), report.number(r2),
                     report.number(top), report.number(share)])  # fmt: skip
    caption = (
        f"**The causes, one at a time** (bundled model, KL {AT:g}, the feature that reads each concept): words per "
        "100, and less the feature's own direction. R2 is on vectors that the map was not fitted to; its ceiling "
        "is the share of their effects' variance that a second measurement finds again. `bias 1` takes the general "
        "effect of steering away as the paper does, `bias 0` does not."
    )
    header = ["experiment", "words per 100", "less the feature", "R2", "ceiling", "R2 / ceiling"]
    return report.Table(caption=caption, header=header, rows=rows)


def speed_table(read: Read) -> report.Table | None:
    """Effects of many vectors."""
    one, all_ = read.rows.get("model/one at a time"), read.rows.get("model/together")
    if one is None:
        return None
    rows = [["a loop: generate, read again, encode", str(one["vectors"]), report.number(one["seconds"]), "1"]]
    if all_ is not None:
        ratio = report.number(one["seconds"] / all_["seconds"])
        rows.append(["`collect_effects`", str(all_["vectors"]), report.number(all_["seconds"]), ratio])
    caption = "**Measuring by steering**, 16 rollouts of 16 tokens for a vector, seconds of the processor, one thread."
    if all_ is not None:
        minutes = report.number(1000 * all_["seconds"] / 60)
        caption += f" At this rate 1,000 vectors take {minutes} minutes of the processor."
    return report.Table(caption=caption, header=["way", "vectors", "seconds a vector", "times as fast"], rows=rows)


def page(results: Mapping[str, Any]) -> report.Page:
    """The page on targeting."""
    read, s = Read(results), results["settings"]
    texts = results["rows"].get("model/effects", {}).get("texts")
    told = f"gradients of {texts:,} unsteered texts of 16 tokens" if texts else "gradients of unsteered texts"
    how = f"""\
On the bundled model (an SAE of {GRAMMAR_FEATURES} features) effects are measured of {s["vectors"]} random vectors (an
eighth of them where the table does not say how many), {s["rollouts"]} texts of {s["new_tokens"]} tokens for each, at a
KL of {AT:g} nats per token unless it says otherwise; gradients of unsteered texts of the same length. Vectors for
features are calibrated to equal KL on held-out stories; {s["prompts"]} stories are continued with each (twice as many
in the comparison), and the grammar's words of the concept counted. The study's model is measured with the map that
the rest of the study uses: {told}. That gradients help was
first seen on some of the bundled model's concepts; the study's model had no part in it."""
    tables: Sequence[report.Table | None] = (
        model_table(read) if read.enough else None, compare_table(read) if read.named("compare") else None,
        cause_table(read), speed_table(read),
    )  # fmt: skip
    figures = []
    curves = learning(read)
    if curves:
        figures.append(
            report.Figure(
                name="learning", alt="Words per 100 over how much was measured",
                draw=lambda: report.curves(curves, "vectors, or texts", "words per 100", log=True),
            )
        )  # fmt: skip
    if read.enough:
        shown = {TITLES[w]: e for w in read.ways() if w != "feature" and (e := read.model(w, "feature")) is not None}
        figures.append(
            report.Figure(
                name="model", alt="Each way less the feature on the study's model",
                draw=lambda: report.intervals(shown, "preference less the feature's, nats per token", at=0.0),
            )
        )  # fmt: skip
    return report.Page(
        name="targeting", title="When does SAE-TS beat the feature, and why", asked=ASKED, how=how,
        tables=[table for table in tables if table is not None], figures=figures, means=meaning(read), change=CHANGE,
        answer=answer(read),
    )  # fmt: skip


def learning(read: Read) -> dict[str, list[tuple[float, Any]]]:
    """Outcomes over how much was measured."""
    series: dict[str, list[tuple[float, Any]]] = {}
    for prefix, ways in (("gradients", ("natural", "derivative")), ("vectors", ("bias 0", "bias 1"))):
        for way in ways:
            points = [(n, estimate(values(row["outcome"][way]))) for n, row in read.named(prefix)]
            kept = [(n, e) for n, e in points if e is not None]
            if kept:
                series[f"{prefix}, {way}"] = kept
    return series
