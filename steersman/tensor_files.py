"""Safetensors files that carry a checksum of themselves, and bytes that depend on their content alone.

Files are written here and not by the library, which orders metadata differently from run to run, makes a copy of all
tensors first, and leaves a temporary file of its own behind when it is killed. The header begins with one more entry of
the metadata, `crc32`, the CRC-32 of the whole file as it is with eight zeros in that place. Other programs ignore it.
Files without one, of earlier versions or of other programs, are read as they are.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_whole
from steersman.reading import check_regular, shown

__all__ = ["check_format", "check_tensors", "load_tensors", "save_tensors"]

CHECKSUM = "crc32"
_UNSET = "0" * 8
_BEGIN = b'{"__metadata__":{"%s":"' % CHECKSUM.encode()
"""How the header of a file with a checksum begins."""
_DAMAGED_BEGIN = re.compile(rb'.{%d}[0-9a-f]{8}"' % len(_BEGIN), re.DOTALL)
_FEW = 6
"""So many bytes of the beginning may differ in a file that holds a checksum in its place and is damaged."""
_PLACE = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + len(_UNSET))
"""Where in the file the checksum stands."""
_ANY_ENTRY = re.compile(rb'"%s"\s*:\s*[^\s{]' % CHECKSUM.encode())
_CHUNK = 1 << 20
_ALIGNMENT = 64
"""Bytes at a multiple of which PyTorch's tensors begin on a CPU."""
_HEADER_BYTES = 100_000_000
"""Largest header that the library accepts."""
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""What the format calls a type."""


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, on any device, with `metadata` and a checksum as the safetensors file `path`, whole or not at
    all. Equal content gives equal bytes. Raises SteersmanError when the file cannot be written."""
    write_whole(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`save_tensors` at `path` itself, for callers who make the file whole in their own way."""
    # Wide types first, so that every tensor lies at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {CHECKSUM: _UNSET, **dict(sorted((metadata or {}).items()))}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    with open(path, "wb") as file:
        crc = 0
        for part in (len(content).to_bytes(8, "little"), content, *(tensor for _, tensor in ordered)):
            data = memoryview(part) if isinstance(part, bytes) else _bytes_of(part)
            for low in range(0, len(data), _CHUNK):
                crc = zlib.crc32(data[low : low + _CHUNK], crc)
                file.write(data[low : low + _CHUNK])
        file.seek(_PLACE.start)
        file.write(f"{crc:08x}".encode())


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy() if len(flat) else b""
    return memoryview(content)


def check_tensors(path: str | os.PathLike[str]) -> None:
    """Raise SteersmanError when the safetensors file at `path` is no regular file or its checksum is not that of its
    content. One read of the file, in constant memory; none where the file has no checksum."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_HEADER_BYTES, os.fstat(file.fileno()).st_size):
                raise SteersmanError(f"{path} is truncated or not a safetensors file: its header is longer than it")
            header = file.read(length)
            differing = sum(a != b for a, b in zip(header.ljust(len(_BEGIN)), _BEGIN))
            if differing > _FEW or (differing and not _DAMAGED_BEGIN.match(header)):
                if _ANY_ENTRY.search(header):
                    raise SteersmanError(f"{path} is damaged: its header was changed after it was written; restore it")
            elif differing or header[len(_BEGIN) :][: len(_UNSET)] != _crc(Path(path), length):
                raise SteersmanError(
                    f"{path} is damaged: its content does not have the checksum that it was written with; restore it, "
                    "or make it again"
                )
    except OSError as error:
        raise SteersmanError(f"{path} cannot be read: {error.strerror or error}") from error


def load_tensors(
    path: str | os.PathLike[str], names: Iterable[str] | None = None, *, checked: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file (those called `names`, or all) and its metadata, after `check_tensors` (unless
    the caller says that the file was `checked`, to read a part of it without reading all).

    Raises SteersmanError, naming the file, when it is missing, damaged, no safetensors file, or lacks a name.
    """
    if checked:
        check_regular(path)
    else:
        check_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            there = list(file.keys())
            wanted = there if names is None else list(names)
            if lacking := [name for name in wanted if name not in there]:
                raise SteersmanError(f"{path} lacks the tensor {', '.join(lacking)}")
            metadata = dict(file.metadata() or {})
            metadata.pop(CHECKSUM, None)
            return {name: _aligned(file.get_tensor(name)) for name in wanted}, metadata
    except SteersmanError:
        raise
    except (SafetensorError, OSError, ValueError, OverflowError, TypeError, RuntimeError, MemoryError) as error:
        raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, in memory that begins where PyTorch's own begins: what lies as it does in the file may be summed in
    another order, so that what was loaded would not act to the last bit as what was saved."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def check_format(path: str | os.PathLike[str], header: Mapping[str, str], kind: str, version: int, what: str) -> None:
    """Raise SteersmanError unless the header's metadata says `format` = `kind` and a `version` of 1 to the one that is
    known; `what` it should hold is for the message."""
    if header.get("format") != kind:
        named = shown(header["format"]) if "format" in header else "no format of ours"
        raise SteersmanError(f"{path} is a safetensors file but holds no {what}: its header names {named}")
    found = header.get("version", "")
    if not found.isdecimal() or len(found) > 4 or not 1 <= int(found) <= version:
        raise SteersmanError(f"{path}: {what} of version {shown(found)}; this program reads up to {version}")


def _crc(path: Path, length: int) -> bytes:
    """The checksum of a file whose header has `length` bytes, as it stands there."""
    with open(path, "rb") as content:
        head = bytearray(content.read(8 + length))
        head[_PLACE] = _UNSET.encode()
        crc, buffer = zlib.crc32(head), bytearray(_CHUNK)
        while n := content.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:n], crc)
    return f"{crc:08x}".encode()
