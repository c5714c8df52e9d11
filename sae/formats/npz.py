"""`.npz`: a zip archive of NumPy arrays. Read without NumPy's loader, which trusts the sizes in the archive."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.reading import check_regular
from steersman.sae.formats.tensors import DTYPES, Entry, Header, TensorFile

_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 20
"""Compressed weights that claim to be larger than this and grow by more than this factor are refused: floating-point
weights hardly compress at all."""


class NpzFile(TensorFile):
    """`.npz`: a zip archive of NumPy arrays. Read without NumPy's loader, which trusts the sizes in the archive."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.headers = {}
        self._members: dict[str, tuple[str, int, bool]] = {}
        check_regular(path)
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
        if torch_dtype not in DTYPES.values():
            raise SteersmanError(f"{self.path}: {name} holds {dtype}, which is not supported")
        if name in self.headers:
            raise SteersmanError(f"{self.path} holds {name} twice")
        self.headers[name] = Header(shape, torch_dtype)
        self._members[name] = (dtype.str, start, fortran and len(shape) > 1)

    def entry(self, name: str) -> Entry:
        entry = super().entry(name)
        if self._members[name][2]:
            raise SteersmanError(f"{self.path}: {name} is stored in Fortran order, which is not supported")
        return entry

    def check(self) -> None:
        """The archive's checksums are compared as each array is read to its end."""

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
