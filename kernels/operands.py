"""What the matrix units read: activations and weights in the dtype of the products, rows of a multiple of UNIT
elements.

fp32 tensors are multiplied as `precision` says, in bf16 unless set otherwise; the low-precision copy of a
weight is made once and made again only when the weight has changed.

Shape letters: N tokens, L latents, D width (here already padded).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from steersman.errors import SteersmanError

UNIT = 8
"""Elements that a row is padded to a multiple of, so that every row starts on 16 bytes."""

Precision = Literal["bf16", "tf32", "fp32"]

_state: dict[str, Precision] = {"precision": "bf16"}


@contextlib.contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Multiply fp32 tensors within the block in bf16 (the default), tf32 or full fp32. Sums are fp32 in all three.

    >>> with precision("fp32"):
    ...     pass
    """
    if name not in ("bf16", "tf32", "fp32"):
        raise SteersmanError(f"no precision {name!r}; have bf16, tf32, fp32")
    before, _state["precision"] = _state["precision"], name
    try:
        yield
    finally:
        _state["precision"] = before


@dataclass(frozen=True)
class Operands:
    """The operands of an encoder's product."""

    x: Tensor
    """[N, D] centred activations."""
    W: Tensor
    """[L, D] latent-major encoder rows, in the dtype of x."""
    bias: Tensor
    """[L] fp32."""
    precision: str
    """Triton's name of how fp32 operands are multiplied; bf16 ones have only one way."""

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def in_full(self) -> bool:
        """Whether fp32 is multiplied as it is, for which there are no matrix units."""
        return self.dtype == torch.float32 and self.precision == "ieee"

    def shape(self, k: int) -> tuple[int, int, int, int]:
        """N, L, D, K."""
        return len(self.x), len(self.W), self.x.shape[1], k


def prepare(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Operands:
    """x [N, D], W_enc [L, D], b_enc [L], b_dec [D] as `wave_kernel` reads them.

    b_dec is subtracted in fp32 before x is rounded: exact where the reference is exact, and cheaper than a pass over
    W_enc for `b_enc - W_enc b_dec`.
    """
    low = W_enc.dtype in (torch.bfloat16, torch.float16)
    dtype = W_enc.dtype if low else (torch.bfloat16 if _state["precision"] == "bf16" else torch.float32)
    how = "tf32" if _state["precision"] == "tf32" else "ieee"
    centred = x if b_dec is None else x.float() - b_dec.float()
    rows, W = _padded(centred, dtype), weights(W_enc, dtype)
    if dtype == torch.bfloat16 and not x.is_cuda:
        # Triton's interpreter cannot multiply bf16; in fp32 the product of two bf16 numbers is the same, and exact.
        rows, W = rows.float(), W.float()
    return Operands(rows, W, b_enc.float().contiguous(), how)


def _padded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [M, D] in `dtype`, contiguous, with zeros up to a multiple of UNIT; the tensor itself where
    it is that already."""
    D = rows.shape[1]
    if D % UNIT == 0:
        return _packed(rows.to(dtype).contiguous())
    out = rows.new_zeros((len(rows), -(-D // UNIT) * UNIT), dtype=dtype)
    out[:, :D] = rows
    return out


def _packed(rows: Tensor) -> Tensor:
    """A contiguous tensor [M, D] whose rows are D apart and start on 16 bytes: itself, a view, or a copy.

    PyTorch calls a tensor contiguous whatever the stride of a dimension of size 1; the copy engine reads that stride.
    """
    rows = rows.view(-1).view(rows.shape)
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each tensor's memory has been written to: whoever keeps a copy of weights asks whether it is stale.

    The counter is PyTorch's own and private (`Tensor._version`); autograd raises "modified by an inplace operation" by
    it, so it counts every in-place operation, and what custom operators declare as `mutates_args`. Views share their
    base's counter. Not counted: a write through `.data`, and in inference mode, whose tensors have no counter.
    """
    return tuple(tensor._version for tensor in tensors)


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def weights(W: Tensor, dtype: torch.dtype) -> Tensor:
    """W [L, D] as an operand in `dtype`: itself where it fits, else a copy that is kept while W does not change.

    The copy belongs to the tensor that owns the storage (a module's `W_enc.T` is a new view each time) and to its
    version (see `versions`). While a CUDA graph is captured the copy is made in any case, so that
    replays see the weights of their time.
    """
    if W.dtype == dtype and W.is_contiguous() and W.shape[1] % UNIT == 0 and W.data_ptr() % 16 == 0:
        return _packed(W.detach())
    owner = W if W._base is None else W._base
    if W.is_inference() or owner.is_inference():
        return _padded(W.detach(), dtype)
    key = (dtype, tuple(W.shape), W.stride(), W.storage_offset(), W.data_ptr())
    capturing = W.is_cuda and torch.cuda.is_current_stream_capturing()
    kept = _copies.get(owner)
    if kept is None or kept[0] != key or kept[1] != versions(owner) or capturing:
        copy = _padded(W.detach(), dtype)
        if capturing:
            return copy
        kept = (key, versions(owner), copy)
        _copies[owner] = kept
    return kept[2]
