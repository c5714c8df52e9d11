"""Which implementation of the kernels runs: one pure function of the device and of what the user asked for."""

from types import ModuleType
from typing import Literal

import torch

from steersman.errors import SteersmanError
from steersman.kernels import torch_ops

Implementation = Literal["auto", "torch"]

IMPLEMENTATIONS: dict[str, ModuleType] = {"torch": torch_ops}


def choose(device: torch.device, requested: str = "auto") -> ModuleType:
    """The module whose functions compute on `device`. Every module has the functions of `reference`.

    A request that cannot be met is an error, never another implementation.

    >>> choose(torch.device("cpu")).__name__
    'steersman.kernels.torch_ops'
    """
    if requested == "auto":
        requested = "torch"
    if requested not in IMPLEMENTATIONS:
        raise SteersmanError(f"no kernels named {requested!r} for {device.type}; have {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[requested]
