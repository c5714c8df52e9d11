"""The quickstart's `report.html`: one file, pictures and styles inside, nothing fetched."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.demo.results import Results, SteeredTarget
from steersman.files import write_text
from steersman.html import render
from steersman.sae.feature_labels import FeatureLabels
from steersman.steer import plot_decompositions
from steersman.ui.site.pages import figure, percent
from steersman.visible import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


_SHOWN = 24
"""Features in the report's table."""

Pairs = list[tuple[list[tuple[str, bool]], list[tuple[str, bool]]]]
"""Texts side by side, each in parts of which some are marked."""


def write_report(results: Results, path: Path, labels: FeatureLabels | None = None, site: str = "") -> None:
    """Write the report of a quickstart to `path`. `site` is where the site of its features is, as seen from there."""
    page = render(
        "report.html",
        model=visible(results.model_name),
        hook=visible(results.hook_name),
        site=site,
        key=_key(results),
        measures=_measures(results),
        training=_training(results),
        concepts=_concepts(results),
        steering=_steering(results),
        targeting=_targeting(results),
        contrast=_contrast(results),
        features=_features(results, labels or FeatureLabels()),
    )
    write_text(path, page)


def _key(results: Results) -> list[tuple[str, str]]:
    """What is to be seen first."""
    measured = results.evaluation.reconstruction
    key = [
        ("variance explained", percent(measured.explained_variance)),
        ("active features a token", figure(measured.l0)),
    ]
    if results.evaluation.loss is not None:
        key.append(("loss recovered", percent(results.evaluation.loss.ce_loss_score)))
    if results.concepts:
        key.append(("concepts with a clear feature", f"{_clear(results)} of {len(results.concepts)}"))
    if results.steered:
        best = max(results.steered, key=lambda one: one.dose.rate - one.doses[0].rate)
        rates = f"{best.doses[0].rate:.1f} → {best.dose.rate:.1f}"
        key.append((f"words of {visible(best.target.name)} per 100, steered", rates))
    return key


def _clear(results: Results) -> int:
    return sum(match.auroc >= 0.95 for match in results.concepts)


def _pairs(pairs: Sequence[tuple[str, str]], words: Sequence[str]) -> Pairs:
    return [(_marked(plain, words), _marked(steered, words)) for plain, steered in pairs]


def _marked(text: str, words: Sequence[str]) -> list[tuple[str, bool]]:
    """The parts of a text, and whether each is one of `words`."""
    pattern = r"\b(" + "|".join(re.escape(word) for word in words) + r")\b"
    parts = re.split(pattern, visible(text), flags=re.IGNORECASE) if words else [visible(text)]
    return [(part, place % 2 == 1) for place, part in enumerate(parts) if part]


def _measures(results: Results) -> list[list[Any]]:
    return [
        [FIGURES.get(name, name.replace("_", " ")), "not defined" if value is None else value]
        for name, value in results.evaluation.figures().items()
    ]


def _training(results: Results) -> list[tuple[bytes, str]]:
    names = [("loss.png", "Loss over tokens"), ("density.png", "Feature densities")]
    found = [(results.run / name, what) for name, what in names if (results.run / name).is_file()]
    return [(file.read_bytes(), what) for file, what in found]


def _concepts(results: Results) -> dict[str, Any] | None:
    if not results.concepts:
        return None
    intro = f"{_clear(results)} of {len(results.concepts)} concepts have a feature with an AUROC of at least 0.95, "
    return {"intro": intro + "chosen on one half of fresh stories and measured on the other.", "rows": results.concepts}


def _steering(results: Results) -> dict[str, Any] | None:
    if not results.steered:
        return None
    targets = []
    for steered in results.steered:
        plain, best = steered.doses[0], steered.dose
        text = (
            f"At {best.strength:g} times its largest activation, words of the target go from {plain.rate:.1f} to "
            f"{best.rate:.1f} in 100, and the text costs {best.nll - plain.nll:+.2f} nats per token under the "
            "unsteered model."
        )
        pairs = _pairs(list(zip(plain.texts, best.texts))[:4], steered.target.words)
        targets.append({"name": steered.target.name, "feature": steered.feature, "text": text, "pairs": pairs})
    return {"figure": _dose_plot(results.steered), "targets": targets}


def _targeting(results: Results) -> dict[str, Any] | None:
    targeted = results.targeted
    if targeted is None:
        return None
    name = visible(targeted.target.name)
    intro = (
        f"SAE-TS looks for the vector whose effect on text is feature {targeted.feature}, which fires when the "
        f"words of {name} are read, and little else: from the gradients of {targeted.n_texts} unsteered texts "
        f"(signal of this feature {targeted.signal:.1f} times noise). Its cosine to the feature's own direction is "
        f"{targeted.cosine:.2f}. All push equally hard: the same KL per token on held-out texts."
    )
    plain, optimised = targeted.ways[1], targeted.ways[-1]
    return {
        "name": name,
        "intro": intro,
        "header": ["vector", "norm", "KL per token", f"words of {name} per 100", "nats per token"],
        "rows": [[way.name, way.norm, way.kl, way.rate, way.nll] for way in targeted.ways],
        "names": (plain.name, optimised.name),
        "pairs": _pairs(list(zip(plain.texts, optimised.texts))[:4], targeted.target.words),
    }


def _contrast(results: Results) -> dict[str, Any] | None:
    contrast = results.contrast
    if contrast is None:
        return None
    found, kept = contrast.found, contrast.kept
    explained, chance = found.explained_variance, float(found.null_curve[-1])
    intro = (
        f"The difference of the mean states at words of {visible(contrast.concept)} and of "
        f"{visible(contrast.against)}, as {len(found)} signed features by matching pursuit: they explain "
        f"{explained:.3f} of it (as many explain {chance:.3f} of a random direction). Steering with the reconstruction "
        f"at equal norm keeps {kept['reconstruction, equal norm'].retained:.2f} of its effect on the next token."
    )
    return {
        "name": visible(f"{contrast.concept} less {contrast.against}"),
        "intro": intro,
        "terms": list(zip(found.features.tolist(), found.coefficients.tolist(), found.cosines.tolist(), found.labels)),
        "figure": plot_decompositions({found.method: found}),
        "warnings": found.warnings,
        "ways": [[way.name, way.norm, way.kl, way.retained, way.rise or 0.0] for way in kept.variants],
    }


def _dose_plot(steered: list[SteeredTarget]) -> "Figure":
    from matplotlib.figure import Figure

    made = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = made.subplots(1, 2)
    for target in steered:
        strengths = [dose.strength for dose in target.doses]
        left.plot(strengths, [dose.rate for dose in target.doses], marker="o", label=target.target.name)
        right.plot(strengths, [dose.nll for dose in target.doses], marker="o", label=target.target.name)
    left.set(xlabel="strength (x largest activation)", ylabel="target words per 100 words")
    right.set(xlabel="strength (x largest activation)", ylabel="nats per token, unsteered model")
    left.legend(fontsize=8)
    return made


def _features(results: Results, labels: FeatureLabels) -> dict[str, Any]:
    alive = sorted((one for one in results.features if one.contexts), key=lambda one: -one.typical_act)
    rows = [
        {
            "id": one.id,
            "label": labels.text(one.id),
            "density": percent(one.density),
            "largest": figure(one.max_act),
            "fires_on": [visible(token) for token in one.fires_on[:4]],
            "promotes": [visible(token) for token in one.promotes[:5]],
        }
        for one in alive[:_SHOWN]
    ]
    intro = (
        f"{len(alive)} of {len(results.features)} fired on the store; here those that typically do so most strongly."
    )
    return {"intro": intro, "rows": rows}
