"""How the next token is drawn: from one uniform number for each row, by inverting the row's distribution.

What a row becomes is so decided by its own numbers and not by its neighbours'. Shape letters: B rows, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steersman.errors import SteersmanError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: temperature first, then the `top_k` likeliest, then the nucleus `top_p` of those."""

    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; None keeps all."""
    top_p: float | None = None
    """Keep the smallest set of the likeliest tokens with at least this probability; None keeps all."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SteersmanError(f"sampling needs a temperature above 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise SteersmanError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SteersmanError(f"top_p must lie in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Token ids [B] from logits [B, V] and one number in [0, 1) for each row, `uniform` [B].

        >>> logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
        >>> [int(Sampling().draw(logits, torch.tensor([u]))) for u in (0.1, 0.3, 0.9)]
        [0, 1, 2]
        >>> [int(Sampling(top_k=2).draw(logits, torch.tensor([u]))) for u in (0.1, 0.6, 0.9)]
        [1, 1, 2]
        """
        scaled, ids = logits.float(), None
        if self.temperature != 1:
            scaled = scaled / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            scaled, ids = largest(scaled, self.top_k)
        elif self.top_p is not None and self.top_p < 1:
            scaled, ids = scaled.sort(dim=-1, descending=True)
        p = scaled.softmax(-1)
        total = p.cumsum(-1)
        if self.top_p is not None and self.top_p < 1:
            # A token stays when those before it do not reach top_p; the first one always does.
            n_kept = (total - p < self.top_p).sum(-1, keepdim=True)
        else:
            n_kept = torch.full_like(total[:, :1], total.shape[-1], dtype=torch.long)
        mass = total.gather(1, n_kept - 1)
        place = torch.searchsorted(total, uniform.to(mass)[:, None] * mass, right=True)
        place = torch.minimum(place, n_kept - 1)
        return (place if ids is None else ids.gather(1, place))[:, 0]

    def log_prob(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability [..., n] with which `draw` takes `tokens` [..., n] from logits [..., n, V]; differentiable.

        The set of tokens that is kept is a constant of the derivative. A token outside of it has that of the kept ones
        and itself together.

        >>> logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
        >>> round(float(Sampling(top_k=2).log_prob(logits, torch.tensor([2])).exp()), 3)
        0.375
        """
        scaled = logits.float() / self.temperature
        chosen = scaled.gather(-1, tokens[..., None])[..., 0]
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            with torch.no_grad():
                ids = scaled.topk(self.top_k, dim=-1).indices
            kept = scaled.gather(-1, ids)
        elif self.top_p is not None and self.top_p < 1:
            kept = scaled.sort(dim=-1, descending=True).values
        else:
            return chosen - scaled.logsumexp(-1)
        if self.top_p is not None and self.top_p < 1:
            p = kept.detach().softmax(-1)
            kept = kept.masked_fill(p.cumsum(-1) - p >= self.top_p, -torch.inf)
        inside = chosen.detach() >= kept.detach().masked_fill(kept == -torch.inf, torch.inf).amin(-1)
        total = kept.logsumexp(-1)
        return chosen - torch.where(inside, total, torch.logaddexp(total, chosen))


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x [B, V] and their columns, [B, k], in falling order.

    As `x.topk(k)`; on the CPU numpy's vectorised partition finds the k-th largest several times faster.

    >>> largest(torch.tensor([[3.0, 9.0, 5.0, 4.0]]), 2)
    (tensor([[9., 5.]]), tensor([[1, 2]]))
    """
    if x.device.type != "cpu" or x.shape[0] < 64:
        return _sorted_topk(x, k)

    least = torch.from_numpy(np.partition(x.numpy(), -k, axis=1)[:, -k].copy())
    columns = (x >= least[:, None]).nonzero()[:, 1]
    if len(columns) != k * len(x):  # ties for the last place (or NaN): more than k in some row
        return _sorted_topk(x, k)
    columns = columns.view(-1, k)
    values, order = x.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _sorted_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = torch.topk(x, k, dim=-1)
    return values, columns
