"""How well scores order two classes: the area under the ROC curve.

Shape letters: T samples, L scores, C labels, B sets of weights.
"""

import torch
from torch import Tensor

__all__ = ["auroc", "weighted_auroc"]

_BLOCK = 1 << 22  # entries ranked at once


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """AUROC of every score for every label: scores [T, L], labels bool [T, C] -> [L, C] float64.

    The Mann-Whitney statistic: the fraction of (positive, negative) pairs that the score orders rightly, ties half.
    NaN where a label is always or never true. Sums of ranks are exact, so the order of the samples does not matter.

    >>> auroc(torch.tensor([[0.0], [1.0], [1.0], [3.0]]), torch.tensor([[False], [False], [True], [True]]))
    tensor([[0.8750]], dtype=torch.float64)
    """
    T = len(scores)
    labels = labels.double()
    positives = labels.sum(dim=0)
    columns = scores.T.contiguous()
    sums = [_mean_ranks(part) @ labels for part in columns.split(max(1, _BLOCK // max(T, 1)))]
    result = torch.cat(sums) if sums else torch.empty(0, labels.shape[1], dtype=torch.float64)
    above = result - positives * (positives + 1) / 2
    return above / (positives * (T - positives))


def weighted_auroc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """AUROC of one score where samples count with weights, for several sets of them: scores [T], labels bool [T],
    weights [T, B] of 0 and above -> [B] float64. With weights that count how often a sample was drawn it is the AUROC
    of the draw. NaN where no sample of one side has a weight.

    >>> scores, labels = torch.tensor([0.0, 1.0, 1.0, 3.0]), torch.tensor([False, False, True, True])
    >>> weighted_auroc(scores, labels, torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 1.0], [1.0, 0.0]])).tolist()
    [0.875, 0.5]
    """
    values, group = scores.unique(return_inverse=True)
    weights = weights.double()
    sums = [
        torch.zeros(len(values), weights.shape[1], dtype=torch.float64).index_add_(0, group[side], weights[side])
        for side in (labels, ~labels)
    ]
    positive, negative = sums
    below = negative.cumsum(0) - negative / 2
    return (positive * below).sum(0) / (positive.sum(0) * negative.sum(0))


def _mean_ranks(x: Tensor) -> Tensor:
    """The ranks from 1 within each row of x [L, T], float64, the mean of them where values are equal."""
    ordered, order = x.sort(dim=1)
    place = torch.arange(x.shape[1], device=x.device).expand_as(x)
    last = torch.ones_like(x, dtype=torch.bool)
    last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.ones_like(last)
    first[:, 1:] = last[:, :-1]
    low = torch.where(first, place, 0).cummax(dim=1).values
    high = torch.where(last, place, x.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return torch.empty_like(x, dtype=torch.float64).scatter_(1, order, (low + high).double() / 2 + 1)
