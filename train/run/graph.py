"""A training step as one CUDA graph: the host queues one launch in place of some hundred.

The first steps run as always, on a stream of their own, while Triton compiles and PyTorch's allocator settles. The
next is captured, and every later one is a replay with the new batch written to where the graph reads it. This needs a
step that never waits for the device and reads no number of the host that changes: the fused update, and an architecture
that is `host_free`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

WARM_UP = 3
"""Steps before the capture."""


@contextmanager
def _side_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """The block queues its work on `stream`, after and before what else is queued."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """What `run` queues as a CUDA graph; the returned function replays it. `run` itself is recorded, not done."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class GraphedStep:
    """Calls `step` on batches, by a CUDA graph of it where it can. A batch of another size than the first is not
    graphed.

    What `step` does on the host, it does only when it is called, which a replay does not. `written` are tensors that it
    writes to, of which a replay does not inform PyTorch.
    """

    def __init__(
        self,
        step: Callable[[Tensor], None],
        device: torch.device,
        written: Iterable[Tensor],
        *,
        capture: Callable[[Callable[[], None]], Callable[[], None]] = _captured,
        beside: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """`capture` and `beside`, where the first steps run, are CUDA's unless given."""
        self.step, self.device, self.written, self.taken = step, device, list(written), 0
        self._capture, self._beside = capture, beside or self._on_stream(device)
        self._replay: Callable[[], None] | None = None
        self._x: Tensor | None = None

    @staticmethod
    def _on_stream(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
        stream = torch.cuda.Stream(device)
        return lambda: _side_stream(stream)

    def __call__(self, x: Tensor) -> None:
        """One step on x [N, D], on any device."""
        if self._x is not None and x.shape != self._x.shape:
            self.step(x)
        elif self.taken < WARM_UP:
            self.taken += 1
            with self._beside():
                self.step(x)
        else:
            self._graphed(x)

    def _graphed(self, x: Tensor) -> None:
        if self._replay is None or self._x is None:
            held = self._x = x.to(self.device, copy=True)
            self._replay = self._capture(lambda: self.step(held))
        else:
            self._x.copy_(x, non_blocking=True)
        self._replay()
        for tensor in self.written:
            torch.autograd.graph.increment_version(tensor)
