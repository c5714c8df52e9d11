"""Texts in three parts: to fit on, to choose the penalty on, and held out. Each label has texts in all of them.

Shape letters: N samples, T texts, C labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steersman.errors import SteersmanError

FEWEST = 4
"""Texts that a label needs, and as many without it: two to fit on, one to choose on, one held out."""
_CHOOSING = 0.25  # of the training texts


class Parts(NamedTuple):
    """Which samples are in which part, each [N] bool."""

    fitting: Tensor
    choosing: Tensor
    heldout: Tensor

    @property
    def training(self) -> Tensor:
        """All that are not held out."""
        return self.fitting | self.choosing


def check_counts(has: Tensor, unit: Tensor, classes: list[str]) -> None:
    """Raise SteersmanError for labels that too few texts have, or too few have not: `has` [N, C] of samples, `unit` [N]
    the texts they are of."""
    texts = unit.unique(return_inverse=True)[1]
    few = []
    for at, name in enumerate(classes):
        with_it, without = (len(texts[side].unique()) for side in (has[:, at], ~has[:, at]))
        if min(with_it, without) < FEWEST:
            few.append(f"{name!r} ({with_it} with it, {without} without)")
    if few:
        more = f" and {len(few) - 3} more" if len(few) > 3 else ""
        raise SteersmanError(
            f"too few texts for {', '.join(few[:3])}{more}: a label needs {FEWEST} texts with it and {FEWEST} without, "
            "to fit on, to choose on and to hold out"
        )


def split(has: Tensor, unit: Tensor, classes: list[str], heldout: float, seed: int) -> Parts:
    """Deal texts out so that each label is in every part in about its share: texts are grouped by the rarest label in
    them. `has` [N, C] of samples, `unit` [N] the texts that they are of; the samples of a text stay together.

    Raises SteersmanError where a part has no text with a label, or none without.
    """
    names, text = unit.unique(return_inverse=True)
    of_text = torch.zeros(len(names), has.shape[1], dtype=torch.int64).index_add_(0, text, has.long()) > 0
    counts = of_text.sum(0)
    rarity = torch.where(of_text, counts, len(names) + 1)
    group = torch.where(of_text.any(1), rarity.argmin(1), -1)
    generator = torch.Generator().manual_seed(seed)
    part = torch.zeros(len(names), dtype=torch.int64)
    for one in group.unique().tolist():
        members = (group == one).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        n_held = max(1, round(heldout * len(members)))
        n_choosing = max(1, round(_CHOOSING * (len(members) - n_held)))
        part[members[:n_held]], part[members[n_held : n_held + n_choosing]] = 2, 1
    of_sample = part[text]
    parts = Parts(of_sample == 0, of_sample == 1, of_sample == 2)
    for part in parts:
        n = has[part].sum(0)
        missed = ((n == 0) | (n == int(part.sum()))).nonzero()[:, 0].tolist()
        if missed:
            raise SteersmanError(
                f"the texts with {classes[missed[0]]!r} are too few to have some to fit on, to choose on and to hold "
                "out beside the other labels: give more texts, or another seed"
            )
    return parts
