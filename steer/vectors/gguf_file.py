"""The GGUF container, as far as control vectors need it: fields and tensors, every length compared with the file's.

A file is: `GGUF`, version, number of tensors and of fields; the fields (name, type, value); of each tensor name,
dimensions, type and offset; and from the next multiple of `general.alignment` on, their data.

Source: github.com/ggml-org/ggml, `docs/gguf.md`.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steersman.errors import SteersmanError
from steersman.reading import read_bytes

_LARGEST_FILE = 1 << 30
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST, _MOST_DIMENSIONS, _LONGEST_KEPT = 4, 4, 1024
_PLAIN = {0: np.float32, 1: np.float16, 28: np.float64}
"""Types of tensors that NumPy knows by their numbers in the format; others are unpacked by the `gguf` package."""


class Info(NamedTuple):
    """What the file says of one tensor."""

    shape: tuple[int, ...]
    """Dimensions, outermost first."""
    kind: int
    """Number of its type."""
    offset: int
    """Where its data begins, counted from the beginning of the file."""


@dataclass(frozen=True)
class GGUFFile:
    """The fields and tensors of a file."""

    path: Path
    content: bytes
    order: str
    """`<` or `>`: the order of the bytes of a number."""
    fields: dict[str, Any]
    """Numbers, texts, and arrays of up to 1,024 numbers; what else there is is None."""
    tensors: dict[str, Info]

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor as fp32. Raises SteersmanError where the file is too short for it."""
        info = self.tensors[name]
        n = math.prod(info.shape)
        if info.kind in _PLAIN:
            dtype = np.dtype(_PLAIN[info.kind]).newbyteorder(self.order)  # pyright: ignore[reportArgumentType]
            return np.frombuffer(self._data(name, n * dtype.itemsize), dtype).astype(np.float32).reshape(info.shape)
        try:
            import gguf
        except ImportError:
            raise SteersmanError(
                'GGUF files of this type need the gguf package: pip install "steersman[gguf]"'
            ) from None
        kind = gguf.GGMLQuantizationType(info.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.frombuffer(self._data(name, n // block * size), np.uint8)
        return np.array(gguf.quants.dequantize(data, kind), np.float32).reshape(info.shape)

    def _data(self, name: str, n_bytes: int) -> bytes:
        start = self.tensors[name].offset
        if start + n_bytes > len(self.content):
            raise SteersmanError(f"{self.path} is damaged or not a GGUF file: it ends before {name} does")
        return self.content[start : start + n_bytes]


def read_file(path: Path) -> GGUFFile:
    """The GGUF file at `path`. Raises SteersmanError, naming it, for what is none and for lengths that it does not
    have."""
    content = read_bytes(path, limit=_LARGEST_FILE)
    try:
        return _Reader(path, content).file()
    except (struct.error, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, SteersmanError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SteersmanError(f"{path} is damaged or not a GGUF file: {reason}") from error


class _Reader:
    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.place = path, content, 0
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = int.from_bytes(content[4:8], "little")
        self.order = "<" if version & 0xFFFF else ">"
        if self._number("I") not in (2, 3):
            raise ValueError(f"version {version}")

    def file(self) -> GGUFFile:
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        fields: dict[str, Any] = {}
        self._check_count(n_fields, 8 + 4 + 1)
        for _ in range(n_fields):
            name = self._text()
            if name in fields:
                raise ValueError(f"its field {name!r} is there twice")
            fields[name] = self._value(self._number("I"))
        tensors: dict[str, Info] = {}
        self._check_count(n_tensors, 8 + 4 + 4 + 8)
        for _ in range(n_tensors):
            name = self._text()
            n_dimensions = self._number("I")
            if name in tensors or n_dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"its tensor {name!r} is there twice, or has too many dimensions")
            shape = tuple(self._number("Q") for _ in range(n_dimensions))
            tensors[name] = Info(shape[::-1], self._number("I"), self._number("Q"))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self.place // alignment) * alignment
        placed = {name: info._replace(offset=info.offset + start) for name, info in tensors.items()}
        return GGUFFile(self.path, self.content, self.order, fields, placed)

    def _take(self, n: int) -> bytes:
        if n > len(self.content) - self.place:
            raise ValueError("it ends early")
        self.place += n
        return self.content[self.place - n : self.place]

    def _check_count(self, n: int, least: int) -> None:
        """That so many entries of at least so many bytes can be there."""
        if n * least > len(self.content) - self.place:
            raise ValueError(f"it says that it holds {n:,} entries, and is too short for them")

    def _number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self._take(struct.calcsize(code)))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY or depth > _DEEPEST:
            raise ValueError(f"a field of the unknown type {kind}")
        entry, n = self._number("I"), self._number("Q")
        if entry in _SCALARS:
            code = _SCALARS[entry]
            self._check_count(n, struct.calcsize(code))
            data = self._take(n * struct.calcsize(code))
            return list(struct.unpack(f"{self.order}{n}{code}", data)) if n <= _LONGEST_KEPT else None
        self._check_count(n, 8)
        for _ in range(n):
            self._value(entry, depth + 1)
        return None
