"""A training step as CUDA graphs: the host queues one launch in place of some hundred.

What the device does in a step depends on a number that the host knows, the candidates of AuxK; there is one graph for
each. The first steps of a kind run as always, on a stream of their own, while Triton compiles and PyTorch's allocator
settles. The next is captured, and every later one is a replay with the new batch written to where the graphs read it.
This needs a step that never waits for the device and reads no other number of the host that changes: the fused update,
and an architecture that is `host_free`.

All graphs take their memory from one pool, which is as large as the largest needs: replays follow each other on one
stream, and nothing that a step leaves behind for the next lies in it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

WARM_UP = 3
"""Steps of a kind before its capture."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function queues, without doing it; the returned function replays it."""


@contextmanager
def _side_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """The block queues its work on `stream`, after and before what else is queued."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def cuda_capture(device: torch.device) -> Capture:
    """Captures of CUDA graphs that share a pool of memory. Other threads may go on calling CUDA meanwhile, as those do
    that bring batches from the model."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    return capture


class GraphedStep:
    """Calls `step` on batches, by CUDA graphs of it where it can. A batch of another size than the first is not
    graphed.

    What `step` does on the host, it does only when it is called, which a replay does not; `replayed` is called after
    each.
    """

    def __init__(
        self,
        step: Callable[[Tensor], None],
        device: torch.device,
        replayed: Callable[[], None],
        *,
        capture: Capture | None = None,
        beside: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """`capture` and `beside`, where the first steps run, are CUDA's unless given."""
        self.step, self.device, self.replayed = step, device, replayed
        self.taken: Counter[Hashable] = Counter()
        """Steps of each kind before its capture."""
        self._capture, self._beside = capture or cuda_capture(device), beside or self._on_stream(device)
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._x: Tensor | None = None

    @staticmethod
    def _on_stream(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
        stream = torch.cuda.Stream(device)
        return lambda: _side_stream(stream)

    def __call__(self, x: Tensor, kind: Hashable = None) -> None:
        """One step on x [N, D], on any device; steps of one `kind` do the same on the device."""
        if self._x is not None and x.shape != self._x.shape:
            self.step(x)
        elif self.taken[kind] < WARM_UP:
            self.taken[kind] += 1
            with self._beside():
                self.step(x)
        else:
            self._graphed(x, kind)

    def _graphed(self, x: Tensor, kind: Hashable) -> None:
        if self._x is None:
            self._x = x.to(self.device, copy=True)
        else:
            self._x.copy_(x, non_blocking=True)
        if kind not in self._replays:
            held = self._x
            self._replays[kind] = self._capture(lambda: self.step(held))
        self._replays[kind]()
        self.replayed()
