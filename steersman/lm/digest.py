"""What a model is, in a few hexadecimal digits: its configuration and its weights.

A model's name is the last part of a folder's name, and two checkpoints of one fine-tuning may share it. What is
computed with one and resumed with the other would be a mixture, so work that can be resumed records this digest.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["model_digest", "tensor_hash", "weights_digest"]

READ = 1 << 27
"""About how many weights are read: all of a model below this size, of larger ones every n-th row of each matrix."""
_COLUMNS = 1024
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What loading adds or changes and no result depends on.
_UNRELATED = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation", "use_cache")


def model_digest(model: nn.Module, config: Any = None) -> str:
    """Sixteen hexadecimal digits that change with the model's configuration or weights, and not with its device.

    Weights that are not here (offloaded) or only in part (split over ranks) are left out.
    """
    known = config.to_dict() if hasattr(config, "to_dict") else {}
    known = {name: value for name, value in known.items() if name not in _UNRELATED}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    digest.update(weights_digest(model).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of a model's parameters and buffers that are saved: exact sums of their bits."""
    tensors = {name: value for name, value in model.state_dict(keep_vars=False).items() if _is_here(value)}
    stride = -(-sum(value.numel() for value in tensors.values()) // READ) or 1
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(_bit_sums(value[::stride] if value.ndim > 1 else value).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def tensor_hash(*tensors: Tensor) -> str:
    """Sixteen hexadecimal digits that change when any number of the tensors changes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        x = tensor.detach().cpu().contiguous()
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data if x.numel() else b"")
    return digest.hexdigest()[:16]


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta" and type(value) in (Tensor, nn.Parameter)


def _bit_sums(value: Tensor) -> Tensor:
    """The numbers of a tensor as integers, summed 1,024 apart: exact, and so the same on every device."""
    flat = value.contiguous().reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    elif flat.dtype not in _INTEGERS.values():
        flat = flat.view(_INTEGERS[min(flat.element_size(), 8)])
    whole = flat.numel() // _COLUMNS * _COLUMNS
    sums = flat[:whole].view(-1, _COLUMNS).sum(dim=0, dtype=torch.int64)
    sums[: flat.numel() - whole] += flat[whole:].to(torch.int64)
    return sums
