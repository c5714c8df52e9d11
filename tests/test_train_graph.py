"""Steps as one CUDA graph: what is refused, that every step is taken once, and on a GPU that nothing changes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.training import mixture, trainer_of

from steersman.errors import SteersmanError
from steersman.train import TrainConfig
from steersman.train.run.graph import WARM_UP, GraphedStep

CONFIG = TrainConfig(d_sae=64, k=3, batch_size=128, seed=3, device="cpu", tokens=12_800, dead_after=128 * 4)


def test_a_graph_without_a_gpu_is_refused() -> None:
    with pytest.raises(SteersmanError, match="cuda_graph=True cannot be: it needs a CUDA device"):
        trainer_of(replace(CONFIG, cuda_graph=True, fused_update=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "batch_topk", "fused_update": True}, "batch_topk reads numbers"),
        ({"fused_update": False}, "needs the fused update"),
    ],
)
def test_other_obstacles_are_named_on_a_gpu(options: dict, message: str) -> None:
    trainer: Any = trainer_of(replace(CONFIG, **options))
    trainer.device = SimpleNamespace(type="cuda")
    with pytest.raises(SteersmanError, match=message):
        trainer._graphed()


def test_every_batch_is_taken_once_and_only_those_of_one_size_by_replays() -> None:
    """With a capture that, as CUDA's, does nothing itself and does the recorded work at each replay."""
    taken: list[Any] = []
    replays = 0

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            nonlocal replays
            replays += 1
            run()

        return replay

    weights = torch.zeros(2)
    step = GraphedStep(
        lambda x: taken.append(x.clone()), torch.device("cpu"), [weights], capture=capture, beside=nullcontext
    )
    batches = [torch.full((4, 2), float(i)) for i in range(8)]
    batches.insert(6, torch.full((3, 2), -1.0))
    version = weights._version
    for x in batches:
        step(x)
    assert len(taken) == len(batches)
    assert all(torch.equal(a, b) for a, b in zip(taken, batches))
    assert replays == len(batches) - WARM_UP - 1
    assert weights._version == version + replays


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "optimizer": "adam_touched", "state_dtype": "bfloat16"}], ids=str)
def test_graphed_steps_are_the_steps_themselves(options: dict) -> None:
    config = replace(CONFIG, device="cuda", fused_update=True, tokens=128 * 12, **options)
    plain, graphed = trainer_of(config), trainer_of(replace(config, cuda_graph=True))
    for x in [*mixture(128 * 10, seed=1).split(128), mixture(64, seed=2), mixture(128, seed=3)]:
        plain.step(x)
        graphed.step(x)
    assert graphed.n_steps_done == plain.n_steps_done == 12
    assert float(plain.sums[1]) > 0, "the AuxK loss was never on"
    for a, b in zip(
        [*plain.updater.parameters.values(), *plain.ema.values(), plain.sums],
        [*graphed.updater.parameters.values(), *graphed.ema.values(), graphed.sums],
    ):
        assert torch.equal(a, b)
