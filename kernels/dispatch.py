"""Which implementation of the kernels runs: one pure function of the device and of what the user asked for."""

import contextlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

import torch

from steersman.errors import SteersmanError
from steersman.kernels import torch_ops

Implementation = Literal["auto", "triton", "torch"]
"""Names of the implementations of the kernels."""

_IMPLEMENTATIONS = ("auto", "triton", "torch")

_state = {"requested": "auto"}  # of the process, not of a thread: autograd runs backward passes in threads of its own


@contextlib.contextmanager
def using(implementation: str, device: torch.device | None = None) -> Iterator[None]:
    """Within the block, run this implementation wherever none is named. A device given here is checked at once.

    >>> with using("torch"):
    ...     choose(torch.device("cpu")).__name__
    'steersman.kernels.torch_ops'
    """
    _check_name(implementation)
    if device is not None:
        choose(device, implementation)
    before, _state["requested"] = _state["requested"], implementation
    try:
        yield
    finally:
        _state["requested"] = before


def _check_name(implementation: str) -> None:
    if implementation not in _IMPLEMENTATIONS:
        raise SteersmanError(f"no kernels named {implementation!r}; have {', '.join(_IMPLEMENTATIONS)}")


def choose(device: torch.device, requested: str | None = None) -> ModuleType:
    """The module whose functions compute on `device`; every module has the same functions, those of `torch_ops`.

    `auto` is Triton on NVIDIA GPUs from compute capability 8.0 on, PyTorch elsewhere. None asks for what `using` set,
    or auto. A request that cannot be met is an error, never another implementation.

    >>> choose(torch.device("cpu")).__name__
    'steersman.kernels.torch_ops'
    """
    requested = requested or _state["requested"]
    _check_name(requested)
    if requested == "torch":
        return torch_ops
    obstacle = triton_obstacle(device)
    if obstacle is None and (requested == "triton" or device.type == "cuda"):
        from steersman.kernels import triton_ops

        return triton_ops
    if requested == "triton":
        raise SteersmanError(f"kernels=triton cannot run on {device}: {obstacle}; use kernels=torch or auto")
    return torch_ops


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "they are written for NVIDIA GPUs"
        return _obstacle_of(*torch.cuda.get_device_capability(device))
    from triton import knobs

    if device.type == "cpu" and knobs.runtime.interpret:
        return None
    return "they run on NVIDIA GPUs"


def _obstacle_of(major: int, minor: int) -> str | None:
    """Why the kernels cannot run on an NVIDIA GPU of this compute capability, or None."""
    import triton

    if major < 8:
        return f"it has compute capability {major}.{minor}, and they need 8.0"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if major >= 10 and version < (3, 9):  # older compilers cannot reduce a product that lies in tensor memory
        return f"compute capability {major}.{minor} needs Triton 3.9, and this is {triton.__version__}"
    return None
