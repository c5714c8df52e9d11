"""The largest pre-activations over latents that several ranks hold: exactly what one process selects.

TopK takes one round: every rank proposes the K largest of its own latents, which hold all of its part of the answer.
The proposals' values are gathered, and each rank sees which of its own are among the K largest of all. Equal values
go to the lower latent: ranks hold consecutive latents, and each proposes in that order. Indices need not travel.

BatchTopK selects N*K values of a whole batch, over latents and replicas. Its proposals would be N*K values from every
rank; instead the ranks find the smallest selected value by counting, 16 bits at a time, in two rounds of fixed size.

Shape letters: N tokens, L latents, K active latents a token, P proposals of a rank, R ranks.
"""

import torch
from torch import Tensor

from steersman.parallel import RankGroup

_HALF = 1 << 16


@torch.no_grad()
def keep_topk(values: Tensor, k: int, axis: RankGroup) -> Tensor:
    """Which of this rank's proposals are among the k largest of each row over all ranks, [N, P] bool.

    values [N, P] fp32: each row's P = min(k, own latents) largest, largest first, equal ones by latent. A NaN counts as
    larger than any number.
    """
    if axis.size == 1:
        return torch.ones_like(values, dtype=torch.bool)
    P = values.shape[1]
    gathered = axis.all_gather(values).transpose(0, 1).reshape(len(values), -1)
    order = torch.sort(gathered, dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(gathered, dtype=torch.bool).scatter_(1, order, True)
    return kept[:, axis.index * P : (axis.index + 1) * P]


@torch.no_grad()
def keep_batch_topk(values: Tensor, budget: int, latent: RankGroup, data: RankGroup) -> tuple[Tensor, Tensor]:
    """Which of this rank's proposals are among the `budget` largest positive ones of the whole batch.

    values [N, P] fp32: the rank's largest, 0 where there is none, each row ordered by value and then by latent. Equal
    values go to the earlier token, then to the lower latent. Returns the choice [N, P] and the smallest selected value
    over all ranks (a scalar, inf when nothing is positive).
    """
    bits = values.clamp_min(0).view(torch.int32)  # of floats that are not negative, larger ones have larger bits
    high, low = bits >> 16, bits & (_HALF - 1)
    bucket, above = _cut(_counts(high, bits > 0, latent, data), budget)
    rest, above_low = _cut(_counts(low, (high == bucket) & (bits > 0), latent, data), budget - above)
    tau = (bucket << 16) | rest
    kept = (bits > tau) & (bits > 0)
    tied = (bits == tau) & (bits > 0)
    # What is left of the budget goes to the values equal to tau, token by token, then latent by latent.
    left = budget - above - above_low
    counts = tied.sum(dim=1, dtype=torch.int32)
    of_ranks = latent.all_gather(counts)  # [R, N]
    of_replicas = data.all_gather(of_ranks.sum(dim=0, dtype=torch.int32).sum()[None])
    before = of_replicas[: data.index].sum()
    token_total = of_ranks.sum(dim=0)
    before = before + token_total.cumsum(0) - token_total + of_ranks[: latent.index].sum(dim=0)
    place = before[:, None] + tied.cumsum(dim=1)  # from 1
    kept |= tied & (place <= left)
    smallest = torch.where(kept, values, values.new_tensor(float("inf"))).min()
    return kept, data.all_reduce_min_(latent.all_reduce_min_(smallest.reshape(1)))[0]


def _counts(numbers: Tensor, counted: Tensor, latent: RankGroup, data: RankGroup) -> Tensor:
    """How often each 16-bit number occurs among the `counted` ones, over all ranks, [65536] int64."""
    counts = torch.zeros(_HALF, dtype=torch.int32, device=numbers.device)
    counts.scatter_add_(0, numbers.flatten().long(), counted.flatten().int())
    return data.all_reduce_sum_(latent.all_reduce_sum_(counts)).long()


def _cut(counts: Tensor, budget: int | Tensor) -> tuple[Tensor, Tensor]:
    """The largest number such that it and all above it occur at least `budget` times (0 if there is none), and how
    often those above it occur."""
    from_top = counts.flip(0).cumsum(0).flip(0)  # occurrences at or above each number
    number = ((from_top >= budget).sum() - 1).clamp_min(0)
    return number.int(), from_top[number] - counts[number]
