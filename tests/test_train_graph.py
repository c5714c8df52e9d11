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
from steersman.train.run import dead_latents
from steersman.train.run.graph import WARM_UP, GraphedStep
from steersman.train.run.optim import FusedUpdater

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


class FakeCapture:
    """As CUDA's: does nothing itself, and does the recorded work at each replay."""

    def __init__(self) -> None:
        self.replays: list[int] = []
        """Which capture each replay was of."""
        self.captures = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        number, self.captures = self.captures, self.captures + 1

        def replay() -> None:
            self.replays.append(number)
            run()

        return replay


def test_every_batch_is_taken_once_and_only_those_of_one_size_by_replays() -> None:
    taken: list[Any] = []
    replayed: list[int] = []
    capture = FakeCapture()
    step = GraphedStep(
        lambda x: taken.append(x.clone()),
        torch.device("cpu"),
        lambda: replayed.append(len(taken)),
        capture=capture,
        beside=nullcontext,
    )
    batches = [torch.full((4, 2), float(i)) for i in range(8)]
    batches.insert(6, torch.full((3, 2), -1.0))
    for x in batches:
        step(x)
    assert len(taken) == len(batches)
    assert all(torch.equal(a, b) for a, b in zip(taken, batches))
    assert capture.replays == [0] * (len(batches) - WARM_UP - 1)
    assert replayed == [4, 5, 6, 8, 9]


def test_every_kind_of_step_has_a_graph_of_its_own() -> None:
    taken: list[Any] = []
    capture = FakeCapture()
    kind = "a"
    step = GraphedStep(
        lambda x: taken.append((kind, float(x[0]))),
        torch.device("cpu"),
        lambda: None,
        capture=capture,
        beside=nullcontext,
    )
    kinds = "aaaaabababbbaba"
    for i, kind in enumerate(kinds):
        step(torch.tensor([float(i)]), kind)
    assert taken == [(kind, float(i)) for i, kind in enumerate(kinds)]
    assert capture.captures == 2
    assert capture.replays == [0, 0, 0, 0, 1, 1, 0, 1, 0]


def test_a_graphed_trainer_takes_the_steps_of_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """With replays that do the work of their kind: the candidates of AuxK, known one step late, choose the graph."""
    monkeypatch.setattr(dead_latents, "steps_late", lambda device: 1)
    monkeypatch.setattr(dead_latents, "SIZES", (8, 16))
    config = replace(CONFIG, fused_update=True, dead_after=256, k_aux=5)
    plain, graphed = trainer_of(config), trainer_of(config)
    assert isinstance(graphed.updater, FusedUpdater)
    capture = FakeCapture()
    graphed._graph = GraphedStep(
        graphed._take_step, graphed.device, graphed.updater.replayed, capture=capture, beside=nullcontext
    )
    refreshed: list[int] = []
    monkeypatch.setattr(
        graphed.updater.state_of_rule.__class__, "refresh", lambda state: refreshed.append(plain.n_steps_done)
    )
    for x in mixture(128 * 60, seed=1).split(128):
        plain.step(x)
        graphed.step(x)
    for a, b in zip(plain._state().values(), graphed._state().values(), strict=True):
        assert torch.equal(a, b)
    assert capture.captures > 2
    assert len(set(capture.replays)) == capture.captures
    assert refreshed == [1, 0] or refreshed == [0, 1], "the copies of weights are made again before the first step only"
    assert float(plain.sums[1]) > 0, "the AuxK loss was never on"


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
