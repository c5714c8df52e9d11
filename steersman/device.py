"""Where tensors go: what a user's `--device` means, once for every part of the program."""

import os

import torch

from steersman.errors import SteersmanError

__all__ = ["local_rank", "pick_device"]


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device `name` means; a `torch.device` is returned as it is.

    `auto` is the accelerator there is (CUDA, MPS, XPU, ...), else the CPU; under `torchrun`, where there are several
    accelerators, the one that LOCAL_RANK names. Any other name is tried. Raises SteersmanError when it cannot be used.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return _accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SteersmanError(
            f"device {name!r} cannot be used: {_first_sentence(error)}; use auto, cpu, cuda, cuda:0, ..."
        ) from error


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0]


def _accelerator() -> torch.device | None:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count()
    if accelerator is None or "LOCAL_RANK" not in os.environ or count < 2:
        return accelerator
    return torch.device(accelerator.type, local_rank() % count)


def local_rank() -> int:
    """Which of its machine's processes this is, as `torchrun` says in LOCAL_RANK; 0 without one."""
    try:
        return int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError:
        raise SteersmanError("LOCAL_RANK in the environment must be a number; start with torchrun") from None
