"""How well scores order two classes: the area under the ROC curve.

Shape letters: T samples, L scores, C labels.
"""

import torch
from torch import Tensor

__all__ = ["auroc"]


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
    result = torch.empty(scores.shape[1], labels.shape[1], dtype=torch.float64)
    for column in range(scores.shape[1]):
        _, inverse, counts = scores[:, column].unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        rank = (last - (counts - 1) / 2)[inverse]  # the mean rank, from 1, of each group of equal scores
        result[column] = rank @ labels
    above = result - positives * (positives + 1) / 2
    return above / (positives * (T - positives))
