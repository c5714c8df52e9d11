"""Steps as one CUDA graph: what is refused, and with a stand-in for CUDA, that every step is taken once."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_train_optim import CONFIG, rows, trainer_of

from steersman.errors import SteersmanError
from steersman.train.run.graph import WARM_UP, GraphedStep


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fused_update": True}, "needs a CUDA device"), ({"fused_update": False}, "needs a CUDA device")],
)
def test_what_a_graph_cannot_do_is_refused(options: dict, message: str) -> None:
    with pytest.raises(SteersmanError, match=f"cuda_graph=True cannot be: it {message}"):
        trainer_of(replace(CONFIG, cuda_graph=True, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "batch_topk", "fused_update": True}, "batch_topk reads numbers"),
        ({"fused_update": False}, "needs the fused update"),
    ],
)
def test_other_obstacles_are_named_on_a_gpu(options: dict, message: str) -> None:
    trainer: Any = trainer_of(replace(CONFIG, **options))
    trainer.device = SimpleNamespace(type="cuda")
    with pytest.raises(SteersmanError, match=message):
        GraphedStep(trainer)


class Recorder:
    """In place of a CUDA graph: what is recorded is undone, and replays do it on what then stands in the buffers."""

    def __init__(self) -> None:
        self.replays = 0
        self.step: Any = None

    def replay(self) -> None:
        self.replays += 1
        self.step()


def test_every_step_is_taken_once_with_its_own_batch_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, fused_update=True)
    trainer: Any = trainer_of(config)
    graphs: list[Recorder] = []

    def new_graph() -> Recorder:
        graphs.append(Recorder())
        return graphs[-1]

    @contextlib.contextmanager
    def capture(graph: Recorder) -> Iterator[None]:
        take = trainer.take_step

        def record(x: torch.Tensor) -> None:
            trainer.n_steps_done += 1

            def step() -> None:
                done = trainer.n_steps_done
                with monkeypatch.context() as patch:  # a graph reads the rate that was written before its replay
                    patch.setattr(trainer.updater, "set_rate", lambda lr: None)
                    take(x)
                trainer.n_steps_done = done

            graph.step = step

        monkeypatch.setattr(trainer, "take_step", record)
        yield
        monkeypatch.setattr(trainer, "take_step", take)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(trainer, "device", SimpleNamespace(type="cuda"))
    step = GraphedStep(trainer)
    trainer.device = torch.device("cpu")
    plain = trainer_of(config)
    batches = [*rows(128 * 8, seed=1).split(128), rows(64, seed=2), rows(128, seed=3)]
    for x in batches:
        step(x)
    assert trainer.n_steps_done == len(batches)
    assert len(graphs) == 1
    assert graphs[0].replays == len(batches) - WARM_UP - 1
    for x in batches:
        plain.step(x)
    assert plain.n_steps_done == trainer.n_steps_done
    for a, b in zip([*trainer.parameters, trainer.sums], [*plain.parameters, plain.sums]):
        assert torch.equal(a, b)
