"""Tensors in files: what is there is known from the headers, and weights come block by block.

Nothing here trusts a file: a header is checked against the size of the file before a byte of weights is read, nothing
is unpickled but tensors, and every block is looked at for NaN on its way into memory.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.progress import progress
from steersman.reading import check_regular
from steersman.tensor_files import check_tensors

BLOCK_BYTES = 64 << 20
"""Bytes of a tensor that are read at a time."""
_BAR_BYTES = 1 << 30
"""Tensors larger than this show a progress bar while they are read."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What is read, of whatever kind of file, by the names that safetensors has for it."""


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(ABC):
    """A file of named tensors. `headers` is known on opening; weights are read when asked for."""

    headers: dict[str, Header]

    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def entry(self, name: str) -> "Entry":
        """The tensor `name`. Raises SteersmanError naming what the file has instead."""
        if name not in self.headers:
            raise SteersmanError(
                f"{self.path} has no tensor {name!r}; it has {', '.join(sorted(self.headers)) or 'none'}"
            )
        return Entry(self, name)

    @abstractmethod
    def check(self) -> None:
        """Raise SteersmanError where the file carries a checksum that its content does not have. One read of it."""

    @abstractmethod
    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor in pieces along its first dimension, in order. A scalar is one piece."""

    def _rows_at_a_time(self, name: str) -> int:
        header = self.headers[name]
        return max(1, BLOCK_BYTES * max(1, header.shape[0]) // max(1, header.n_bytes))


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as the SAE is to have it: maybe transposed and scaled."""

    file: TensorFile
    name: str
    transposed: bool = False
    factor: float = 1.0
    exponential: bool = False
    row: int | None = None

    @property
    def header(self) -> Header:
        return self.file.headers[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after transposing."""
        return self.header.shape[::-1] if self.transposed else self.header.shape

    @property
    def T(self) -> "Entry":
        """Its transpose."""
        return replace(self, transposed=not self.transposed)

    def scaled(self, factor: float) -> "Entry":
        """It times a number."""
        return replace(self, factor=self.factor * factor)

    def exp(self) -> "Entry":
        """Its exponential."""
        return replace(self, exponential=True)

    def _values(self, block: Tensor) -> Tensor:
        if self.exponential:
            block = block.float().exp()
        if self.factor != 1.0:
            block = block.float() * self.factor
        return block

    def read(self) -> Tensor:
        """The whole of it. For scalars and biases."""
        blocks = [self._values(block) for block in self.file.blocks(self.name)]
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return whole.T if self.transposed else whole

    def floats(self) -> Iterator[Tensor]:
        """It in pieces along its first stored dimension, as fp32, whatever it holds."""
        for block in self.file.blocks(self.name):
            yield self._values(block).float()

    def number(self) -> float:
        """The number it holds. Raises SteersmanError for more than one, or one that is not finite."""
        if math.prod(self.shape) != 1:
            raise SteersmanError(f"{self.file.path}: {self.name} has shape {list(self.shape)}, it should be one number")
        value = float(self.read().reshape(()))
        if not math.isfinite(value):
            raise SteersmanError(f"{self.file.path}: {self.name} is {value}")
        return value

    def copy_into(self, target: Tensor, *, allow_infinite: bool = False) -> None:
        """Fill `target`, of the same shape, block by block. Raises SteersmanError for NaN, and for infinite values."""
        if tuple(target.shape) != self.shape:
            raise SteersmanError(
                f"{self.file.path}: {self.name} has shape {list(self.shape)}, it should be {list(target.shape)}"
            )
        if not self.header.dtype.is_floating_point:
            raise SteersmanError(
                f"{self.file.path}: {self.name} holds {self.header.dtype}, weights must be floating point"
            )
        place = target.T if self.transposed else target
        start = 0
        shown = self.header.n_bytes >= _BAR_BYTES
        total = self.header.n_bytes
        with progress(desc=f"reading {self.name}", total=total, unit="B", unit_scale=True, shown=shown) as bar:
            for block in self.file.blocks(self.name):
                block = self._values(block)
                bad = block.isnan() if allow_infinite else ~block.isfinite()
                if bool(bad.any()):
                    raise SteersmanError(f"{self.file.path}: {self.name} holds values that are not finite")
                part = place if block.ndim == 0 else place[start : start + len(block)]
                part.copy_(block)
                if part.dtype != block.dtype and not allow_infinite and not bool(part.isfinite().all()):
                    raise SteersmanError(
                        f"{self.file.path}: {self.name} holds values that are too large for {part.dtype}"
                    )
                start += 0 if block.ndim == 0 else len(block)
                bar.update(block.numel() * self.header.dtype.itemsize)


class SafetensorsFile(TensorFile):
    """`.safetensors`, by the library's own reader, which maps the file and checks its header."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.headers = {}
        check_regular(path)
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118  (a safe_open is no mapping)
                    piece = file.get_slice(name)
                    dtype = DTYPES.get(piece.get_dtype())
                    if dtype is None:
                        raise SteersmanError(f"{path}: {name} has dtype {piece.get_dtype()}, which is not supported")
                    self.headers[name] = Header(tuple(piece.get_shape()), dtype)
        except SteersmanError:
            raise
        except (SafetensorError, ValueError, OverflowError, OSError, RuntimeError, TypeError) as error:
            raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error

    def check(self) -> None:
        check_tensors(self.path)

    def blocks(self, name: str) -> Iterator[Tensor]:
        shape = self.headers[name].shape
        if not shape:
            with safe_open(self.path, framework="pt") as file:
                yield file.get_tensor(name)
            return
        rows = self._rows_at_a_time(name)
        for start in range(0, shape[0], rows):
            # Opened anew for each block: pages of a mapping that is closed no longer count as this process's memory.
            with safe_open(self.path, framework="pt") as file:
                yield file.get_slice(name)[start : start + rows]
