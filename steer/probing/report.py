"""What probing found, as tables and as plain values."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

from steersman.sae import FeatureLabels
from steersman.steer.evaluation.bootstrap import Estimate
from steersman.steer.probing.absorption import LabelAbsorption
from steersman.visible import visible

TITLES = {
    "sae": "features of the SAE",
    "random_features": "random features of it",
    "random_sae": "an SAE that learned nothing",
    "raw": "raw activations",
}


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """How well one kind of probe tells a label, or all labels on average, on the held-out texts."""

    of: str
    """What it reads: sae, random_features, random_sae, raw, or the name of a further SAE."""
    k: int | None
    """How many features; None for the raw activations, of which it reads all."""
    auroc: Estimate
    """Area under the ROC curve of its logit, with the 95 % interval over texts."""
    accuracy: float
    """Share of the samples that the sign of the logit tells rightly, averaged over the two sides: 0.5 is chance."""
    f1: float
    """F1 score of the samples with the label, at the threshold that is best on the training samples."""


@dataclass(frozen=True, kw_only=True)
class LabelProbe(ProbeScore):
    """One probe of one label."""

    label: str
    """The label, against all others."""
    features: tuple[int, ...]
    """The features that it reads, most telling first; of random ones and of raw activations none."""
    l2: float
    """The penalty that was chosen."""
    positives: int
    """Held-out samples that have the label."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedFeatures(Sequence[LabelProbe]):
    """Probes of all labels, of one label after another."""

    probes: list[LabelProbe]
    """The probes."""
    means: list[ProbeScore]
    """The same, averaged over the labels."""
    absorption: list[LabelAbsorption] | None
    """Splitting and absorption of each label; None where they were not measured."""
    classes: list[str]
    """The labels."""
    hook_name: str
    """Where the states were read."""
    level: Literal["text", "token"]
    """What a sample is."""
    pool: str
    """How the tokens of a text became one sample; of tokens nothing."""
    n_training: int
    """Texts that the probes were chosen and fitted on."""
    n_heldout: int
    """Texts that they were measured on."""
    feature_labels: FeatureLabels
    """What the SAE's features are called."""

    @overload
    def __getitem__(self, index: int) -> LabelProbe: ...
    @overload
    def __getitem__(self, index: slice) -> list[LabelProbe]: ...
    def __getitem__(self, index: int | slice) -> LabelProbe | list[LabelProbe]:
        return self.probes[index]

    def __len__(self) -> int:
        return len(self.probes)

    def __iter__(self) -> Iterator[LabelProbe]:
        return iter(self.probes)

    def __repr__(self) -> str:
        best = ", ".join(f"{score.auroc.mean:.3f} with {score.k}" for score in self.means if score.of == "sae")
        return f"ProbedFeatures({len(self.classes)} labels at {self.hook_name}, AUROC {best})"

    def mean(self, of: str, k: int | None = None) -> ProbeScore:
        """The average over labels of one kind of probe. Raises KeyError where there is none."""
        for score in self.means:
            if (score.of, score.k) == (of, k):
                return score
        raise KeyError(f"no probe of {of} with {k} features")

    def _by_label(self) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Header and rows of the table of labels."""
        shown = [(of, k) for of, k in ((s.of, s.k) for s in self.means) if of in ("sae", "raw")]
        header = ["label", "samples", "feature", *(f"AUROC {k}" if k else "raw" for _, k in shown), "called"]
        rows = []
        for label in self.classes:
            probes = {(p.of, p.k): p for p in self.probes if p.label == label}
            one = probes[shown[0]]
            feature = one.features[0]
            rows.append(
                (label, str(one.positives), str(feature), *(probes[key].auroc.mean for key in shown),
                 self.feature_labels.text(feature))
            )  # fmt: skip
        return header, rows

    def to_text(self) -> str:
        """A table of the averages, and one of the labels."""
        samples = "tokens" if self.level == "token" else f"texts ({self.pool} of their tokens)"
        lines = [
            f"{len(self.classes)} {'label' if len(self.classes) == 1 else 'labels, each against the rest'}: {samples} "
            f"at {self.hook_name}; fitted on {self.n_training} texts, measured on {self.n_heldout} others (95 %)",
            f"{'probe':<28} {'features':>8}  {'AUROC':<22} {'accuracy':>8}  {'F1':>5}",
        ]
        for score in self.means:
            title = TITLES.get(score.of, score.of)
            features = "all" if score.k is None else str(score.k)
            lines.append(f"{title:<28} {features:>8}  {score.auroc!s:<22} {score.accuracy:>8.3f}  {score.f1:>5.3f}")
        header, rows = self._by_label()
        width = max(5, *(len(visible(name)) for name in self.classes))
        lines += ["", f"{header[0]:<{width}}  " + "  ".join(f"{name:>8}" for name in header[1:-1]) + "  " + header[-1]]
        for name, samples, feature, *values, called in rows:
            cells = "  ".join(f"{value:>8.3f}" for value in values)
            lines.append(f"{visible(name):<{width}}  {samples:>8}  {feature:>8}  {cells}  {visible(called)}".rstrip())
        if self.absorption is not None:
            lines += ["", *_absorption_lines(self.absorption, width)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from steersman.html import fragment

        header, rows = self._by_label()
        means = ", ".join(
            f"{TITLES.get(s.of, s.of)} {'' if s.k is None else s.k} {s.auroc.mean:.3f}" for s in self.means
        )
        return fragment("table.html", header=header, rows=rows, caption=f"mean AUROC: {means}")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "hook_name": self.hook_name, "level": self.level, "pool": self.pool, "classes": self.classes,
            "n_training": self.n_training, "n_heldout": self.n_heldout,
            "means": [asdict(score) for score in self.means], "probes": [asdict(probe) for probe in self.probes],
            "absorption": None if self.absorption is None else [asdict(one) for one in self.absorption],
        }  # fmt: skip


def _absorption_lines(found: Sequence[LabelAbsorption], width: int) -> Iterator[str]:
    yield f"{'label':<{width}}  {'features':>8}  {'F1':>5}  {'silent':>6}  {'absorbed':>8}  {'fraction':>8}  by"
    for one in found:
        by = ", ".join(f"{absorber.feature} ({absorber.n})" for absorber in one.absorbers[:3])
        yield (
            f"{visible(one.label):<{width}}  {len(one.features):>8}  {one.f1:>5.3f}  {one.silent:>6.3f}  "
            f"{one.absorbed:>8.3f}  {one.fraction:>8.3f}  {by}"
        ).rstrip()
    rows = [(len(one.features), one.f1, one.silent, one.absorbed, one.fraction) for one in found]
    features, f1, silent, absorbed, fraction = (sum(column) / len(rows) for column in zip(*rows))
    yield f"{'mean':<{width}}  {features:>8.2f}  {f1:>5.3f}  {silent:>6.3f}  {absorbed:>8.3f}  {fraction:>8.3f}"
