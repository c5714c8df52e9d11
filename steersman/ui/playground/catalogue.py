"""The features of an SAE as the panel lists them: searched by words or id, sorted, one in full."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.lm.lens import logit_lens
from steersman.reading import one_error
from steersman.sae.neighbours import feature_neighbours
from steersman.train.reports.search import read_feature_records
from steersman.ui.playground.engine import Engine

SORTS = ("match", "density", "max_act", "id")
NEIGHBOURS = 8
MOST = 200
"""Features of one answer."""


class Catalogue:
    """What is known of the features: their statistics, their labels, and the file that `steersman features` wrote."""

    def __init__(self, engine: Engine, file: Path | None = None) -> None:
        """`file` is that file; None for none. Raises SteersmanError for one that is of other features."""
        self.engine = engine
        self._described = {} if file is None else _read(file, engine.sae.cfg.d_sae)
        self.d_sae = engine.sae.cfg.d_sae

    def brief(self, feature: int) -> dict[str, Any]:
        """One feature as a line of the list."""
        stats, known = self.engine.sae.feature_stats, self._described.get(feature, {})
        return {
            "id": feature,
            "label": self.engine.labels.text(feature),
            "density": None if stats is None else float(stats.density[feature]),
            "max_act": None if stats is None else float(stats.max_act[feature]),
            "dead": stats is not None and self.engine.sae.is_dead(feature),
            "fires_on": known.get("fires_on", []),
            "promotes": known.get("promotes", []),
        }

    def full(self, feature: int) -> dict[str, Any]:
        """All that is known of one. Raises SteersmanError for an id out of range."""
        self.engine.sae.check_feature(feature)
        known, label = self._described.get(feature, {}), self.engine.labels.get(feature)
        promotes, suppresses = self._writes(feature, known)
        return {
            **self.brief(feature),
            "promotes": promotes,
            "suppresses": suppresses,
            "typical_act": known.get("typical_act"),
            "source": "" if label is None else label.source,
            "contexts": known.get("contexts", []),
            "neighbours": self._neighbours(feature),
        }

    def search(
        self, words: str = "", *, sort: str = "match", limit: int = 50, offset: int = 0
    ) -> tuple[list[dict[str, Any]], int]:
        """Some of the features that have every one of `words`, and how many there are: those with the words in their
        label first, then those that fire on or promote tokens with them."""
        if sort not in SORTS:
            raise SteersmanError(f"sort must be one of {', '.join(SORTS)}")
        if not (1 <= limit <= MOST and offset >= 0):
            raise SteersmanError(f"limit must lie between 1 and {MOST}, and offset be 0 or more")
        found = self._matches(words)
        if sort == "id":
            found.sort()
        elif sort != "match":
            column = self._statistic(sort)
            found.sort(key=lambda j: -column[j])
        return [self.brief(j) for j in found[offset : offset + limit]], len(found)

    def _matches(self, words: str) -> list[int]:
        wanted = words.casefold().split()
        order = self._by_strength
        if not wanted:
            return list(order)
        first = []
        if len(wanted) == 1 and wanted[0].isascii() and wanted[0].isdigit() and len(wanted[0]) < 12:
            first = [int(wanted[0])] if int(wanted[0]) < self.d_sae else []
        by_label = set(self.engine.labels.search(words)) - set(first)
        by_token = {j for j, text in self._tokens.items() if all(word in text for word in wanted)}
        by_token -= {*by_label, *first}
        return first + [j for j in order if j in by_label] + [j for j in order if j in by_token]

    @cached_property
    def _by_strength(self) -> list[int]:
        """All ids, those that fire most strongly in several places first; the dead ones last."""
        largest = self._statistic("max_act")
        typical = {j: known["typical_act"] for j, known in self._described.items() if known.get("typical_act")}
        return sorted(range(self.d_sae), key=lambda j: (-typical.get(j, 0.0), -largest[j]))

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {
            j: " ".join(known.get("fires_on", []) + known.get("promotes", [])).casefold()
            for j, known in self._described.items()
        }

    def _statistic(self, name: str) -> list[float]:
        stats = self.engine.sae.feature_stats
        return [0.0] * self.d_sae if stats is None else getattr(stats, name).tolist()

    def _writes(self, feature: int, known: Mapping[str, Any]) -> Sequence[list[str]]:
        if "promotes" in known and "suppresses" in known:
            return known["promotes"], known["suppresses"]
        return logit_lens(self.engine.lm, self.engine.sae.W_dec[feature][None].detach())[0]

    def _neighbours(self, feature: int) -> list[dict[str, Any]]:
        near = feature_neighbours(self.engine.sae, [feature], min(NEIGHBOURS, self.d_sae - 1)).of(0)
        return [{"id": n.feature, "label": self.engine.labels.text(n.feature), "cosine": n.cosine} for n in near]


def _read(file: Path, d_sae: int) -> dict[int, dict[str, Any]]:
    content = read_feature_records(file)
    with one_error(file):
        found = {int(entry["id"]): _described(entry) for entry in content}
    if found and not (min(found) >= 0 and max(found) < d_sae):
        raise SteersmanError(f"{file} describes features that the SAE, with {d_sae} of them, does not have")
    return found


def _described(entry: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {name: [str(t) for t in entry[name]] for name in ("fires_on", "promotes", "suppresses") if name in entry}
    contexts = [
        {"activation": float(c["activation"]), **{part: str(c[part]) for part in ("before", "token", "after")}}
        for c in entry.get("contexts", [])
    ]
    return {**tokens, "typical_act": float(entry.get("typical_act", 0.0)), "contexts": contexts}
