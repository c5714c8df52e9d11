"""What the page of a feature shows, as text and numbers: its template makes HTML of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from steersman.html import level
from steersman.sae.feature_labels import FeatureLabels
from steersman.train.reports.contexts import TokenContext, TokenValue
from steersman.train.reports.detailed import N_INTERVALS, ContextGroup, FeatureDetail
from steersman.train.reports.feature import Feature
from steersman.visible import visible

_HEIGHT = 40


class Run(NamedTuple):
    """A token that the feature fires on, or a stretch of text that it does not."""

    text: str
    depth: str
    """Class of its colour; none where the feature is silent."""
    value: str


class ShownContext(NamedTuple):
    """A context in two halves: before the token that it is about, and from there on."""

    value: str
    before: list[Run]
    after: list[Run]


class ShownGroup(NamedTuple):
    """The contexts of one interval."""

    name: str
    share: str
    depth: str
    contexts: list[ShownContext]


class Bars(NamedTuple):
    """The bars of one interval as an SVG path."""

    depth: str
    path: str


class Histogram(NamedTuple):
    """Activations in equal parts of 0 to the largest."""

    text: str
    """The same in words."""
    width: int
    top: str
    bars: list[Bars]


class Other(NamedTuple):
    """Another feature, in a list."""

    id: int
    figure: str
    text: str


class FeaturePage(NamedTuple):
    """Everything on the page of one feature."""

    id: int
    label: str
    facts: list[tuple[str, str]]
    groups: list[ShownGroup]
    histogram: Histogram | None
    fires_on: list[str]
    promotes: list[str]
    suppresses: list[str]
    neighbours: list[Other]
    partners: list[Other]


_visible: Callable[[str], str] = lru_cache(1 << 16)(visible)


def figure(value: float) -> str:
    """A number to three digits, without an exponent where it is not tiny.

    >>> figure(29.83), figure(12345.6), figure(0.00012), figure(0.0)
    ('29.8', '12,346', '0.00012', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as per cent.

    >>> percent(0.00743), percent(0.0)
    ('0.743 %', '0 %')
    """
    return f"{figure(100 * share)} %"


def in_words(feature: Feature, labels: FeatureLabels, n: int = 2) -> str:
    """A few words for a feature in a list: its label, else the tokens it fires on."""
    label = labels.text(feature.id)
    return _visible(label or " ".join(token.strip() for token in feature.fires_on[:n]))


def feature_page(
    detail: FeatureDetail, features: Sequence[Feature], labels: FeatureLabels, scores: Mapping[str, float], share: float
) -> FeaturePage:
    """The page of `detail`, which links to others of `features`. `share` is that of the tokens on which pairs of
    features were counted."""
    one = detail.feature
    return FeaturePage(
        id=one.id,
        label=_visible(labels.text(one.id)),
        facts=_facts(detail, scores),
        groups=[_group(group, one.max_act) for group in detail.groups],
        histogram=_histogram(detail) if detail.count else None,
        fires_on=[_visible(token) for token in one.fires_on],
        promotes=[_visible(token) for token in one.promotes],
        suppresses=[_visible(token) for token in one.suppresses],
        neighbours=[
            Other(near.feature, f"{near.cosine:.2f}", in_words(features[near.feature], labels))
            for near in detail.neighbours
        ],
        partners=[
            Other(
                near.feature,
                f"{near.cosine:.2f} · {'' if share == 1 else '≈ '}{near.together:,}",
                in_words(features[near.feature], labels),
            )
            for near in detail.partners
        ],
    )


def _facts(detail: FeatureDetail, scores: Mapping[str, float]) -> list[tuple[str, str]]:
    one = detail.feature
    facts = [("density", percent(one.density)), ("tokens", f"{detail.count:,}"), ("largest", figure(one.max_act))]
    if detail.count:
        facts += [("tenth largest", figure(one.typical_act)), ("mean", figure(detail.mean_act))]
        facts += [("99.9 %", figure(one.p999))]
    return facts + [(f"{name} score", figure(value)) for name, value in scores.items() if not math.isnan(value)]


def _group(group: ContextGroup, max_act: float) -> ShownGroup:
    largest = max_act or max(abs(context.value) for context in group.contexts)
    if group.share is None:
        name = "Largest" if max_act else "On rows of huge norm alone (attention sinks)"
        share = "then drawn from each interval, with its share of the activations" if max_act else ""
    else:
        name, share = f"{figure(group.low)} to {figure(group.high)}", percent(group.share)
    return ShownGroup(name, share, level(group.high, largest), [_context(one, largest) for one in group.contexts])


def _context(context: TokenContext, largest: float) -> ShownContext:
    before, after = context.tokens[: context.centre], context.tokens[context.centre :]
    return ShownContext(figure(context.value), _runs(before, largest), _runs(after, largest))


def _runs(tokens: Sequence[TokenValue], largest: float) -> list[Run]:
    """Tokens of no activation are joined: what they need no markup for."""
    runs: list[Run] = []
    for token in tokens:
        text = _visible(token.text)
        if token.value:
            runs.append(Run(text, level(token.value, largest), figure(token.value)))
        elif runs and not runs[-1].depth:
            runs[-1] = Run(runs[-1].text + text, "", "")
        else:
            runs.append(Run(text, "", ""))
    return runs


def _histogram(detail: FeatureDetail) -> Histogram:
    counts, top = detail.histogram, detail.feature.max_act
    scale = (_HEIGHT - 1) / math.log1p(max(counts))
    each = len(counts) // N_INTERVALS
    bars, words = [], []
    for part in range(N_INTERVALS):
        path = []
        for place in range(part * each, (part + 1) * each):
            if counts[place]:
                height = round(1 + scale * math.log1p(counts[place]))
                path.append(f"M{place} {_HEIGHT}V{_HEIGHT - height}")
        bars.append(Bars(level(part + 1, N_INTERVALS), "".join(path)))
        words.append(f"{sum(counts[part * each : (part + 1) * each]):,}")
    text = f"Histogram: {', '.join(words)} tokens in fifths of 0 to {figure(top)}"
    return Histogram(text, len(counts), figure(top), [one for one in bars if one.path])
