"""What `auto` means on machines of every kind, with PyTorch's own answers replaced."""

import pytest
import torch

from steersman.device import pick_device
from steersman.errors import SteersmanError


def machine(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None if kind is None else torch.device(kind))


@pytest.mark.parametrize(
    ("kind", "count", "local_rank", "expected"),
    [
        (None, 0, None, "cpu"),
        (None, 0, "1", "cpu"),
        ("cuda", 1, None, "cuda"),
        ("cuda", 1, "1", "cuda"),
        ("cuda", 8, None, "cuda"),
        ("cuda", 8, "5", "cuda:5"),
        ("cuda", 2, "3", "cuda:1"),
        ("mps", 1, None, "mps"),
        ("mps", 1, "0", "mps"),
        ("xpu", 4, "2", "xpu:2"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int, local_rank: str | None, expected: str
) -> None:
    machine(monkeypatch, kind, count)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert pick_device() == pick_device("auto") == torch.device(expected)


def test_named_devices_are_tried_and_torch_devices_kept() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("mps")) == torch.device("mps")


@pytest.mark.parametrize("name", ["gpuu", "cuda:99", ""])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(SteersmanError, match=f"device {name!r} cannot be used: .*use auto, cpu"):
        pick_device(name)


def test_a_local_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(SteersmanError, match="LOCAL_RANK in the environment must be a number"):
        pick_device()
