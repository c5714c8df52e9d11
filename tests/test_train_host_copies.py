"""Copies of a state that goes on changing: whose turn it is on the device, and who waits."""

import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steersman.train.run.checkpoints import Checkpoints
from steersman.train.run.host_copies import HostCopies


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device: Any = property(lambda self: SimpleNamespace(type="cuda"))  # pyright: ignore[reportIncompatibleVariableOverride]


class FakeCuda:
    """PyTorch's streams as far as copies use them: a log of what was queued where, and an event that is let happen."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.happened = threading.Event()
        self.current = self.Stream("main", self)

    class Stream:
        def __init__(self, device: Any, cuda: "FakeCuda | None" = None) -> None:
            self.name = device if cuda is not None else "side"
            self.cuda = cuda

        def wait_stream(self, other: Any) -> None:
            other.cuda.log.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> Any:
            return SimpleNamespace(of=self.name, synchronize=lambda: self.owner.happened.wait(10))

        def wait_event(self, event: Any) -> None:
            self.owner.log.append(f"{self.name} waits for the copies of {event.of}")

        owner: "FakeCuda"

    def current_stream(self, device: Any) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        self.log.append(f"on {stream.name}:")
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Buffers are not pinned, and say when they are copied to."""
    cuda = FakeCuda()
    monkeypatch.setattr(FakeCuda.Stream, "owner", cuda, raising=False)

    class Buffer(torch.Tensor):
        def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:  # pyright: ignore
            assert non_blocking
            cuda.log.append("copy")
            return self.as_subclass(torch.Tensor).copy_(other.as_subclass(torch.Tensor))

    make = torch.empty_like

    def pinned(tensor: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        assert (device, pin_memory) == ("cpu", True)
        return make(tensor.as_subclass(torch.Tensor)).as_subclass(Buffer)

    monkeypatch.setattr("steersman.train.run.host_copies.torch.empty_like", pinned)
    return cuda


def test_copies_come_after_what_was_queued_and_before_what_is_queued_next(cuda: FakeCuda) -> None:
    copies = HostCopies(cuda)
    W, rng = torch.arange(6.0).view(2, 3).T, torch.arange(3)
    tensors = {"W": W.as_subclass(OnDevice), "rng": rng, "m": torch.ones(4).as_subclass(OnDevice)}
    finish = copies.begin(tensors)
    rng += 1
    expected = ["side waits for main", "on side:", "copy", "copy", "main waits for the copies of side"]
    assert cuda.log == expected
    cuda.happened.set()
    found = finish()
    assert list(found) == list(tensors)
    assert found["W"].stride() == W.stride()
    assert found["rng"].tolist() == [0, 1, 2]
    again = copies.begin(tensors)()
    assert cuda.log == 2 * expected
    assert again["W"].data_ptr() == found["W"].data_ptr(), "pinned memory is used again"
    wider = copies.begin({"W": torch.zeros(4, 4).as_subclass(OnDevice)})()
    assert wider["W"].shape == (4, 4)
    copies.release()
    assert not copies._buffers


def test_a_checkpoint_waits_for_the_copies_and_training_does_not(cuda: FakeCuda, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints._copies = HostCopies(cuda)
    tensors = {"W": torch.arange(4.0).as_subclass(OnDevice), "rng": torch.arange(3)}
    checkpoints.save(7, tensors, (0, 4), {"step": 7, "sae": {}, "axes": {}})
    assert checkpoints._thread is not None
    checkpoints._thread.join(0.05)
    assert not list(tmp_path.glob("*/state*")), "written before the copies are made"
    cuda.happened.set()
    checkpoints.wait()
    assert load_file(tmp_path / "step_00000007" / "state.safetensors")["W"].tolist() == [0, 1, 2, 3]
    checkpoints.settle()
    assert not checkpoints._copies._buffers


def test_on_the_cpu_each_tensor_is_copied_once_and_at_once() -> None:
    W = torch.zeros(3)
    finish = HostCopies(None).begin({"W": W})
    W += 1
    assert finish()["W"].tolist() == [0, 0, 0]
