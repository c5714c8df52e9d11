"""How tensors travel from one rank to another: through host memory (gloo), or from GPU to GPU (nccl).

What a GPU sends and receives is queued on a stream of its own: the streams on which the model runs and the SAE trains
never wait for another rank. The host waits where a tensor must be there or may be given up.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steersman.parallel import comm_errors


def gpu_of(device: torch.device) -> str | None:
    """What tells the GPU of this rank from those of all others; None where it has none that could send."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return None
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def from_gpu_to_gpu(gpus: Sequence[str | None]) -> bool:
    """Whether ranks with these GPUs can send from one to another: each has one, and no two the same.

    >>> from_gpu_to_gpu(["a 0", "a 1", "b 0"]), from_gpu_to_gpu(["a 0", "a 0"]), from_gpu_to_gpu(["a 0", None])
    (True, False, False)
    """
    return None not in gpus and len(set(gpus)) == len(gpus)


class Wire:
    """Sends and receives tensors that are on `device`, by a process group that can."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        if device.type == "cuda" and device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What the block queues on the device is on the wire's stream."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def ready(self, x: Tensor) -> Tensor:
        """x as it can be sent. Called where x was made: what is queued there comes before all that is sent later."""
        x = x.to(self.device).contiguous()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return x

    def send(self, x: Tensor, to: int) -> Callable[[], Any]:
        """Begin to send a tensor that is `ready`; the returned function waits until it is taken."""
        with comm_errors(), self.beside():
            work: Any = dist.isend(x.view(torch.uint8), dst=to, group=self.group)

        def finish() -> Tensor:
            with comm_errors(), self.beside():
                work.wait()
                self._settle()
            return x  # held until here

        return finish

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to receive into: on a host with GPUs, in pinned memory."""
        pinned = self._stream is None and torch.cuda.is_available()
        with self.beside():
            return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=pinned)

    def receive(self, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor from a rank. On a GPU it is there for what is queued `beside`, for others once `arrived`."""
        x = self.empty(shape, dtype)
        if x.numel():
            with comm_errors(), self.beside():
                dist.recv(x.view(torch.uint8), src=source, group=self.group)
        return x

    def arrived(self, x: Tensor) -> Tensor:
        """Wait until x, which was made `beside`, is there for every stream."""
        if self._stream is not None:
            self._settle()
            x.record_stream(torch.cuda.current_stream(self.device))  # whose work may outlast x
        return x

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
