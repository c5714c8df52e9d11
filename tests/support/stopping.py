"""Stop a training run at a given step, as an interruption would."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from steersman.train import Trainer


class Stop(Exception):
    """Ends a run from inside."""


@contextmanager
def stopped_before(step: int) -> Iterator[None]:
    """Training within the block must reach step number `step`, and ends there."""
    take = Trainer.step

    def stopping_step(self: Trainer, x: torch.Tensor) -> None:
        if self.n_steps_done == step:
            raise Stop
        take(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stopping_step)
        with pytest.raises(Stop):
            yield
