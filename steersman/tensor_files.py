"""Safetensors files that carry a checksum of themselves, and bytes that depend on their content alone.

The library writes a header's metadata in an order that differs between runs. Here it is sorted, and one more entry,
`crc32`, holds the CRC-32 of the whole file as it is with eight zeros in that place. Other programs ignore it. Files
without one, of earlier versions or of other programs, are read as they are.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_whole
from steersman.reading import check_regular

__all__ = ["check_tensors", "load_tensors", "save_tensors"]

CHECKSUM = "crc32"
_UNSET = "0" * 8
_ENTRY = re.compile(rb'"%s":"([0-9a-f]{8})"' % CHECKSUM.encode())
_CHUNK = 1 << 20
_HEADER_BYTES = 100_000_000
"""Largest header that the library accepts."""


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, on any device, with `metadata` and a checksum as the safetensors file `path`, whole or not at
    all. Equal content gives equal bytes. Raises SteersmanError when the file cannot be written."""
    write_whole(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`save_tensors` at `path` itself, for callers who make the file whole in their own way."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={**(metadata or {}), CHECKSUM: _UNSET})
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(content) != length:
            raise SteersmanError(f"{path}: the safetensors library wrote a header of another form than expected")
        file.seek(8)
        file.write(content)
        entry = _find_entry(content)
        assert entry is not None
        file.flush()
        value = f"{_crc(path, length, entry):08x}".encode()
        file.seek(8 + entry.start(1))
        file.write(value)


def check_tensors(path: str | os.PathLike[str]) -> None:
    """Raise SteersmanError when the safetensors file at `path` is no regular file or its checksum is not that of its
    content. One read of the file, in constant memory; none where the file has no checksum."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_HEADER_BYTES, os.fstat(file.fileno()).st_size):
                raise SteersmanError(f"{path} is truncated or not a safetensors file: its header is longer than it")
            entry = _find_entry(file.read(length))
            if entry is not None and int(entry[1], 16) != _crc(Path(path), length, entry):
                raise SteersmanError(
                    f"{path} is damaged: its content does not have the checksum that it was written with; restore it, "
                    "or make it again"
                )
    except OSError as error:
        raise SteersmanError(f"{path} cannot be read: {error.strerror or error}") from error


def load_tensors(
    path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file (those called `names`, or all) and its metadata, after `check_tensors`.

    Raises SteersmanError, naming the file, when it is missing, damaged, no safetensors file, or lacks a name.
    """
    check_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            there = list(file.keys())
            wanted = there if names is None else list(names)
            if lacking := [name for name in wanted if name not in there]:
                raise SteersmanError(f"{path} lacks the tensor {', '.join(lacking)}")
            metadata = dict(file.metadata() or {})
            metadata.pop(CHECKSUM, None)
            return {name: file.get_tensor(name) for name in wanted}, metadata
    except SteersmanError:
        raise
    except (SafetensorError, OSError, ValueError, OverflowError, TypeError) as error:
        raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error


def _find_entry(header: bytes) -> re.Match[bytes] | None:
    """Where the header's metadata, its first entry, holds the checksum."""
    start = header.find(b'"__metadata__":{')
    return _ENTRY.search(header, start) if start >= 0 else None


def _crc(path: Path, length: int, entry: re.Match[bytes]) -> int:
    """CRC-32 of the file with zeros where its checksum stands."""
    with open(path, "rb") as content:
        head = bytearray(content.read(8 + length))
        head[8 + entry.start(1) : 8 + entry.end(1)] = _UNSET.encode()
        crc, buffer = zlib.crc32(head), bytearray(_CHUNK)
        while n := content.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:n], crc)
    return crc
