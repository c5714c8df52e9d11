"""What is known of one feature, and how it looks on a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from steersman.sae.feature_labels import FeatureLabels
from steersman.visible import visible

_NEWLINE = "⏎"


@dataclass(frozen=True, kw_only=True)
class Context:
    """One token that a feature fires on, in its text."""

    activation: float
    """The feature's activation on the token."""
    before: str
    """Text before the token that the model read with it: within its document and its context."""
    token: str
    """The token itself."""
    after: str
    """Text after the token, within its document and its context."""
    document: int
    """Number of the document in the text source."""
    position: int
    """Place of the token in its context."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What is known of one feature."""

    id: int
    """Feature id."""
    density: float
    """Fraction of the tokens it is active on."""
    max_act: float
    """Largest activation on ordinary rows (see `FeatureStats`)."""
    typical_act: float
    """Its tenth largest activation, 0 where it has fewer: how strongly it fires in several places, which a few odd
    tokens do not raise as they do `max_act`."""
    p999: float
    """99.9th percentile of its activations, over the ordinary rows it is active on."""
    fires_on: list[str]
    """Tokens at its largest activations, those with most of them first: what it stands for, most of all in early
    layers, whose decoder rows are far from the output."""
    promotes: list[str]
    """Tokens whose logits its decoder row raises most, largest first (empty for models without an output layer)."""
    suppresses: list[str]
    """Tokens whose logits it lowers most."""
    contexts: list[Context]
    """Its largest activations, at most one a document while there are enough documents; on rows of huge norm only where
    it fires on no other."""


def _quoted(tokens: list[str]) -> str:
    return "  ".join(f"'{visible(token, newline=_NEWLINE)}'" for token in tokens)


def features_to_text(features: Sequence[Feature], labels: FeatureLabels | None = None) -> str:
    """Features for a terminal, with their labels: the token that fired stands between «» in each context."""
    lines = []
    for feature in features:
        label = "" if labels is None else labels.text(feature.id)
        head = "   ".join([f"feature {feature.id}", *([visible(label)] if label else [])])
        figures = f"density {100 * feature.density:.3f} %   max {feature.max_act:.2f}   p99.9 {feature.p999:.2f}"
        lines.append(f"{head}   {figures}")
        if feature.fires_on:
            lines.append("  fires on    " + _quoted(feature.fires_on))
        if feature.promotes:
            lines.append("  promotes    " + _quoted(feature.promotes))
            lines.append("  suppresses  " + _quoted(feature.suppresses))
        for context in feature.contexts:
            text = visible(f"{context.before}«{context.token}»{context.after}", newline=_NEWLINE)
            lines.append(f"  {context.activation:8.2f}  {text}")
        if not feature.contexts:
            lines.append("  never active on this store")
        elif feature.max_act == 0:
            lines.append("  active on rows of huge norm alone (attention sinks)")
        lines.append("")
    return "\n".join(lines)
