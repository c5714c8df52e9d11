"""Feature splitting and absorption of a label, by its probe on the raw activations.

Splitting. Features are added to the probe one by one: each time the feature with the largest difference of class means
between the samples that have the label, and on which those chosen so far are silent, and the samples that have not. As
long as the F1 score of the training samples rises by more than a threshold, one more feature is a split of the concept:
three of them are cats, dogs and the rest of the animals. These are the label's main features.

Absorption. Of a held-out sample that has the label, and of which the raw probe says so, the main features may be silent
because another, of something more special, carries the label's direction w as well. With x the state, b_dec the
decoder's bias, d_j the decoder rows and a_j = f_j cos(d_j, w) the part of feature j in the direction, the sample is
absorbed if all main features are silent, and the feature with the largest a_j has

    cos(d_j, w) >= 0.025     and     a_j >= 0.4 (x - b_dec) . w / |w|

`absorbed` is the share of such samples among all that have the label and that the probe tells. `fraction` also counts
those in part: with m the sum of a_j over the main features, s that over the 3 largest others with cosine at least 0.1,
and r = (x - b_dec) . w / |w|, it is the mean of 0 where m >= r or s < 0.4 r, else u / (u + max(m, 0)) with
u = min(s, r - max(m, 0)).

Sources: Chanin et al. (arXiv 2409.14507); the projections and thresholds as in SAEBench (arXiv 2503.09532). SAEBench
chooses the features by a regression with an L1 penalty, and projects x as it is.

Shape letters: N samples, L features, D width, M main features.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import SteersmanError
from steersman.steer.probing.rows import Codes
from steersman.steer.probing.sparse import Fitted, class_differences, fit
from steersman.steer.probing.split import Parts

LEAST_COSINE, LEAST_PARTIAL_COSINE, LEAST_SHARE, MOST_ABSORBERS = 0.025, 0.1, 0.4, 3


@dataclass(frozen=True, kw_only=True)
class Absorber:
    """A feature that fires in place of a label's own."""

    feature: int
    """Feature id."""
    n: int
    """Held-out samples on which it does."""
    cosine: float
    """Of its decoder row and the direction of the raw probe."""


@dataclass(frozen=True, kw_only=True)
class LabelAbsorption:
    """Splitting and absorption of one label."""

    label: str
    """The label."""
    features: tuple[int, ...]
    """The main features: one, or those that it is split into."""
    f1: float
    """Held-out F1 score of the probe of them."""
    silent: float
    """Share of the label's held-out samples, of those that the raw probe tells, on which no main feature is active."""
    absorbed: float
    """Share of them on which, moreover, one other feature carries the label's direction: the absorption rate."""
    fraction: float
    """Mean share of the label's direction that others carry in their place."""
    samples: int
    """Held-out samples that have the label, and of which the raw probe says so."""
    absorbers: tuple[Absorber, ...]
    """The features that do, most frequent first."""


def main_features(
    codes: Codes, y: Tensor, parts: Parts, penalties: Sequence[float], *, rise: float, most: int
) -> tuple[list[int], Fitted]:
    """The features that y [N] bool is split into, at least one, and their probe; the F1 score is that of the training
    samples."""
    chosen: list[int] = []
    found: Fitted | None = None
    silent = torch.ones_like(y)
    while len(chosen) < most:
        plus = y & silent
        if not bool((plus & parts.training).any()):
            break
        differences = class_differences(codes, y[:, None], parts.training & (plus | ~y))[0]
        differences[chosen] = 0
        feature = int(differences.argmax())
        if chosen and not float(differences[feature]) > 0:
            break
        x = codes.columns([*chosen, feature])
        probe = fit(x, y, parts, penalties)
        if found is not None and probe.training_f1 <= found.training_f1 + rise:
            break
        chosen, found = [*chosen, feature], probe
        silent = ~(x != 0).any(1)
    if found is None:
        raise SteersmanError("no training sample has the label")
    return chosen, found


def absorption(
    label: str,
    features: Sequence[int],
    f1: float,
    *,
    codes: Codes,
    states: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    y: Tensor,
    heldout: Tensor,
    raw: Fitted,
) -> LabelAbsorption:
    """What becomes of the held-out samples of a label: `states` [N, D], `W_dec` [L, D], `b_dec` [D], `y` and `heldout`
    [N] bool, `raw` the probe of the states."""
    told = (y & heldout & (raw.logits > raw.threshold)).nonzero()[:, 0]
    w = (raw.weight / raw.weight.norm().clamp_min(1e-300)).float()
    cosine = F.cosine_similarity(W_dec.float(), w[None], dim=1)
    share = (states[told] - b_dec) @ w  # [n]
    place = torch.full((len(y),), -1, dtype=torch.int64)
    place[told] = torch.arange(len(told))
    mine = place[codes.sample] >= 0
    row, feature = place[codes.sample[mine]], codes.feature[mine]
    part = codes.value[mine] * cosine[feature]  # of each entry, in the direction
    is_main = torch.zeros(codes.n_features, dtype=torch.bool)
    is_main[list(features)] = True
    of_main = torch.zeros(len(told)).index_add_(0, row[is_main[feature]], part[is_main[feature]])
    silent = torch.ones(len(told), dtype=torch.bool)
    silent[row[is_main[feature]]] = False
    top, by = torch.zeros(len(told)), torch.full((len(told),), -1, dtype=torch.int64)
    others = torch.zeros(len(told))
    rest = ~is_main[feature] & (part > 0)
    order = (-part[rest]).argsort(stable=True)
    row, feature, part = row[rest][order], feature[rest][order], part[rest][order]
    order = row.argsort(stable=True)  # by sample, the largest first
    row, feature, part = row[order], feature[order], part[order]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    top[row[first]], by[row[first]] = part[first], feature[first]
    near = cosine[feature] >= LEAST_PARTIAL_COSINE
    near_row, near_part = row[near], part[near]
    rank = torch.arange(len(near_row)) - torch.searchsorted(near_row, near_row)
    few = rank < MOST_ABSORBERS
    others.index_add_(0, near_row[few], near_part[few])
    absorbed = silent & (share > 0) & (by >= 0) & (top >= LEAST_SHARE * share)
    absorbed &= cosine[by.clamp_min(0)] >= LEAST_COSINE
    of_main = of_main.clamp_min(0)
    moved = torch.minimum(others, share - of_main)
    counts = (of_main < share) & (others >= LEAST_SHARE * share)
    fraction = torch.where(counts, moved / (moved + of_main).clamp_min(1e-30), 0.0)
    found = Counter(by[absorbed].tolist())
    n = max(len(told), 1)
    return LabelAbsorption(
        label=label, features=tuple(features), f1=f1, silent=float(silent.sum()) / n,
        absorbed=float(absorbed.sum()) / n, fraction=float(fraction.sum()) / n, samples=len(told),
        absorbers=tuple(
            Absorber(feature=feature, n=count, cosine=float(cosine[feature])) for feature, count in found.most_common()
        ),
    )  # fmt: skip
