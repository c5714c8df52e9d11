"""How well a label tells where a feature fires, judged by a language model: detection and fuzzing.

- `detection`: the judge sees texts in which the feature fires and texts in which it does not, and says which is which.
- `fuzzing`: it sees the same texts with tokens marked. Where the feature fires they are those at `threshold` (0.3) of
  the text's strongest activation or above; where it does not, as many as it is active on in a text on average (rounded
  up), drawn at random. It says where the marks are right.

Each is the mean of the shares judged right of either kind of text (balanced accuracy), 0.5 by chance: detection asks
whether a label fits whole texts, fuzzing whether it fits the tokens. Source: arXiv 2410.13928 and EleutherAI's delphi.
Different from delphi, no text is judged by that the label was made from.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from steersman.steer.labels.prompts import LabelExample, marked, strong

KINDS = ("detection", "fuzzing")


class Judged(NamedTuple):
    """A text shown to the judge."""

    text: str
    """As it is shown."""
    active: bool
    """Whether the feature fires in it."""


def judged_texts(
    kind: str, active: Sequence[LabelExample], inactive: Sequence[LabelExample], threshold: float, seed: int
) -> list[Judged]:
    """The texts to show for a score, in an order drawn by `seed`."""
    generator = random.Random(f"{kind}:{seed}")
    if kind == "detection":
        shown = [Judged(one.text, True) for one in active] + [Judged(one.text, False) for one in inactive]
    else:
        n = math.ceil(sum(sum(a > 0 for a in one.activations) for one in active) / max(1, len(active)))
        shown = [Judged(marked(one, lambda i, one=one: strong(one, i, threshold)), True) for one in active]
        for one in inactive:
            drawn = set(generator.sample(range(len(one.tokens)), min(n, len(one.tokens))))
            shown.append(Judged(marked(one, drawn.__contains__), False))
    generator.shuffle(shown)
    return shown


def balanced_accuracy(verdicts: Sequence[tuple[bool, bool]]) -> float | None:
    """Of pairs (fires, judged to fire): the mean of the shares judged right among either kind; None without both.

    >>> balanced_accuracy([(True, True), (True, False), (False, False)]), balanced_accuracy([(True, True)])
    (0.75, None)
    """
    right = [[said == fires for fires, said in verdicts if fires == side] for side in (True, False)]
    return sum(sum(side) / len(side) for side in right) / 2 if all(right) else None
