"""What an SAE in training is given and gives back: the code, the losses by name, and where its latents are.

Shape letters: N tokens, L latents (`d_sae`), K active latents a token, A candidates of the AuxK loss, P proposals.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steersman.kernels import Order
from steersman.sae.config import SAEConfig


class TrainingCode(NamedTuple):
    """A differentiable code, with what the training loop needs beside it."""

    values: Tensor
    """[N, K] fp32 with gradients to the encoder; 0 where not active."""
    order: Order
    """The indices [N, K] and their sort, shared by all gradients of the step."""
    min_selected: Tensor | None = None
    """The smallest selected value (a scalar), where the architecture learns a threshold from it."""
    candidates: Tensor | None = None
    """[N, K]: the pre-activations of all entries, where some that are not active have a gradient too; 0 where an entry
    is none of a latent."""

    @property
    def active(self) -> Tensor:
        """[N, K] bool; see `SparseCode.active`."""
        return self.values.detach().abs() > 0


class AuxTerm(NamedTuple):
    """The AuxK loss of one step: which latents take part and how much it counts."""

    candidates: Tensor
    """[A] int64 feature ids, each once."""
    alive: Tensor
    """[A] bool: candidates that take no part, because they are not dead."""
    weight: Tensor
    """A scalar: what the loss is multiplied by, and logged with."""
    k: int
    """Dead latents a token may use."""
    coefficient: float
    """What it counts in the loss that is minimised."""
    width: int | None = None
    """Where the latents lie on several ranks and more than `k` are dead: how many a rank proposes, the same on all."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a training step may know beside the batch."""

    step: int = 0
    """Steps done before this one."""
    n_steps: int = 1
    """Steps of the whole run."""
    aux: AuxTerm | None = None
    """The AuxK loss of this step, if dead latents take part."""
    config: Any = None
    """The run's `TrainConfig`."""
    labels: Tensor | None = None
    """[N]: 1, 0, or -1 where it is not known; None but for an architecture with a supervised latent."""

    @property
    def progress(self) -> float:
        """How far the run is: 0 in the first step, 1 in the last."""
        return min(1.0, self.step / max(1, self.n_steps - 1))


class Step(NamedTuple):
    """What one step on N tokens gave. The sum of its losses is what is minimised."""

    code: TrainingCode
    losses: dict[str, Tensor]
    """Scalars by name, each times its coefficient and summed over the tokens, with gradients. `squared_error` is always
    there. They are logged by name."""
    logged: Mapping[str, Tensor] = {}
    """Scalars, summed over the tokens, that are logged beside the losses, or in place of the loss of that name."""

    @property
    def loss(self) -> Tensor:
        """The sum of the losses, in their order."""
        first, *rest = self.losses.values()
        for term in rest:
            first = first + term
        return first


class Latents:
    """Where the latents of an SAE in training are: all in this process, so that every method does nothing.

    Several ranks that hold some each give `SAE.latents` an object whose methods communicate; what an architecture
    computes through it is the same on one process and on many.
    """

    whole: SAEConfig | None = None
    """The configuration of the whole SAE, where this process holds some of its latents."""
    n_replicas: int = 1
    """Processes that hold the same latents and share the batch."""
    first: int = 0
    """The number of the first latent here among all."""

    def uses(self, x: Tensor) -> Tensor:
        """A tensor that all ranks have and use, as it is; backward sums the gradients of their uses."""
        return x

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's part; backward passes its gradient, which all ranks have, on to each part."""
        return part

    def total(self, value: Tensor) -> Tensor:
        """The sum of a penalty (a scalar) of every rank's latents; backward passes the gradient on as it is."""
        return value

    def over_batch(self, value: Tensor) -> Tensor:
        """The sum of a number over every rank's latents and every replica's rows, without gradients."""
        return value

    def keep_topk(self, values: Tensor, k: int) -> Tensor | None:
        """Which proposals of this rank are among the k largest of each token over all ranks, [N, P] bool; None: all.

        values [N, P]: what each token's P largest latents here are selected by, largest first.
        """
        return None

    def keep_batch_topk(self, values: Tensor, budget: int) -> tuple[Tensor, Tensor] | None:
        """Which proposals [N, P] of this rank are among the `budget` largest positive ones of the whole batch, and
        the smallest selected value over all ranks (a scalar, inf where nothing is positive); None: all."""
        return None


def keep_only(values: Tensor, indices: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """A code, values and indices [N, K], of which only the `kept` [N, K] bool count; None: all.

    Rows are ordered, so on a CPU the columns past the fullest row are left out: they need no work.
    """
    if kept is None:
        return values, indices
    values = torch.where(kept, values, torch.zeros_like(values))
    if values.device.type == "cpu":
        width = max(1, int(kept.sum(dim=1).max()))
        values, indices = values[:, :width].contiguous(), indices[:, :width].contiguous()
    return values, indices
