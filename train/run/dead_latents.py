"""Which latents are dead, and the AuxK term that trains them (arXiv 2406.04093, app. A.2).

How many are dead decides how many candidates AuxK looks at: none, or the smallest of a few sizes that all of the dead
fit in; alive latents among them are masked out. The host has to know the size when it queues a step, and must not wait
for the step before, which a GPU may still be busy with. So there the number is one step late: the latents that, at the
end of step t-1, miss at most one more step to be dead are an upper bound of those that are dead when step t+1 begins.

Shape letters: L latents of this rank, A candidates, R ranks that share the latents.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steersman.kernels import ops
from steersman.parallel import Ranks
from steersman.sae.training import AuxTerm
from steersman.train.mesh.selection import keep_topk
from steersman.train.run.recipe import Recipe

SIZES = (32, 64, 128, 256, 1024)
"""Numbers of candidates, beside k_aux, of which a token uses all, and the largest, `max(4 k_aux, 64)`."""


class AuxShape(NamedTuple):
    """What of an AuxK term the host chooses: the sizes of its tensors."""

    candidates: int
    """Candidates of this rank, A."""
    k: int
    """Dead latents a token may use."""
    width: int | None
    """See `AuxTerm.width`."""
    compared: int | None
    """Where the ranks may have more dead latents than there are to be candidates: how many of them a rank shows the
    others, to find the longest silent."""


class DeadLatents:
    """How long each of this rank's latents has been silent. All ranks call its methods together.

    A step is `prepare`, before any of its work is queued; `aux_term` and `step_done`, which ask the host for nothing
    and may be replayed by a CUDA graph made with the same answer of `prepare`.
    """

    def __init__(self, n_latents: int, recipe: Recipe, aux_coefficient: float, ranks: Ranks, device: torch.device):
        self.recipe, self.ranks, self._coefficient = recipe, ranks, aux_coefficient
        self.silent_steps = torch.zeros(n_latents, dtype=torch.int32, device=device)
        """[L] int32: steps since each latent last fired on any replica."""
        self._largest = min(n_latents * ranks.mesh.latent, max(4 * recipe.k_aux, 64))
        self._late = steps_late(device)
        after = recipe.dead_after_steps
        self._limits = torch.tensor([after - self._late, after], dtype=torch.int32, device=device)
        self._counts = torch.zeros(2, ranks.latent.size, dtype=torch.int32, device=device)
        """[2, R]: how many latents of each rank may be dead in `_late` steps from now, and how many are."""
        self._waiting: deque[Callable[[], list[int]]] = deque()
        self._shape: AuxShape | None = None
        self._begin(None)

    @property
    def dead(self) -> Tensor:
        """Which latents are dead, [L] bool."""
        return self.silent_steps >= self.recipe.dead_after_steps

    def fraction(self) -> float:
        """Dead latents among those of all ranks."""
        if self.ranks.mesh.world_size == 1:
            return float(self.dead.float().mean())
        return float(self.ranks.latent.all_reduce_sum_(self.dead.double().mean())) / self.ranks.mesh.latent

    # A step

    def prepare(self) -> AuxShape | None:
        """Choose the sizes of the coming step's AuxK term; None where no latent can be dead."""
        if not self._coefficient:
            return None
        self._waiting.append(read_later(self._counts[0]))
        self._shape = self._shape_of(self._waiting.popleft()())
        return self._shape

    def aux_term(self) -> AuxTerm | None:
        """AuxK over the longest-silent latents, weighted down while fewer than `k_aux` are dead; None where none is."""
        if self._shape is None:
            return None
        A, k, width, compared = self._shape
        candidates = longest_silent(self.silent_steps, A)
        alive = ~self.dead[candidates]
        if compared is not None:
            silence = torch.full((1, compared), -1.0, dtype=torch.float64, device=candidates.device)
            silence[0, :A] = self.silent_steps[candidates].double()
            alive |= ~keep_topk(silence, self._largest, self.ranks.latent)[0, :A]
        weight = (self._counts[1].sum() / self.recipe.k_aux).clamp(max=1.0)
        return AuxTerm(candidates, alive, weight, k, self._coefficient, width)

    def step_done(self, fired: Tensor) -> None:
        """Count a step; fired [L] is above 0 where a latent was active on one of this rank's rows."""
        if self.ranks.mesh.world_size > 1:
            fired = self.ranks.data.all_reduce_max_((fired > 0).to(torch.uint8))
        self._share(ops.count_silence(self.silent_steps, fired, self._limits))

    def _share(self, counts: Tensor) -> None:
        """Let all ranks know this rank's counts [2]."""
        if self._coefficient:
            self._counts.copy_(self.ranks.latent.all_gather(counts).T)

    def _shape_of(self, counts: list[int]) -> AuxShape | None:
        """The sizes with which all of the dead take part, where each rank has at most so many."""
        k, total = self.recipe.k_aux, sum(counts)
        if not total:
            return None
        sizes = [self._size(count) for count in counts]
        A, many = sizes[self.ranks.latent.index], len(counts) > 1
        width = min(k, max(counts)) if many and total > k else None
        return AuxShape(A, k if total > k else A, width, max(sizes) if many and total > self._largest else None)

    def _size(self, count: int) -> int:
        """The smallest number of candidates that so many fit in, or the largest that there is."""
        sizes = (0, *SIZES, self.recipe.k_aux)
        smallest = min((size for size in sizes if count <= size), default=self._largest)
        return min(smallest, self._largest, len(self.silent_steps))

    # Checkpoints

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to choose the same sizes: beside the silence of the latents, which belongs to them,
        the counts of each rank that the next step goes by, where they are of an earlier step."""
        late = {"late_counts": torch.tensor(self._waiting[0]())} if self._waiting else {}
        return {"silent_steps": self.silent_steps} | late

    def restore(self, silent_steps: Tensor, late_counts: Tensor | None = None) -> None:
        """Resume from what `state` gave; counts of another number of ranks, or none, are taken anew."""
        self.silent_steps.copy_(silent_steps)
        counts = [] if late_counts is None else late_counts.tolist()
        self._begin(counts if len(counts) == self._counts.shape[1] else None)

    def _begin(self, counts: list[int] | None) -> None:
        self._waiting.clear()
        self._share((self.silent_steps >= self._limits[:, None]).sum(dim=1, dtype=torch.int32))
        if self._late and self._coefficient:
            first = read_later(self._counts[1])() if counts is None else counts
            self._waiting.append(lambda: first)


def steps_late(device: torch.device) -> int:
    """How many steps late the host knows how many latents are dead, so that it need not wait for the device."""
    return int(device.type == "cuda")


def read_later(counts: Tensor) -> Callable[[], list[int]]:
    """Begin to bring counts to the host; the returned function waits until they are there. On a GPU, what is queued
    after this is not waited for."""
    if counts.device.type != "cuda":
        found = counts.tolist()
        return lambda: found
    here = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True).copy_(counts, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(counts.device))

    def read() -> list[int]:
        copied.synchronize()
        return here.tolist()

    return read


def longest_silent(silent_steps: Tensor, n: int) -> Tensor:
    """The ids of the n latents that have been silent longest, longest first, equal ones by id: [n] int64.

    >>> longest_silent(torch.tensor([3, 9, 3, 0, 9], dtype=torch.int32), 3)
    tensor([1, 4, 0])
    """
    L = len(silent_steps)
    return (silent_steps.long() * L + torch.arange(L - 1, -1, -1, device=silent_steps.device)).topk(n).indices
