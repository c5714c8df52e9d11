"""Which latents are dead, and the AuxK term that trains them (arXiv 2406.04093, app. A.2).

In one process nothing here waits for the device: alive latents may be among the candidates and are masked out. Several
ranks must know before a step how many latents are dead on each, so they read that once a step; all candidates of a rank
are then dead ones.

Shape letters: L latents of this rank, A candidates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from steersman.parallel import Ranks
from steersman.sae.training import AuxTerm
from steersman.train.mesh.selection import keep_topk
from steersman.train.run.recipe import Recipe


class DeadLatents:
    """How long each of this rank's latents has been silent. All ranks call its methods together."""

    def __init__(self, n_latents: int, recipe: Recipe, aux_coefficient: float, ranks: Ranks, device: torch.device):
        self.recipe, self.ranks, self._coefficient = recipe, ranks, aux_coefficient
        self.silent_steps = torch.zeros(n_latents, dtype=torch.int32, device=device)
        """[L] int32: steps since each latent last fired on any replica."""
        self._candidates = min(n_latents * ranks.mesh.latent, max(4 * recipe.k_aux, 64))
        self._counts: Callable[[], list[int]] | None = None

    @property
    def dead(self) -> Tensor:
        """Which latents are dead, [L] bool."""
        return self.silent_steps >= self.recipe.dead_after_steps

    def fraction(self) -> float:
        """Dead latents among those of all ranks."""
        if self.ranks.mesh.world_size == 1:
            return float(self.dead.float().mean())
        return float(self.ranks.latent.all_reduce_sum_(self.dead.double().mean())) / self.ranks.mesh.latent

    def step_done(self, fired: Tensor) -> None:
        """Count a step; fired [L] is above 0 where a latent was active on one of this rank's rows."""
        if self.ranks.mesh.world_size > 1:
            fired = self.ranks.data.all_reduce_max_((fired > 0).to(torch.uint8))
        self.silent_steps += 1
        self.silent_steps.masked_fill_(fired > 0, 0)
        if self.ranks.mesh.world_size > 1:
            self._counts = self._count()

    def aux_term(self) -> AuxTerm | None:
        """AuxK over the longest-silent latents, weighted down while fewer than `k_aux` are dead; None where none is."""
        if not self._coefficient:
            return None
        return self._alone() if self.ranks.mesh.world_size == 1 else self._of_ranks()

    def _alone(self) -> AuxTerm | None:
        dead, k_aux = self.dead, self.recipe.k_aux
        if dead.device.type == "cpu" and not bool(dead.any()):
            return None
        candidates = longest_silent(self.silent_steps, self._candidates)
        weight = (dead.sum() / k_aux).clamp(max=1.0)
        return AuxTerm(candidates, ~dead[candidates], weight, k_aux, self._coefficient)

    def _of_ranks(self) -> AuxTerm | None:
        k_aux, latent = self.recipe.k_aux, self.ranks.latent
        self._counts = self._counts or self._count()
        counts = self._counts()
        if not sum(counts):
            return None
        candidates = longest_silent(self.silent_steps, min(counts[latent.index], self._candidates))
        if sum(counts) > self._candidates:
            shape = (1, min(max(counts), self._candidates))
            silence = torch.full(shape, -1.0, dtype=torch.float64, device=candidates.device)
            silence[0, : len(candidates)] = self.silent_steps[candidates].double()
            candidates = candidates[keep_topk(silence, self._candidates, latent)[0, : len(candidates)]]
        width = min(k_aux, max(counts)) if sum(counts) > k_aux else None
        weight = torch.tensor(min(sum(counts) / k_aux, 1.0), device=candidates.device)
        none_alive = torch.zeros_like(candidates, dtype=torch.bool)
        return AuxTerm(candidates, none_alive, weight, k_aux, self._coefficient, width)

    def _count(self) -> Callable[[], list[int]]:
        """How many latents of each rank of the latent group are dead. Begun when a step ends and read in the next one,
        so that the host waits for the step before and not for the one it is queueing."""
        counts = self.ranks.latent.all_gather(self.dead.sum(dtype=torch.int32)[None]).flatten()
        if counts.device.type != "cuda":
            return counts.tolist
        here = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True).copy_(counts, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[int]:
            copied.synchronize()
            return here.tolist()

        return read

    def restore(self, silent_steps: Tensor) -> None:
        """Resume from a checkpoint's `silent_steps`."""
        self.silent_steps.copy_(silent_steps)
        self._counts = None


def longest_silent(silent_steps: Tensor, n: int) -> Tensor:
    """The ids of the n latents that have been silent longest, longest first, equal ones by id: [n] int64.

    >>> longest_silent(torch.tensor([3, 9, 3, 0, 9], dtype=torch.int32), 3)
    tensor([1, 4, 0])
    """
    L = len(silent_steps)
    return (silent_steps.long() * L + torch.arange(L - 1, -1, -1, device=silent_steps.device)).topk(n).indices
