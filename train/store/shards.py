"""Shards of a store: safetensors files written as a stream, under their name only when they are whole.

A shard is an ordinary safetensors file. Its header is padded with spaces to `DATA_OFFSET` bytes, which the format
allows: the tensor then starts on a memory page of every common system and can be mapped as it is, and the header can be
written last, when the number of rows is known, so that a shard is never held in memory while it grows.
"""

import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from steersman.errors import SteersmanError
from steersman.files import replace_whole, temporary_path

DATA_OFFSET = 65536
"""Bytes before a shard's tensor: a multiple of the page size of x86 (4 KiB) and of Arm (up to 64 KiB)."""

DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "float32": (torch.float32, "F32")}
"""The types that a store offers: name -> (torch type, name in a safetensors header)."""

_SAME_SIZE_INTEGER = {2: torch.int16, 4: torch.int32}


def check_choices(dtype: str, on_nonfinite: str) -> None:
    """`SteersmanError` unless both are values that a store knows."""
    if dtype not in DTYPES:
        raise SteersmanError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if on_nonfinite not in ("error", "skip"):
        raise SteersmanError(f"on_nonfinite {on_nonfinite!r} is neither 'error' nor 'skip'")


@contextmanager
def disk_errors(where: Path, advice: str) -> Iterator[None]:
    """Turn what the operating system answers, such as that a disk is full or read-only, into one `SteersmanError` that
    names the folder."""
    try:
        yield
    except OSError as error:
        causes = {
            errno.ENOSPC: "no space left on the disk",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "no permission to write",
            errno.EPERM: "no permission to write",
            errno.ENOTDIR: "a part of the path is a file, not a folder",
            errno.EEXIST: "this is a file, not a folder",
            errno.EIO: "the disk reports an input/output error",
        }
        cause = causes.get(error.errno or 0, error.strerror or str(error))
        raise SteersmanError(f"{where}: {cause}; {advice}") from error


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What the manifest says about one file of a shard."""

    bytes: int
    """Size of the whole file."""
    crc32: int
    """CRC-32 of what follows the first `DATA_OFFSET` bytes of an activation file, or of a whole row file."""


class ShardWriter:
    """Writes one [n, width] tensor as a safetensors file, chunk by chunk, in constant memory.

    Nothing appears at `path` until `close`, which writes the header, syncs and renames. `abandon` leaves nothing.
    """

    def __init__(self, path: Path, name: str, width: int, dtype: str) -> None:
        self.path, self.name, self.width = path, name, width
        self._torch_dtype, self._header_dtype = DTYPES[dtype]
        self._temporary = temporary_path(path)
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - open across calls, closed in close
        self._file.seek(DATA_OFFSET)
        self._crc = 0
        self.n_rows = 0

    def append(self, x: torch.Tensor) -> None:
        """Write the rows of `x` [n, width], on the CPU and already of the shard's type."""
        integers = x.contiguous().view(_SAME_SIZE_INTEGER[x.element_size()])
        self._write(integers.numpy().data.cast("B") if len(x) else memoryview(b""))
        self.n_rows += len(x)

    def append_file(self, path: Path, n_rows: int, expected: FileRecord) -> None:
        """Write the `n_rows` rows of another shard of the same kind, which must be as its record says."""
        check_size(path, expected)
        buffer, crc = bytearray(1 << 20), self._crc
        with open(path, "rb", buffering=0) as file:
            file.seek(DATA_OFFSET)
            while n := file.readinto(buffer):
                self._write(memoryview(buffer)[:n])
        if not crc and self._crc != expected.crc32:
            raise damaged(path)
        self.n_rows += n_rows

    def _write(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        while data:  # an unbuffered write may take less than it is given
            data = data[self._file.write(data) :]

    def close(self) -> FileRecord:
        """Write the header, sync the file and give it its name; returns what the manifest must say about it."""
        size = self.n_rows * self.width * self._torch_dtype.itemsize
        entry = {"dtype": self._header_dtype, "shape": [self.n_rows, self.width], "data_offsets": [0, size]}
        header = json.dumps({self.name: entry}).encode().ljust(DATA_OFFSET - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return FileRecord(bytes=DATA_OFFSET + size, crc32=self._crc)

    def abandon(self) -> None:
        """Stop and leave nothing behind, as far as the disk allows."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> FileRecord:
    """Write small numpy arrays as one safetensors file, in one step; returns its record for the manifest."""
    content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    replace_whole(path, lambda temporary: temporary.write_bytes(content))
    return FileRecord(bytes=len(content), crc32=zlib.crc32(content))


def damaged(path: Path) -> SteersmanError:
    """What is said of a file whose content is not what was written."""
    return SteersmanError(
        f"{path}: the file's content does not match its checksum; restore it, or write the store again"
    )


def load_arrays(path: Path, prefix: str = "", expected: FileRecord | None = None) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file whose names start with `prefix`, which is taken off; others are not read.

    Raises `SteersmanError` naming the file when it is missing, damaged, or not as `expected`.
    """
    if expected is not None:
        check_content(path, expected)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise SteersmanError(
            f"{path}: this file of the store is missing; restore it, or write the store again"
        ) from None
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise SteersmanError(f"{path}: damaged ({error}); restore it, or write the store again") from error


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor name -> dtype, shape, data_offsets (from the end of the header).

    Raises `SteersmanError` naming the file when it is not a safetensors file or its header is damaged.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > 100_000_000:
                raise SteersmanError(
                    f"{path}: not a safetensors file, or its first bytes are damaged; write the store again"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise SteersmanError(f"{path} cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SteersmanError(f"{path}: the safetensors header is damaged; write the store again") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise SteersmanError(f"{path}: the safetensors header is damaged; write the store again")
    header.pop("__metadata__", None)
    return header


def missing(path: Path) -> SteersmanError:
    """What is said of a file of a store that is not there."""
    return SteersmanError(f"{path}: this shard is missing; restore it, or write the store again")


def check_size(path: Path, expected: FileRecord) -> None:
    """Compare a file's size with its record; `SteersmanError` if the file is missing or cut short."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise missing(path) from None
    except OSError as error:
        raise SteersmanError(f"{path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise SteersmanError(f"{path}: this shard is no regular file; restore it, or write the store again")
    if (size := found.st_size) != expected.bytes:
        raise SteersmanError(
            f"{path}: this shard has {size} bytes where the manifest says {expected.bytes}; "
            "it was cut short or altered: restore it, or write the store again"
        )


def check_content(path: Path, expected: FileRecord, skip: int = 0) -> None:
    """Compare a file's size and its content after the first `skip` bytes with its record; `SteersmanError` naming the
    file when it is missing, cut short or altered."""
    check_size(path, expected)
    if checksum(path, skip) != expected.crc32:
        raise damaged(path)


def check_shard_header(path: Path, name: str, n_rows: int, width: int, dtype: str) -> None:
    """Read an activation shard's header; `SteersmanError` if it does not hold just `name` [n_rows, width]."""
    header = read_header(path)
    entry = header.get(name, {})
    found = (entry.get("dtype"), entry.get("shape"))
    wanted = (DTYPES[dtype][1], [n_rows, width])
    if found != wanted or len(header) != 1:
        raise SteersmanError(
            f"{path}: the shard's header describes {found[0]} {found[1]}, the manifest {wanted[0]} {wanted[1]}; "
            "the file was altered: restore it, or write the store again"
        )


def checksum(path: Path, skip: int = 0) -> int:
    """CRC-32 of a file's content after the first `skip` bytes, read in constant memory."""
    crc, buffer = 0, bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        file.seek(skip)
        while n := file.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:n], crc)
    return crc
