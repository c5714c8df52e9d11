"""The page of part 4, from its results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from steersman.steer import Estimate, bootstrap
from study import report
from study.common import PAPERS

TITLES = {
    "encode": "plain encoding", "encode_scaled": "encoding at the norm of states", "nnls": "non-negative least squares",
    "omp": "matching pursuit", "gradient": "gradient pursuit", "lasso": "lasso", "antipodal": "antipodal codes",
    "contrast": "contrast of codes", "response": "response of states",
}  # fmt: skip
"""What the page calls the methods."""
SIGNED = ("omp", "gradient", "lasso", "antipodal", "contrast", "response")
"""Those whose coefficients have both signs."""
Rows = Mapping[str, Any]


def page(results: dict[str, Any]) -> report.Page:
    """The page of this part."""
    rows, settings = results["rows"], results["settings"]
    parts, steered = (_of(rows, ending) for ending in ("parts", "steered"))
    traits = list(dict.fromkeys(name.split(", ")[0] for name in parts))
    over = f"{len(traits)} traits"
    tables = [found_table(parts, over), firing_table(parts, over)]
    if any(name.endswith("vector") for name in steered):
        tables.append(steering_table(steered, over))
    tables.append(top_table(parts))
    known = curve_of(parts)
    figures = [
        report.Figure(
            name="explained", alt=f"Explained share of the vectors by the number of features, mean over {over}; plain "
            "encoding, which is far below, left out",
            draw=lambda: report.curves(known, "features", "explained share of |v|²", at=0.0),
        )
    ]  # fmt: skip
    shown = {kind: agreements(steered, kind) for kind in ("caa", "diffmean")}
    if all(shown.values()):
        figures.append(
            report.Figure(
                name="agreement", alt=f"Agreement of reconstructions with the vector while steering, over {over}",
                draw=lambda: report.intervals(shown, "agreement with the vector at equal KL", at=0.0),
            )
        )  # fmt: skip
    source = "Anthropic's persona and corrigibility questions" if settings["data"] == PAPERS else "the story grammar"
    return report.Page(
        name="decomposition", title="Vectors of traits taken apart", tables=tables, figures=figures,
        asked="Which features is a steering vector made of? Giving it to the SAE's encoder looks like the answer, and "
        "[arXiv 2411.08790](https://arxiv.org/abs/2411.08790) argues that it misleads: a vector is no activation, so "
        "that the encoder's bias decides, and it has negative parts, which codes cannot show. How misleading is it, "
        "what do signed methods find, do the parts steer as the whole does, and do they fire where the trait is?",
        how=HOW.format(**settings | {"source": source, "traits": report.listed(traits)}),
        means=meaning(parts, steered), change=CHANGE, answer=answer(parts),
    )  # fmt: skip


HOW = """\
Two vectors of each of {traits}, from {questions} questions of {source}, as many with each answer: `caa`, the mean state
at the answer that shows the trait less that at the other; and `diffmean`, the difference of the means over the tokens
of statements that somebody with the trait agrees with and of those that they do not (of questions with choices: of the
two choices). Each is taken apart into at most {features} features, by every method of
[`decompose`](../concepts/decomposition.md) that reads no effect map and no gradient of the model.

*Explained* is `1 - |v - reconstruction|² / |v|²`. *Overlap* is the Jaccard overlap of two sets of features: with those
that the encoder has for v = 0, which are of its bias alone; with those found for random directions of the same norm;
with those found for -v, which a signed method must find again and one without signs must not. *Negative energy* is the
share of the squared coefficients that is below 0.

Whether features fire on the trait is measured on {held_out} other questions: the AUROC of a feature's largest
activation, texts of one side of the vector against the other, the other way round for a negative coefficient; mean over
the features found, beside as many random features of those that fire on these texts, with the same signs.

Steering is at the multiple of the vector that costs a KL of {kl:g} nats per token on {texts} further questions, on
which the changes of the next-token probabilities are compared: *agreement* is their cosine to those under the vector,
*retained* their projection on them (1 and 1 for the vector itself). The *margin* is `log p` of the answer that shows
the trait less that of the other, over {items} questions."""
CHANGE = """\
A larger model, whose persona vectors change more than the preference for an answer; an SAE of more features or a
smaller error, to whose rows a vector may be nearer; other budgets of features and of KL. `behaviour`, which fits
coefficients by gradients through the model, and `effect`, which asks an effect map, were not run: the first costs
minutes a vector here, the second says what a vector does to text, not what it is made of. Nor were the reconstructions
of the other methods steered with."""


def _of(rows: Rows, ending: str) -> dict[str, Any]:
    """The rows of one kind, by what stands before."""
    return {name.removesuffix(f" {ending}").rstrip(":"): row for name, row in rows.items() if name.endswith(ending)}


def over_traits(rows: Rows, value: Callable[[Any], float | None], kind: str = "") -> Estimate | None:
    """Mean over traits, of each the mean of its vectors (of one kind), with the interval over traits."""
    by: dict[str, list[float]] = {}
    for name, row in rows.items():
        trait, of = name.split(":")[0].split(", ")
        found = value(row)
        if found is not None and of.startswith(kind):
            by.setdefault(trait, []).append(found)
    return bootstrap([float(np.mean(values)) for values in by.values()])


def of_method(parts: Rows, method: str, figure: str) -> Estimate | None:
    """A figure of a method."""
    return over_traits(parts, lambda row: row["methods"][method].get(figure))


def above(parts: Rows, method: str, figure: str = "fires", null: str = "fires_random") -> Estimate | None:
    """A figure less its null."""

    def value(row: Any) -> float | None:
        one = row["methods"][method]
        return None if one.get(figure) is None else one[figure] - one[null]

    return over_traits(parts, value)


def found_table(parts: Rows, over: str) -> report.Table:
    """What methods find."""
    columns = ("explained", "explained_random", "zero", "random", "opposite", "negative")
    return report.Table(
        caption=f"What is found, mean over {over} (two vectors each) with the 95 % interval over traits. A method "
        "without a column's figure does not look at the vector.",
        header=["method", "explained", "of random directions", "overlap with v = 0", "with random directions",
                "with -v", "negative energy"],
        rows=[[TITLES[m], *(report.cell(of_method(parts, m, c)) for c in columns)] for m in TITLES],
    )  # fmt: skip


def firing_table(parts: Rows, over: str) -> report.Table:
    """Whether the features fire on the trait."""
    own = report.cell(over_traits(parts, lambda row: row["auroc"]))
    return report.Table(
        caption="Whether the features found fire on held-out texts of the trait: mean AUROC, beside that of random "
        f"features; 95 % intervals over {over}. The vectors themselves, read as directions, reach {own}.",
        header=["method", "features found", "random features", "difference"],
        rows=[
            [TITLES[m], report.cell(of_method(parts, m, "fires")), report.cell(of_method(parts, m, "fires_random")),
             report.cell(above(parts, m), signed=True)]
            for m in TITLES
        ],
    )  # fmt: skip


def steering_table(steered: Rows, over: str) -> report.Table:
    """What reconstructions do."""

    def one(method: str, variant: str, figure: str) -> str:
        return report.cell(kept(steered, method, variant, figure))

    def margin(name: str) -> str:
        return report.cell(gain(steered, name), signed=True)

    rows = [["the vector itself", "1", "1", "1", "1", "0", margin("vector")]]
    for m in TITLES:
        if kept(steered, m, "residual", "retained") is not None:
            equal, at_kl = "reconstruction, equal norm", "reconstruction, equal KL"
            rows.append(
                [TITLES[m], one(m, equal, "retained"), one(m, equal, "agreement"), one(m, at_kl, "retained"),
                 one(m, at_kl, "agreement"), one(m, "residual", "retained"), margin(m)]
            )  # fmt: skip
    kinds = report.listed(sorted({f"`{name.split(', ')[1].split(':')[0]}`" for name in steered}))
    known = "omp" if kept(steered, "omp", "residual", "retained") is not None else "encode"
    random = "random, equal norm"
    rows.append(
        ["random direction", one(known, random, "retained"), one(known, random, "agreement"), "-", "-", "-",
         margin("random")]
    )  # fmt: skip
    return report.Table(
        caption=f"Steering with what was found ({kinds}): reconstructions at the vector's norm and at its KL, and what "
        f"is left over (the residual, as it is); change of the margin in nats at equal KL (of the random direction at "
        f"equal norm). 95 % intervals over {over}.",
        header=["steering with", "retained, equal norm", "agreement, equal norm", "retained, equal KL",
                "agreement, equal KL", "retained by the residual", "margin"],
        rows=rows,
    )  # fmt: skip


def kept(steered: Rows, method: str, variant: str, figure: str, kind: str = "") -> Estimate | None:
    """A figure of steering with a variant of what a method found."""
    rows = {name: row for name, row in steered.items() if name.endswith(f": {method}")}
    found = over_traits(rows, lambda row: row[variant][figure] if variant in row else None, kind)
    traits = {name.split(", ")[0] for name in steered}
    return found if found is not None and found.n >= min(3, len(traits)) else None  # of one or two there is no interval


def gain(steered: Rows, what: str) -> Estimate | None:
    """Change of the margin, in nats: of the vector, a random one, or what a method found."""
    base = {name.removesuffix(": vector"): row for name, row in steered.items() if name.endswith(": vector")}
    if what in ("vector", "random"):
        return over_traits(base, lambda row: row[what] - row["base"])
    rows = {
        name: row["margin"] - base[stem]["base"]
        for name, row in steered.items()
        if (stem := name.removesuffix(f": {what}")) != name and stem in base and "margin" in row
    }
    return over_traits(rows, float)


def agreements(steered: Rows, kind: str) -> dict[str, Estimate]:
    """Agreement at equal KL by method."""
    found = {
        TITLES[m]: kept(steered, m, "reconstruction, equal KL", "agreement", kind) for m in TITLES
    }  # fmt: skip
    return {name: one for name, one in found.items() if one is not None}


def top_table(parts: Rows) -> report.Table:
    """The largest features of each trait's `caa`."""

    def told(terms: Sequence[Mapping[str, Any]]) -> str:
        return "; ".join(
            f"{'+' if t['coefficient'] > 0 else '-'} {t['feature']} ({' '.join(t['label'].split())[:34]}; "
            f"{t['auroc']:.2f})" for t in terms[:3]
        )  # fmt: skip

    return report.Table(
        caption="The three largest features of each trait's `caa` by plain encoding and by matching pursuit: sign, "
        "number, the tokens that the feature promotes, and its AUROC on held-out texts.",
        header=["trait", "plain encoding", "matching pursuit"],
        rows=[
            [name.split(", ")[0], told(row["top"]["encode"]), told(row["top"]["omp"])]
            for name, row in parts.items()
            if name.endswith("caa")
        ],
    )  # fmt: skip


def curve_of(parts: Rows) -> dict[str, list[tuple[float, Estimate]]]:
    """Explained share by the number of features; plain encoding is far below what the others span."""
    found: dict[str, list[tuple[float, Estimate]]] = {}
    for m in ("omp", "lasso", "nnls", "response", "contrast", "encode_scaled"):
        marks = sorted({int(mark) for row in parts.values() for mark in row["methods"][m]["curve"]})
        points = [
            (float(mark), over_traits(parts, lambda row, mark=mark, m=m: row["methods"][m]["curve"].get(str(mark))))
            for mark in marks
        ]
        found[TITLES[m]] = [(mark, point) for mark, point in points if point is not None]
    return {name: points for name, points in found.items() if points}


def answer(parts: Rows) -> str:
    """How misleading plain encoding is, in one sentence."""
    explained, zero = of_method(parts, "encode", "explained"), of_method(parts, "encode", "zero")
    signed = of_method(parts, "omp", "explained")
    assert explained is not None
    assert zero is not None
    assert signed is not None
    return (
        "Plain encoding "
        + {-1: "makes the vectors worse than nothing", 0: "explains nothing", 1: "explains a part"}[
            report.side(explained)
        ]
        + f" (explained share {report.cell(explained)}; overlap of its features with those of v = 0 "
        f"{report.cell(zero)}), where matching pursuit with as many features explains {report.cell(signed)}."
    )


def meaning(parts: Rows, steered: Rows) -> str:
    """What the figures mean."""
    paragraphs = [answer(parts), bias(parts), signs(parts), fires(parts)]
    if any(name.endswith(": vector") for name in steered):
        paragraphs.append(steers(steered))
    return "\n\n".join(text for text in paragraphs if text)


def bias(parts: Rows) -> str:
    """Whether what plain encoding finds is about the vector."""
    like = above(parts, "encode", "zero", "like_omp")
    random, opposite = of_method(parts, "encode", "random"), of_method(parts, "encode", "opposite")
    scaled = of_method(parts, "encode_scaled", "zero")
    first = [row["top"]["encode"][0]["feature"] for row in parts.values()]
    same = max(first.count(feature) for feature in first)
    text = (
        f"Its largest feature is one and the same for {same} of the {len(first)} vectors. "
        * (2 * same > len(first))
        + f"Of what plain encoding finds for a vector, {report.cell(random)} (Jaccard) is also found for a random "
        f"direction of its norm, and {report.cell(opposite)} for the vector turned round, all of whose parts have the "
        "other sign. "
    )
    if report.side(like) > 0:
        text += "It has more in common with v = 0 than with what matching pursuit finds: the bias decides, not v. "
    elif report.side(like) < 0:
        text += "It has less in common with v = 0 than with what matching pursuit finds: v decides, not the bias. "
    if scaled is not None:
        text += (
            f"Brought to the norm of real states its overlap with v = 0 is {report.cell(scaled)}, and it explains "
            f"{report.cell(of_method(parts, 'encode_scaled', 'explained'))}."
        )
    return text


def signs(parts: Rows) -> str:
    """What signs are worth."""
    negative = of_method(parts, "omp", "negative")
    lead = over_traits(parts, lambda row: row["methods"]["omp"]["explained"] - row["methods"]["nnls"]["explained"])
    over = above(parts, "omp", "explained", "explained_random")
    text = (
        f"Matching pursuit has {report.cell(negative, percent=True)} of its energy in negative coefficients, which no "
        f"code can show; without signs (non-negative least squares) {report.cell(lead)} less is explained. "
    )
    more = report.cell(over, signed=True)
    chance = {
        1: f"It explains more of these vectors than of random directions ({more}): they lie nearer to a few features "
        "than chance.",
        0: f"Yet it explains no more of these vectors than of random directions ({more}): that it rebuilds them says "
        "nothing about them.",
        -1: f"Yet it explains less of these vectors than of random directions ({more}).",
    }
    return text + chance[report.side(over)]


def fires(parts: Rows) -> str:
    """Whether features fire on the trait."""
    sign = {m: report.side(above(parts, m)) for m in TITLES}
    yes, no = [TITLES[m] for m in TITLES if sign[m] > 0], [TITLES[m] for m in TITLES if sign[m] <= 0]
    best = max(TITLES, key=lambda m: (above(parts, m) or Estimate(mean=-1, low=-1, high=-1, n=0)).mean)
    text = (
        f"The features found fire on held-out texts of the trait more than random ones for {report.listed(yes)}"
        if yes
        else "No method's features fire on held-out texts of the trait more than random ones"
    )
    text += f"; not beyond chance for {report.listed(no)}. " if yes and no else ". "
    return text + f"The lead is largest for {TITLES[best]} ({report.cell(above(parts, best), signed=True)})."


def steers(steered: Rows) -> str:
    """Whether reconstructions steer as the vector does."""
    at = "reconstruction, equal KL"
    known = {m: kept(steered, m, at, "agreement") for m in TITLES}
    measured = {m: one for m, one in known.items() if one is not None}
    if not measured:
        return ""
    best, worst = (choose(measured, key=lambda m: measured[m].mean) for choose in (max, min))
    random = kept(steered, best, "random, equal norm", "agreement")
    rows = {name: row for name, row in steered.items() if name.endswith(f": {best}") and at in row}
    lead = over_traits(rows, lambda row: row[at]["agreement"] - row["random, equal norm"]["agreement"])
    vector, none = gain(steered, "vector"), gain(steered, "random")
    text = (
        f"At equal KL the reconstruction of {TITLES[best]} agrees with the vector's effect by "
        f"{report.cell(measured[best])}"
        + (
            f", most of those measured, that of {TITLES[worst]} least ({report.cell(measured[worst])})"
            * (best != worst)
        )
        + f"; a random direction of the vector's norm has {report.cell(random)}, "
        + {1: "less beyond chance. ", 0: "which is not told from the best. ", -1: "more beyond chance. "}[
            report.side(lead)
        ]
    )
    left = kept(steered, best, "residual", "retained")
    text += f"What {TITLES[best]} leaves over retains {report.cell(left)} of the effect by itself. "
    moved = report.side(vector)
    base = {name: row for name, row in steered.items() if name.endswith(": vector")}
    apart = over_traits(base, lambda row: row["vector"] - row["random"])
    text += (
        f"The vectors themselves move the answers by {report.cell(vector, signed=True)} nats "
        f"(random {report.cell(none, signed=True)})"
        + {1: ", towards the trait", 0: ", which is not told from nothing", -1: ", away from the trait"}[moved]
        + {1: ", and further than a random direction.", 0: "; a random direction is not told from them.", -1: "; a "
           "random direction goes further."}[report.side(apart)]
    )  # fmt: skip
    if moved > 0:
        keep = [TITLES[m] for m in measured if report.side(gain(steered, m)) > 0]
        lose = [TITLES[m] for m in measured if report.side(gain(steered, m)) <= 0]
        text += (
            f" Towards it go the reconstructions of {report.listed(keep)}, too" if keep else " No reconstruction does"
        )
        text += f"; not beyond chance those of {report.listed(lose)}." if keep and lose else "."
    return text
