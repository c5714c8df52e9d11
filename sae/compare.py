"""Which features of several SAEs are the same: over seeds, widths, layers, architectures.

Similarity c_ij of feature i of one SAE and j of another:

    decoder       cos(d_i, d'_j)                             what they write
    encoder       cos(e_i, e'_j)                             what they read
    both          (cos(d_i, d'_j) + cos(e_i, e'_j)) / 2      (arXiv 2501.16615, in one assignment)
    activations   Pearson correlation of f_i and f'_j over the rows of a store

From it, for SAEs of L and M features:

    mean max  = 1/L sum_i max_j c_ij                         each way
    MCC       = max over matchings P of 1/min(L, M) sum_(i,j in P) c_ij     (PW-MCC, arXiv 2505.20254)
    shared    = the share of the min(L, M) pairs of that matching whose c_ij is above `threshold` (0.7)

A matching pairs each feature with one other at most (the assignment problem). Where an SAE's activations may be
negative the sign of a row means nothing, and |c_ij| is compared. In D dimensions rows that were never trained are
alike too, the more so the more there are: `chance` is what random rows reach.

Shape letters: L, M features of two SAEs, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

from steersman.errors import SteersmanError
from steersman.html import card
from steersman.sae.base import SAE
from steersman.sae.feature_labels import FeatureLabels
from steersman.sae.matching import FeatureMatching, RowSource, by_chance_of, correlations, cosines, matching, row_widths
from steersman.visible import visible

Similarity = Literal["decoder", "encoder", "both", "activations"]
"""What of the features is compared."""
SHARED = 0.7
"""Similarity above which a matched pair counts as one feature (arXiv 2501.16615)."""
MAX_PAIRS = 268_435_456
"""Pairs of features up to which the assignment problem is solved: 2 GiB of similarities."""
SHOWN = 10
"""Unmatched features of each SAE that a table shows."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A feature on its way through several SAEs."""

    sae: int
    """Which of the SAEs, in their order."""
    feature: int
    """Its id there."""
    similarity: float
    """How much it is like the one that it was found from; 1 for the one that was asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SAEComparison:
    """The features of several SAEs beside one another: {(i, j): matching} for i < j, read as `found[0, 1]`."""

    names: tuple[str, ...]
    """What each SAE is called."""
    about: tuple[str, ...]
    """What each is."""
    by: Similarity
    """What was compared."""
    matchings: Mapping[tuple[int, int], FeatureMatching]
    """(i, j), i < j -> how SAEs i and j correspond."""
    labels: tuple[FeatureLabels, ...] = field(repr=False)
    """The labels of each SAE's features."""

    def __getitem__(self, pair: tuple[int, int]) -> FeatureMatching:
        return self.matchings[pair]

    def __repr__(self) -> str:
        return f"SAEComparison({', '.join(self.names)} by {self.by}: MCC {_figure(self.mcc)})"

    @property
    def mcc(self) -> float | None:
        """The mean of all pairs' MCC; None where one has none."""
        found = [one.mcc for one in self.matchings.values() if one.mcc is not None]
        return sum(found) / len(found) if len(found) == len(self.matchings) else None

    def matrix(self) -> list[list[float | None]]:
        """MCC of each with each, 1 on the diagonal."""
        n = len(self.names)
        rows: list[list[float | None]] = [[1.0] * n for _ in range(n)]
        for (i, j), one in self.matchings.items():
            rows[i][j] = rows[j][i] = one.mcc
        return rows

    def along(self, feature: int, start: int = 0) -> list[Step]:
        """The table read along the order in which the SAEs were given, such as that of their layers: a feature of SAE
        `start`, in each SAE after it the feature most like the one before, and before it likewise (the flow of a
        feature through layers, arXiv 2502.03032; with nulls and to steer by it: `steersman.steer.feature_flow`).

        Raises SteersmanError for an SAE or a feature that is not there.
        """
        if not 0 <= start < len(self.names):
            raise SteersmanError(f"there is no SAE {start}: there are 0 to {len(self.names) - 1}")
        n = self.n_features(start)
        if not 0 <= feature < n:
            raise SteersmanError(f"feature {feature} is out of range: {self.names[start]} has features 0 to {n - 1}")
        return [
            *reversed(self._following(feature, range(start, -1, -1))[1:]),
            *self._following(feature, range(start, len(self.names))),
        ]

    def _following(self, feature: int, order: Sequence[int]) -> list[Step]:
        """The feature in the first SAE of the order, and in each next one the feature most like the one before."""
        found = [Step(sae=order[0], feature=feature, similarity=1.0)]
        for here, there in pairwise(order):
            one, side = self.matchings[min(here, there), max(here, there)], int(there < here)
            at = found[-1].feature
            similarity = float(one.similarity[side][at])
            found.append(Step(sae=there, feature=int(one.nearest[side][at]), similarity=similarity))
        return found

    def n_features(self, i: int) -> int:
        """How many features SAE i has."""
        (pair, one), *_ = ((pair, one) for pair, one in self.matchings.items() if i in pair)
        return len(one.nearest[pair.index(i)])

    def along_to_text(self, steps: Sequence[Step]) -> str:
        """A line for each SAE: the feature, how much it is like the one it was found from, and its label."""
        lines = [
            (self.names[one.sae], str(one.feature), _figure(one.similarity), self.labels[one.sae].text(one.feature))
            for one in steps
        ]
        return _aligned([("", "feature", "similarity", "label"), *lines])

    def to_json(self) -> dict[str, Any]:
        """All figures, with every unmatched feature."""
        pairs = [
            one.record((self.names[i], self.names[j]), (self.labels[i], self.labels[j]))
            for (i, j), one in self.matchings.items()
        ]
        threshold = next(iter(self.matchings.values())).threshold
        saes = [{"name": name, "sae": about} for name, about in zip(self.names, self.about)]
        return {"by": self.by, "threshold": threshold, "saes": saes, "mcc": self.mcc, "pairs": pairs}

    def _tables(self, shown: int) -> list[tuple[str, list[str], list[list[object]]]]:
        """(what it is, header, rows) of each table."""
        threshold = next(iter(self.matchings.values())).threshold
        head = ["SAEs", "mean max", "back", "MCC", "by chance", f"shared > {threshold:g}", "unmatched"]
        rows: list[list[object]] = []
        for (i, j), one in self.matchings.items():
            left = [len(one.unmatched(side)) for side in (0, 1)]
            figures = [*(_figure(value) for value in one.mean_max), _figure(one.mcc), _figure(one.chance)]
            rows.append(
                [f"{self.names[i]} {self.names[j]}", *figures, f"{one.shared:.1%}", f"{left[0]:,} and {left[1]:,}"]
            )
        tables = [(f"by {self.by}", head, rows)]
        if len(self.names) > 2:
            matrix: list[list[object]] = [[name, *map(_figure, row)] for name, row in zip(self.names, self.matrix())]
            tables.append(("MCC", ["", *self.names], matrix))
        for (i, j), one in self.matchings.items():
            for side, here, there in ((0, i, j), (1, j, i)):
                left = one.unmatched(side)[:shown]
                if left:
                    listed: list[list[object]] = [
                        [x.feature, x.nearest, _figure(x.similarity), self.labels[here].text(x.feature)] for x in left
                    ]
                    what = f"in {self.names[here]} and not in {self.names[there]}, those least like any first"
                    tables.append((what, ["feature", "nearest", "similarity", "label"], listed))
        return tables

    def to_text(self, shown: int = SHOWN) -> str:
        """What the SAEs are, the figures of each pair, of three or more the matrix of MCC, and the first `shown`
        unmatched features of each."""
        wide = max(map(len, self.names))
        lines = [f"{name:<{wide}}  {about}" for name, about in zip(self.names, self.about)]
        for what, head, rows in self._tables(shown):
            lines += ["", what, _aligned([head, *([str(cell) for cell in row] for row in rows)])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tables = [(head, rows) for _, head, rows in self._tables(SHOWN)]
        return card(repr(self), list(zip(self.names, self.about)), tables=tables)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, those of numbers to the right."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0, *(column for column, name in enumerate(rows[0]) if name == "label")}
    lines = [
        "  ".join(
            f"{cell:<{w}}" if column in left else f"{cell:>{w}}" for column, (cell, w) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def compare_saes(
    a: SAE,
    b: SAE,
    *more: SAE,
    by: Similarity | None = None,
    store: RowSource | None = None,
    names: Sequence[str] = (),
    threshold: float = SHARED,
    max_pairs: int = MAX_PAIRS,
    tokens: int = 200_000,
) -> SAEComparison:
    """Match the features of SAEs to one another, each pair of them.

    Args:
        a, b, more: the SAEs. Compared by their weights they read and write the same width, and the numbers mean
            something where that is the same space: one hook point, or those of one residual stream.
        by: what is compared; by default the decoder rows, with a store the activations.
        store: an `ActivationStore` with the hook points of all SAEs, for `activations`: they may be of any widths.
        names: what to call them; A, B, ... by default.
        threshold: the similarity above which a matched pair is one feature.
        max_pairs: features of one times features of the other up to which the assignment problem is solved (8 bytes
            each); beyond, pairs are mutually nearest features, and there is no MCC.
        tokens: rows of the store to read, at most; those of huge norm (attention sinks) are passed over.

    Raises:
        SteersmanError: SAEs of other widths compared by weights, a store of other hook points or models, an unknown
            `by`, names that are not one for each.

    >>> from steersman.sae import SAEConfig
    >>> sae = SAE(SAEConfig(d_in=4, d_sae=8, k=2))
    >>> round(compare_saes(sae, sae).mcc, 3)
    1.0
    """
    saes = [a, b, *more]
    by = by or ("decoder" if store is None else "activations")
    if by not in get_args(Similarity):
        raise SteersmanError(f"SAEs are compared by {', '.join(get_args(Similarity))}, not by {by!r}")
    if (by == "activations") != (store is not None):
        raise SteersmanError("activations are compared on the rows of a store: give both, or neither")
    if names and len(names) != len(saes):
        raise SteersmanError(f"{len(names)} names for {len(saes)} SAEs: give one for each")
    named = tuple(names) or tuple(chr(ord("A") + i) if len(saes) <= 26 else str(i) for i in range(len(saes)))
    if by != "activations":
        _check_widths(saes, named, by)
    else:
        assert store is not None
        for sae in saes:
            store.hook_of(sae)
    matchings = {}
    for i, j in combinations(range(len(saes)), 2):
        signed = saes[i].signed or saes[j].signed
        if store is not None:
            similar, chance = correlations(saes[i], saes[j], store, tokens, max_pairs), None
        else:
            similar, chance = cosines(saes[i], saes[j], by), by_chance_of(saes[i], saes[j], by)
        matchings[i, j] = matching(similar, chance, signed, threshold, max_pairs)
    return SAEComparison(
        names=named, about=tuple(map(repr, saes)), by=by, matchings=matchings, labels=tuple(sae.labels for sae in saes)
    )


def _check_widths(saes: Sequence[SAE], names: Sequence[str], by: str) -> None:
    first = row_widths(saes[0], by)
    for name, sae in zip(names, saes):
        for one, other in zip(first, row_widths(sae, by)):
            if one != other:
                raise SteersmanError(
                    f"{names[0]} and {name} cannot be compared by {by}: their rows are of widths {one} and {other}; "
                    "give a store of both to compare their activations"
                )
