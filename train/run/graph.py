"""A training step as one CUDA graph: the host queues one launch in place of some hundred.

The first steps run as always, on a stream of their own, while Triton compiles and PyTorch's allocator settles. The
next is captured, and every later one is a replay with the new batch and learning rate written to where the graph reads
them. This needs a step that never waits for the device, so: the fused update, and top-k on one GPU.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.train.run.optim import FusedUpdater

if TYPE_CHECKING:
    from steersman.train.run.trainer import Trainer

WARM_UP = 3
"""Steps before the capture."""


class GraphedStep:
    """Takes the steps of a trainer. Batches of another size than the first are taken without the graph."""

    def __init__(self, trainer: "Trainer"):
        obstacles = {
            "it needs a CUDA device": trainer.device.type != "cuda",
            "batch_topk reads numbers from the device": trainer.config.activation != "topk",
            "it needs the fused update": not isinstance(trainer.updater, FusedUpdater),
        }
        for obstacle, there in obstacles.items():
            if there:
                raise SteersmanError(f"cuda_graph=True cannot be: {obstacle}; use cuda_graph=False")
        self.trainer, self.taken = trainer, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.x: Tensor | None = None
        self.stream = torch.cuda.Stream(trainer.device)

    def __call__(self, x: Tensor) -> None:
        """One step on x [N, D], on any device."""
        if self.x is not None and x.shape != self.x.shape:
            self.trainer.take_step(x)
        elif self.taken < WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream(self.trainer.device))
            with torch.cuda.stream(self.stream):
                self.trainer.take_step(x)
            torch.cuda.current_stream(self.trainer.device).wait_stream(self.stream)
            self.taken += 1
        elif self.graph is None or self.x is None:
            self.graph = self._capture(x)
        else:
            self._replay(self.graph, self.x, x)

    def _capture(self, x: Tensor) -> torch.cuda.CUDAGraph:
        """Record a step, which does not take it, and take it by a first replay."""
        trainer, graph = self.trainer, torch.cuda.CUDAGraph()
        self.x = x.to(trainer.device, copy=True)
        self._write_rate()
        with torch.cuda.graph(graph):
            trainer.take_step(self.x)  # counts the step
        graph.replay()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, place: Tensor, x: Tensor) -> None:
        place.copy_(x, non_blocking=True)
        self._write_rate()
        graph.replay()
        self.trainer.n_steps_done += 1
        for parameter in self.trainer.parameters:  # a replay does not tell PyTorch that it wrote to them
            torch.autograd.graph.increment_version(parameter)

    def _write_rate(self) -> None:
        trainer, recipe = self.trainer, self.trainer.recipe
        assert isinstance(trainer.updater, FusedUpdater)
        trainer.updater.set_rate(recipe.lr * recipe.lr_factor(trainer.n_steps_done))
