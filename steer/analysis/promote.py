"""What steering promotes and what it suppresses: arXiv 2410.17245.

Per item, the mean log-likelihood per token of a positive and of a negative continuation, unsteered and steered. A
margin between the two can rise for two reasons, so they are reported apart: `promote`, the rise of the positive ones,
and `suppress`, the change of the negative ones (below 0: suppressed). Both are reported for the items that the
unsteered model does worst at, the weakest 25, 50 and 75 %: the positives it finds least likely, the negatives it finds
most likely. Values are relative to a reference of the unsteered model, half-way between its most likely negative and
its least likely positive; items are sorted by the unsteered value, so that steering cannot choose its own.

The trap: with whole sequences in place of means per token, longer continuations seem to move more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.steer.dose import Dosed, steered
from steersman.steer.evaluation.bootstrap import Estimate, bootstrap
from steersman.steer.evaluation.forced import ContinuationLike, as_continuations, likelihoods
from steersman.steer.evaluation.rollouts import Arm, unsteered

SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What one way of steering does to both sides."""

    promote: dict[float, Estimate]
    """Share of the weakest items -> mean change of the positives' log-likelihood per token, in nats."""
    suppress: dict[float, Estimate]
    """The same of the negatives that were most likely: below 0 where they are suppressed."""


@dataclass(frozen=True, kw_only=True)
class PromoteReport:
    """Ways of steering side by side, on the same items."""

    arms: dict[str, Promotion]
    """By name."""
    positive: np.ndarray
    """Unsteered log-likelihood per token of each positive, relative to the reference."""
    negative: np.ndarray
    """The same of each negative."""
    reference: float
    """The reference in nats per token."""

    def to_text(self) -> str:
        """A table: two lines an arm."""
        shares = sorted(next(iter(self.arms.values())).promote)
        width = max(8, *map(len, self.arms))
        lines = [f"{'':<{width}} {'':<9}" + "".join(f" {f'weakest {100 * s:.0f} %':<26}" for s in shares)]
        for name, arm in self.arms.items():
            for side, found in (("promote", arm.promote), ("suppress", arm.suppress)):
                lines.append(f"{name:<{width}} {side:<9}" + "".join(f" {found[s]!s:<26}" for s in shares))
        return "\n".join(lines)


def promote_report(
    lm: LanguageModel,
    arms: Mapping[str, Dosed],
    items: Sequence[ContinuationLike],
    *,
    scope: str = "all",
    shares: Sequence[float] = SHARES,
    batch_size: int = 32,
    seed: int = 0,
) -> PromoteReport:
    """Measure each of `arms` (a vector, edits, a recipe, ... at scale 1) on (prompt, positive, negative) items.

    Raises SteersmanError for no items, no arms, and a share outside (0, 1].
    """
    found = as_continuations(items)
    if not found or not arms:
        raise SteersmanError("give at least one item and one way of steering")
    if not all(0 < share <= 1 for share in shares):
        raise SteersmanError(f"a share of the items lies above 0 and up to 1, got {list(shares)}")

    def per_token(arm: Arm) -> np.ndarray:
        logp, n = likelihoods(lm, found, arm, batch_size)
        return logp / np.maximum(n, 1)

    base = per_token(unsteered)
    reference = float(base[:, 1].max() + base[:, 0].min()) / 2
    weak = np.argsort(base[:, 0], kind="stable"), np.argsort(-base[:, 1], kind="stable")

    def bins(change: np.ndarray, order: np.ndarray) -> dict[float, Estimate]:
        estimates = {share: bootstrap(change[order[: max(1, round(share * len(order)))]], seed) for share in shares}
        return {share: estimate for share, estimate in estimates.items() if estimate is not None}

    reports = {}
    for name, what in arms.items():
        change = per_token(lambda _rows, what=what: steered(what, lm, scope=scope)) - base
        reports[name] = Promotion(promote=bins(change[:, 0], weak[0]), suppress=bins(change[:, 1], weak[1]))
    return PromoteReport(
        arms=reports, positive=base[:, 0] - reference, negative=base[:, 1] - reference, reference=reference
    )
