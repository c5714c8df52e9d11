"""Tensors in files: what is there is known from the headers, and weights come block by block.

Nothing here trusts a file: a header is checked against the size of the file before a byte of weights is read, nothing
is unpickled but tensors, and every block is looked at for NaN on its way into memory.
"""

import json
import math
import pickle
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.progress import progress

BLOCK_BYTES = 64 << 20
"""Bytes of a tensor that are read at a time."""
_BAR_BYTES = 1 << 30
"""Tensors larger than this show a progress bar while they are read."""
_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 20
"""Compressed weights that claim to be larger than this and grow by more than this factor are refused: floating-point
weights hardly compress at all."""

_SAFETENSORS_DTYPES = {
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
        value = float(self.read())
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
                if block.ndim == 0:
                    place.copy_(block)
                else:
                    place[start : start + len(block)].copy_(block)
                    start += len(block)
                bar.update(block.numel() * self.header.dtype.itemsize)


class SafetensorsFile(TensorFile):
    """`.safetensors`, by the library's own reader, which maps the file and checks its header."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.headers = {}
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118  (a safe_open is no mapping)
                    piece = file.get_slice(name)
                    dtype = _SAFETENSORS_DTYPES.get(piece.get_dtype())
                    if dtype is None:
                        raise SteersmanError(f"{path}: {name} has dtype {piece.get_dtype()}, which is not supported")
                    self.headers[name] = Header(tuple(piece.get_shape()), dtype)
        except (SafetensorError, ValueError, OverflowError, OSError) as error:
            if isinstance(error, SteersmanError):
                raise
            raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error

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


class NpzFile(TensorFile):
    """`.npz`: a zip archive of NumPy arrays. Read without NumPy's loader, which trusts the sizes in the archive."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.headers = {}
        self._members: dict[str, tuple[str, int, bool]] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    self._add(archive, info)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, zlib.error) as error:
            raise SteersmanError(f"{path} is truncated or not an npz file: {error}") from error
        total, size = sum(header.n_bytes for header in self.headers.values()), path.stat().st_size
        if total > _BOMB_BYTES and total > _BOMB_RATIO * size:
            raise SteersmanError(
                f"{path} has {size:,} bytes and claims to hold arrays of {total:,}: weights do not compress like that"
            )

    def _add(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        if not info.filename.endswith(".npy") or "/" in info.filename or "\\" in info.filename:
            raise SteersmanError(f"{self.path} holds {info.filename!r}: an npz file of weights holds only arrays")
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as stream:
            try:
                shape, fortran, dtype = _read_npy_header(stream)
            except Exception as error:  # NumPy reads it as Python source, which fails in many ways
                raise SteersmanError(f"{self.path}: the header of {name} cannot be read: {error}") from error
            start = stream.tell()
        if dtype.hasobject or dtype.fields is not None or dtype.kind not in "fiub":
            raise SteersmanError(f"{self.path}: {name} holds {dtype}, which is not numbers: it is not read")
        if any(not isinstance(n, int) or n < 0 for n in shape):
            raise SteersmanError(f"{self.path}: {name} has the impossible shape {shape}")
        declared = math.prod(shape) * dtype.itemsize
        if info.file_size - start != declared:
            raise SteersmanError(
                f"{self.path}: {name} of shape {list(shape)} should take {declared:,} bytes, the archive holds "
                f"{info.file_size - start:,}"
            )
        try:
            torch_dtype = torch.from_numpy(np.zeros(1, dtype.newbyteorder("="))).dtype
        except TypeError as error:
            raise SteersmanError(f"{self.path}: {name} holds {dtype}, which is not supported") from error
        if name in self.headers:
            raise SteersmanError(f"{self.path} holds {name} twice")
        self.headers[name] = Header(shape, torch_dtype)
        self._members[name] = (dtype.str, start, fortran and len(shape) > 1)

    def entry(self, name: str) -> "Entry":
        entry = super().entry(name)
        if self._members[name][2]:
            raise SteersmanError(f"{self.path}: {name} is stored in Fortran order, which is not supported")
        return entry

    def blocks(self, name: str) -> Iterator[Tensor]:
        header, (dtype, start, _) = self.headers[name], self._members[name]
        rows = self._rows_at_a_time(name) if header.shape else 1
        row_shape = header.shape[1:]
        row_bytes = math.prod(row_shape) * np.dtype(dtype).itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                stream.read(start)
                for first in range(0, header.shape[0] if header.shape else 1, rows):
                    n = min(rows, header.shape[0] - first) if header.shape else 1
                    data = stream.read(n * row_bytes)
                    if len(data) != n * row_bytes:
                        raise SteersmanError(f"{self.path} is truncated: {name} ends early")
                    array = np.frombuffer(data, dtype).astype(np.dtype(dtype).newbyteorder("="))
                    yield torch.from_numpy(array.reshape((n, *row_shape) if header.shape else ()))
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise SteersmanError(f"{self.path} is truncated or damaged at {name}: {error}") from error


def _read_npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"version {version} of the npy format")


class PtFile(TensorFile):
    """`.pt`: tensors that `torch.save` wrote. Opened with `weights_only=True`: a file that would run code is refused.

    `below` names an entry of the saved dictionary that holds the tensors. What is not a tensor is in `others`.
    """

    def __init__(self, path: Path, below: str | None = None) -> None:
        super().__init__(path)
        self._below = below
        tensors, self.others = self._open()
        for key, value in tensors.items():
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise SteersmanError(f"{path}: {key} is not a plain dense tensor")
        self.headers = {key: Header(tuple(value.shape), value.dtype) for key, value in tensors.items()}
        # A mapped file is opened anew for each block, as a safetensors file is; an old one is in memory already.
        self._held = None if zipfile.is_zipfile(path) else tensors

    def _open(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, and everything else."""
        saved, others, path = _load_pt(self.path), {}, self.path
        if not isinstance(saved, dict):
            raise SteersmanError(f"{path} holds a {type(saved).__name__}, not a dictionary of tensors")
        if self._below is not None and self._below in saved:
            others = {str(key): value for key, value in saved.items() if key != self._below}
            saved = saved[self._below]
            if not isinstance(saved, dict):
                raise SteersmanError(f"{path}: {self._below!r} holds a {type(saved).__name__}, not tensors")
        others |= {str(key): value for key, value in saved.items() if not isinstance(value, Tensor)}
        return {str(key): value for key, value in saved.items() if isinstance(value, Tensor)}, others

    def blocks(self, name: str) -> Iterator[Tensor]:
        shape = self.headers[name].shape
        rows = self._rows_at_a_time(name) if shape else 1
        for start in range(0, shape[0] if shape else 1, rows):
            tensor = (self._held or self._open()[0])[name].detach()
            yield tensor[start : start + rows] if shape else tensor


def _load_pt(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)  # raises for archives of several parts
        if zipped:
            with zipfile.ZipFile(path) as archive:
                packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
                if packed:
                    raise SteersmanError(
                        f"{path} holds compressed entries ({packed[0]}), which torch.save never writes"
                    )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        if "GLOBAL" in str(error) or "Unsupported" in str(error) or "global" in str(error):
            raise SteersmanError(
                f"{path} holds more than tensors, and reading it would run code from the file: it is refused"
            ) from error
        raise SteersmanError(f"{path} is truncated or not a file of tensors: {reason}") from error
    except SteersmanError:
        raise
    except Exception as error:  # the reader of a damaged file fails in many ways
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise SteersmanError(f"{path} is truncated or not a file of tensors: {reason}") from error


def open_tensors(path: Path, below: str | None = None) -> TensorFile:
    """The tensors of a file, by the ending of its name. `below` is for `.pt` files that keep them one level down."""
    if not path.is_file():
        raise SteersmanError(f"{path} is missing")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix == ".npz":
        return NpzFile(path)
    if path.suffix in (".pt", ".pth"):
        return PtFile(path, below)
    raise SteersmanError(f"{path}: tensors are read from .safetensors, .npz and .pt files")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SteersmanError for anything else."""
    try:
        if path.stat().st_size > 64 << 20:
            raise SteersmanError(f"{path} is too large for a configuration")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SteersmanError):
            raise
        raise SteersmanError(f"{path} is not a readable SAE configuration: {error}") from error
    if not isinstance(value, dict):
        raise SteersmanError(f"{path} is not a readable SAE configuration: it holds no JSON object")
    return value
