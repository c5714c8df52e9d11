"""Probes of few features: which are chosen, how they are fitted, and how well they do on other texts.

The k features are those with the largest difference of class means on the training samples, each in units of its mean
activation where it is active,

    |mean of f_j over y = 1  -  mean of f_j over y = 0| / mean of |f_j| where f_j is not 0

and the probe is a logistic regression on them, as is that on raw activations. Its penalty is the one of a few that has
the best AUROC on samples it was not fitted on; then it is fitted on all training samples. Both sides weigh the same.
The F1 score, for which a rare label needs a higher bar than 0, is at the threshold that is best on the training
samples.

Source: Kantamneni et al. (arXiv 2502.16681) and their library sae-probes, which tells the last token of a text; of the
measures of SAEBench its kind of probe is the one that seeds and training disturb least (arXiv 2605.18229).

Shape letters: N samples, C labels, L features, K chosen features, B draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steersman.ranking import auroc, weighted_auroc
from steersman.steer.analysis.thresholds import best_threshold
from steersman.steer.evaluation.bootstrap import Estimate
from steersman.steer.methods.logistic import fit_logistic
from steersman.steer.probing.rows import Codes
from steersman.steer.probing.split import Parts

_WIDE = 64
"""Width from which the regression goes by gradients alone."""


def class_differences(codes: Codes, has: Tensor, training: Tensor) -> Tensor:
    """[C, L] float64: the difference of class means of every feature over `training` [N] bool, in units of its mean
    activation; 0 for features that are silent there."""
    y = has[training].double()
    plus, minus = y.sum(0), len(y) - y.sum(0)
    weights = torch.zeros(has.shape, dtype=torch.float64)
    weights[training] = y / plus - (1 - y) / minus
    scale = codes.mean_active(training)
    return torch.where(scale > 0, codes.sums(weights) / scale.clamp_min(1e-300), 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A probe and what it says of every sample."""

    logits: Tensor
    """[N] float64."""
    weight: Tensor
    """[K] float64, in units of what it reads."""
    l2: float
    """The penalty."""
    threshold: float
    """Above which a logit says that a sample has the label; not a number where all logits are the same."""
    training_f1: float
    """F1 score at it, on the training samples."""
    choosing_auroc: float
    """AUROC on the samples that choose, of the fit without them; NaN where there was nothing to choose."""


def fit(x: Tensor, y: Tensor, parts: Parts, penalties: Sequence[float], *, score: bool = False) -> Fitted:
    """The probe of x [N, K] for y [N] bool with the best of the penalties. `score`: one penalty is measured too, where
    something else is to be chosen by it."""
    scores = [float("nan")] * len(penalties)
    x = x.double()
    if score or (len(penalties) > 1 and x.shape[1] > 1):  # the order of one feature depends on no penalty
        for at, l2 in enumerate(penalties):
            logits, _ = _logits(x, y, parts.fitting, l2)
            scores[at] = float(auroc(logits[parts.choosing, None], y[parts.choosing, None]))
    best = max(range(len(penalties)), key=lambda at: scores[at] if scores[at] == scores[at] else -1.0)
    logits, weight = _logits(x, y, parts.training, penalties[best])
    threshold, f1 = float("nan"), 0.0
    known = logits[parts.training]
    if bool((known != known[0]).any()):
        line = best_threshold(known[y[parts.training]], known[~y[parts.training]], only_above=True)
        threshold, f1 = line.value, line.f1
    return Fitted(
        logits=logits, weight=weight, l2=penalties[best], threshold=threshold, training_f1=f1,
        choosing_auroc=scores[best],
    )  # fmt: skip


def _logits(x: Tensor, y: Tensor, of: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    samples, side = x[of, None], y[of]
    if bool((samples == samples[:1]).all()):  # features that are silent here say nothing
        return torch.zeros(len(x), dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    probe = fit_logistic(lambda: [(samples, side)], l2=l2, by_gradients=x.shape[1] >= _WIDE)
    return probe.logits(x[:, None])[:, 0], probe.weight[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What a probe does on the held-out samples, and on B draws of their texts."""

    auroc: float
    """Area under the ROC curve."""
    drawn: Tensor
    """[B] float64: the same on each draw; NaN where a draw has one side only."""
    accuracy: float
    """Share of samples that the logit's sign tells rightly, averaged over the two sides."""
    f1: float
    """F1 score of the samples with the label."""


class HeldOut:
    """The held-out samples, and draws of their texts with replacement that all probes share."""

    def __init__(self, heldout: Tensor, unit: Tensor, draws: int, seed: int) -> None:
        """`heldout` [N] bool of samples, `unit` [N] the texts that they are of."""
        self.rows = heldout
        self._text = unit[heldout].unique(return_inverse=True)[1]
        self.n_texts, self._draws, self._seed = int(self._text.max()) + 1, draws, seed

    @cached_property
    def weights(self) -> Tensor:
        """[held-out samples, B] fp32: how often each was drawn."""
        generator = torch.Generator().manual_seed(self._seed)
        drawn = torch.randint(self.n_texts, (self.n_texts, self._draws), generator=generator)
        counts = torch.zeros(self.n_texts, self._draws).scatter_add_(0, drawn, torch.ones(drawn.shape))
        return counts[self._text]

    def measure(self, probe: Fitted, y: Tensor) -> Measured:
        """Measure a probe of y [N] bool."""
        logits, y = probe.logits[self.rows], y[self.rows]
        said, told = logits > probe.threshold, (logits > 0) == y
        hits = int((said & y).sum())
        return Measured(
            auroc=float(auroc(logits[:, None], y[:, None])),
            drawn=weighted_auroc(logits, y, self.weights),
            accuracy=float(told[y].double().mean() + told[~y].double().mean()) / 2,
            f1=2 * hits / max(1, int(said.sum()) + int(y.sum())),
        )

    def estimate(self, mean: float, drawn: Tensor) -> Estimate:
        """A figure with the interval of its draws [B]."""
        ends = torch.nanquantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        low, high = (mean, mean) if ends[0] != ends[0] else ends
        return Estimate(mean=mean, low=low, high=high, n=self.n_texts)


def averaged(measured: Sequence[Measured]) -> Measured:
    """The mean of several, draw by draw."""
    n = len(measured)
    return Measured(
        auroc=sum(one.auroc for one in measured) / n,
        drawn=torch.stack([one.drawn for one in measured]).nanmean(0),
        accuracy=sum(one.accuracy for one in measured) / n,
        f1=sum(one.f1 for one in measured) / n,
    )
