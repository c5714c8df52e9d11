"""The quickstart's `report.html`: one file, pictures and styles inside, nothing fetched."""

import base64
import io
import re
from html import escape
from pathlib import Path
from typing import Any

from steersman.demo.results import Results, SteeredTarget
from steersman.figures import png
from steersman.files import write_text
from steersman.steer import plot_decompositions
from steersman.visible import visible

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ddd; --shade: #f4f4f5;
  --plain: #8a8f98; --steered: #2563eb; --steered-shade: #e8effd; --mark: #ffe08a; --mark-ink: #222; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e7; --paper: #18181b; --faint: #a1a1aa; --line: #3f3f46;
  --shade: #232326; --plain: #71717a; --steered: #60a5fa; --steered-shade: #1c2740; --mark: #8a6d1a;
  --mark-ink: #fff; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: 1em 0; overflow-wrap: normal; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; text-align: left; vertical-align: top; }
tr:nth-child(even) { background: var(--shade); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8em; margin: .8em 0; } .pair > * { min-width: 0; }
.box { background: var(--shade); border-left: 4px solid var(--plain); padding: .5em .8em; }
.box b { display: block; font-size: 12px; letter-spacing: .04em; text-transform: uppercase; color: var(--faint); }
.box.steered { background: var(--steered-shade); border-color: var(--steered); }
.box.steered b { color: var(--steered); } .box p { margin: .2em 0 0; }
mark { background: var(--mark); color: var(--mark-ink); }
.context { font-family: ui-monospace, monospace; font-size: 13px; }
img { max-width: 100%; background: #fff; border-radius: 4px; } details { margin: .3em 0; }
.muted { color: var(--faint); }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; gap: .4em; } td, th { padding: .2em .5em; } }
"""

FIGURES = {
    "fvu": "variance left unexplained (FVU)",
    "fvu_ordinary": "the same without rows of huge norm",
    "n_large": "rows of huge norm",
    "cosine": "cosine of input and reconstruction",
    "explained_variance": "variance explained",
    "relative_norm": "length of the reconstruction over that of the input",
    "l0": "active features a token (L0)",
    "dead_share": "features that never fire",
    "dense_share": "features that fire on more than a tenth of the tokens",
    "n_tokens": "tokens measured",
    "ce_unsteered": "loss of the model, nats a token",
    "ce_spliced": "loss with the reconstruction in its place",
    "ce_mean_ablated": "loss with the mean activation in its place",
    "ce_recovered": "loss recovered (1 is all of it)",
    "kl": "KL of the model from itself with the reconstruction, nats",
    "n_predictions": "tokens predicted",
}
"""Name of a figure -> what it is called in the report."""


def write_report(results: Results, path: Path) -> None:
    """Write the report of a quickstart to `path`."""
    sections = [_measures(results), _training(results), _concepts(results), _steering(results)]
    sections += [_targeting(results), _contrast(results), _features(results)]
    body = "\n".join(section for section in sections if section)
    head = f"<h1>Steersman on {escape(results.model_name)}</h1><p>{escape(results.hook_name)}</p>"
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Steersman</title><style>{STYLE}</style>"
    page += f"<meta name='viewport' content='width=device-width, initial-scale=1'><body>{head}{body}</body></html>\n"
    write_text(path, page)


def _table(header: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, int | float)
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if number else escape(str(value))
        return f"<td{' class=number' if number else ''}>{text}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _pairs(names: tuple[str, str], pairs: list[tuple[str, str]], words: tuple[str, ...]) -> str:
    """Texts side by side, or on a phone one below the other, each under its name."""
    boxes = []
    for texts in pairs:
        sides = zip(("box plain", "box steered"), names, texts)
        inside = [f"<div class='{c}'><b>{escape(name)}</b><p>{_marked(t, words)}</p></div>" for c, name, t in sides]
        boxes.append(f"<div class=pair>{''.join(inside)}</div>")
    return "\n".join(boxes)


def _picture(png: bytes, what: str) -> str:
    return f"<img alt='{escape(what)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _measures(results: Results) -> str:
    evaluation = results.evaluation.to_json()
    figures = [item for part in evaluation.values() if part for item in part.items()]
    rows = [
        [FIGURES.get(name, name.replace("_", " ")), "not defined" if value is None else value]
        for name, value in figures
    ]
    return "<h2>The SAE</h2>" + _table(["measure", "on what was held out"], rows)


def _training(results: Results) -> str:
    names = [("loss.png", "loss over tokens"), ("density.png", "feature densities")]
    found = [(results.run / name, what) for name, what in names if (results.run / name).is_file()]
    return "<h2>Training</h2>" + "".join(_picture(file.read_bytes(), what) for file, what in found)


def _concepts(results: Results) -> str:
    if not results.concepts:
        return ""
    clear = sum(match.auroc >= 0.95 for match in results.concepts)
    intro = f"<p>{clear} of {len(results.concepts)} concepts have a feature with an AUROC of at least 0.95, chosen on "
    intro += "one half of fresh stories and measured on the other.</p>"
    rows: list[list[Any]] = [[m.concept, m.feature, m.auroc, m.n_tokens] for m in results.concepts]
    table = _table(["concept", "feature", "AUROC", "tokens"], rows)
    return f"<h2>Features that match concepts</h2>{intro}<details open><summary>table</summary>{table}</details>"


def _steering(results: Results) -> str:
    if not results.steered:
        return ""
    parts = ["<h2>Steering by feature</h2>", _picture(_dose_plot(results.steered), "dose-response curves")]
    for steered in results.steered:
        plain, best = steered.doses[0], steered.dose
        parts.append(f"<h3>{escape(steered.target.name)}: feature {steered.feature}</h3>")
        parts.append(
            f"<p>At {best.strength:g} times its largest activation, words of the target go from {plain.rate:.1f} to "
            f"{best.rate:.1f} in 100, and the text costs {best.nll - plain.nll:+.2f} nats per token under the "
            "unsteered model.</p>"
        )
        pairs = list(zip(plain.texts, best.texts))[:4]
        parts.append(_pairs(("unsteered", "steered"), pairs, steered.target.words))
    return "\n".join(parts)


def _targeting(results: Results) -> str:
    targeted = results.targeted
    if targeted is None:
        return ""
    name = escape(targeted.target.name)
    intro = (
        f"<p>SAE-TS looks for the vector whose effect on text is feature {targeted.feature}, which fires when the "
        f"words of {name} are read, and little else: from the measured effects of {targeted.n_vectors} directions "
        f"(signal of this feature {targeted.signal:.1f} times noise). Its cosine to the feature's own direction is "
        f"{targeted.cosine:.2f}. All push equally hard: the same KL per token on held-out texts.</p>"
    )
    header = ["", "norm", "KL per token", f"words of {targeted.target.name} per 100", "nats per token"]
    table = _table(header, [[way.name, way.norm, way.kl, way.rate, way.nll] for way in targeted.ways])
    plain, optimised = targeted.ways[1], targeted.ways[-1]
    pairs = list(zip(plain.texts, optimised.texts))[:4]
    boxes = _pairs((plain.name, optimised.name), pairs, targeted.target.words)
    return "\n".join([f"<h2>A vector for what a feature does: {name}</h2>", intro, table, boxes])


def _contrast(results: Results) -> str:
    contrast = results.contrast
    if contrast is None:
        return ""
    found, kept = contrast.found, contrast.kept
    names = f"{escape(contrast.concept)} less {escape(contrast.against)}"
    explained, chance = found.explained_variance, float(found.null_curve[-1])
    intro = (
        f"<p>The difference of the mean states at words of {escape(contrast.concept)} and of "
        f"{escape(contrast.against)}, as {len(found)} signed features by matching pursuit: they explain "
        f"{explained:.3f} of it (as many explain {chance:.3f} of a random direction). Steering with the reconstruction "
        f"at equal norm keeps {kept['reconstruction, equal norm'].retained:.2f} of its effect on the next token.</p>"
    )
    rows: list[list[Any]] = [
        [feature, coefficient, cosine, label]
        for feature, coefficient, cosine, label in zip(
            found.features.tolist(), found.coefficients.tolist(), found.cosines.tolist(), found.labels
        )
    ]
    ways = [[way.name, way.norm, way.kl, way.retained, way.rise or 0.0] for way in kept.variants]
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in found.warnings)
    return "\n".join(
        [
            f"<h2>A vector taken apart: {names}</h2>",
            intro,
            "<div class=pair><div>",
            _table(["feature", "coefficient", "cosine", "what it stands for, or promotes"], rows),
            f"</div><div>{_picture(png(plot_decompositions({found.method: found})), 'explained variance')}",
            f"<ul class=muted>{warnings}</ul></div></div>",
            _table(["steering with", "norm", "KL per token", "effect kept", "rise of its words"], ways),
        ]
    )


def _marked(text: str, words: tuple[str, ...]) -> str:
    pattern = r"\b(" + "|".join(re.escape(escape(word)) for word in words) + r")\b"
    return re.sub(pattern, r"<mark>\1</mark>", escape(visible(text)), flags=re.IGNORECASE)


def _dose_plot(steered: list[SteeredTarget]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for target in steered:
        strengths = [dose.strength for dose in target.doses]
        left.plot(strengths, [dose.rate for dose in target.doses], marker="o", label=target.target.name)
        right.plot(strengths, [dose.nll for dose in target.doses], marker="o", label=target.target.name)
    left.set(xlabel="strength (x largest activation)", ylabel="target words per 100 words")
    right.set(xlabel="strength (x largest activation)", ylabel="nats per token, unsteered model")
    left.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _features(results: Results) -> str:
    names = {match.feature: match.concept for match in reversed(results.concepts)}
    alive = sorted((f for f in results.features if f.contexts), key=lambda feature: -feature.typical_act)
    parts = [f"<h2>Features</h2><p class=muted>{len(alive)} of {len(results.features)} fired on the store.</p>"]
    for feature in alive:
        name = f" · {escape(names[feature.id])}" if feature.id in names else ""
        head = f"{feature.id}{name} · density {100 * feature.density:.2f} % · max {feature.max_act:.1f}"
        fires, promotes = (
            escape(" ".join(f"“{visible(token)}”" for token in tokens))
            for tokens in (feature.fires_on, feature.promotes)
        )
        promotes = f"<p class=muted>fires on {fires}<br>promotes {promotes}</p>"
        contexts = "".join(
            f"<div class=context>{c.activation:.1f} {escape(visible(c.before))}<mark>{escape(visible(c.token))}</mark>"
            f"{escape(visible(c.after))}</div>"
            for c in feature.contexts
        )
        parts.append(f"<details><summary>{head}</summary>{promotes}{contexts}</details>")
    return "\n".join(parts)
