"""The kernels in Triton, with the functions of `torch_ops`: what NVIDIA GPUs from compute capability 8.0 on run.

On the CPU they run only under Triton's interpreter (`TRITON_INTERPRET=1`), which is for tests.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import (
    torch_ops,
    triton_backward,
    triton_centre,
    triton_counters,
    triton_decode,
    triton_encode,
    triton_threshold,
    triton_update,
)
from steersman.kernels.update import UpdateState

LatentOrder = triton_backward.LatentOrder

F = TypeVar("F", bound=Callable[..., Any])


def on_device(function: F) -> F:
    """Launch on the device of the first argument, which need not be the current one."""

    @functools.wraps(function)
    def launch(first: Tensor | UpdateState, *args: Any, **kwargs: Any) -> Any:
        device = first.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(first, *args, **kwargs)

    return launch  # pyright: ignore[reportReturnType]


@on_device
def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """See `reference.topk_encode`."""
    if not 1 <= k <= len(W_enc):
        raise SteersmanError(f"topk_encode: k = {k} must lie between 1 and the {len(W_enc)} latents of W_enc")
    if k > triton_encode.LARGEST_K or (signed and len(W_enc) > triton_encode.MOST_SIGNED):
        return torch_ops.topk_encode(x, W_enc, b_enc, k, b_dec, signed=signed)
    return triton_encode.topk_encode(x, W_enc, b_enc, k, b_dec, signed=signed)


batch_topk_encode = on_device(triton_threshold.batch_topk_encode)
threshold_encode = on_device(triton_threshold.threshold_encode)
threshold_select = on_device(triton_threshold.threshold_select)
sparse_decode = on_device(triton_decode.sparse_decode)
centre = on_device(triton_centre.centre)
decode_and_dots = on_device(triton_decode.decode_and_dots)
value_gradient = on_device(triton_backward.value_gradient)
backward_update = on_device(triton_update.backward_update)
move_b_dec = on_device(triton_update.move_b_dec)
mark_active = on_device(triton_counters.mark_active)
count_silence = on_device(triton_counters.count_silence)
