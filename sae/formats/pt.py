"""`.pt`: tensors that `torch.save` wrote. Opened with `weights_only=True`: a file that would run code is refused.

`torch.load` maps a zip archive and trusts what the pickled part says of its members. So their sizes are compared with
what the archive says of them, their checksums with their content, and each tensor's size with that of its storage.
"""

import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.reading import check_regular, one_error
from steersman.sae.formats.tensors import DTYPES, Header, TensorFile

_PICKLE_BYTES = 64 << 20
"""Largest pickled part that is read: it holds names and shapes, not numbers."""
_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1,
}  # fmt: skip


class PtFile(TensorFile):
    """A `.pt` file. `below` names an entry of the saved dictionary that holds the tensors. What is not a tensor is in
    `others`."""

    def __init__(self, path: Path, below: str | None = None) -> None:
        super().__init__(path)
        self._below = below
        size = check_regular(path)
        try:
            self._zipped = zipfile.is_zipfile(path)  # raises for archives of several parts
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise SteersmanError(f"{path} is truncated or not a file of tensors: {error}") from error
        if self._zipped:
            _check_members(path)
        tensors, self.others = self._open()
        for key, value in tensors.items():
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise SteersmanError(f"{path}: {key} is not a plain dense tensor")
            if value.dtype not in DTYPES.values():
                raise SteersmanError(f"{path}: {key} has dtype {value.dtype}, which is not supported")
            n_bytes = value.numel() * value.dtype.itemsize
            if n_bytes > min(size, value.untyped_storage().nbytes()):
                raise SteersmanError(
                    f"{path}: {key} of shape {list(value.shape)} takes {n_bytes:,} bytes, the file holds "
                    f"{min(size, value.untyped_storage().nbytes()):,} for it"
                )
        self.headers = {key: Header(tuple(value.shape), value.dtype) for key, value in tensors.items()}
        # A mapped file is opened anew for each block, as a safetensors file is; an old one is in memory already.
        self._held = None if self._zipped else tensors

    def _open(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, and everything else."""
        saved, others, path = _load(self.path, self._zipped), {}, self.path
        if not isinstance(saved, dict):
            raise SteersmanError(f"{path} holds a {type(saved).__name__}, not a dictionary of tensors")
        if self._below is not None and self._below in saved:
            others = {_key(key, path): value for key, value in saved.items() if key != self._below}
            saved = saved[self._below]
            if not isinstance(saved, dict):
                raise SteersmanError(f"{path}: {self._below!r} holds a {type(saved).__name__}, not tensors")
        others |= {_key(key, path): value for key, value in saved.items() if not isinstance(value, Tensor)}
        return {_key(key, path): value for key, value in saved.items() if isinstance(value, Tensor)}, others

    def check(self) -> None:
        if self._zipped:
            _check_content(self.path)

    def blocks(self, name: str) -> Iterator[Tensor]:
        shape = self.headers[name].shape
        rows = self._rows_at_a_time(name) if shape else 1
        for start in range(0, shape[0] if shape else 1, rows):
            tensor = (self._held or self._open()[0])[name].detach()
            yield tensor[start : start + rows] if shape else tensor


def _key(key: Any, path: Path) -> str:
    if not isinstance(key, str | int):
        raise SteersmanError(f"{path}: a key of its dictionary is a {type(key).__name__}, not a name")
    return str(key)


def _load(path: Path, zipped: bool) -> Any:
    try:
        with warnings.catch_warnings():  # of odd pickles: what cannot be read is said by the error
            warnings.simplefilter("ignore")
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


# The archive


def _check_members(path: Path) -> None:
    """Raise SteersmanError unless every storage that the pickled part names is a member of the size that it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            for info in members.values():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise SteersmanError(
                        f"{path} holds compressed entries ({info.filename}), which torch.save never writes"
                    )
            pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1 or len(members) != len(archive.infolist()):
                raise SteersmanError(f"{path} is truncated or not a file of tensors: it has no one data.pkl")
            if members[pickles[0]].file_size > _PICKLE_BYTES:
                raise SteersmanError(f"{path}: its data.pkl is too large to describe tensors")
            with archive.open(_without_sum(members[pickles[0]])) as content, one_error(path):
                reader = _Storages(content)
                reader.load()
    except SteersmanError:
        raise
    except Exception as error:  # zipfile's own, and what a wrong offset leads to
        raise SteersmanError(f"{path} is truncated or not a file of tensors: {error}") from error
    folder = pickles[0].removesuffix("data.pkl")
    for key, n_bytes in reader.found.items():
        member = members.get(f"{folder}data/{key}")
        if member is None or member.file_size != n_bytes:
            there = "is missing" if member is None else f"has {member.file_size:,} bytes"
            raise SteersmanError(f"{path} is truncated or damaged: its storage {key} of {n_bytes:,} bytes {there}")


def _check_content(path: Path) -> None:
    """Raise SteersmanError where a member's content has another checksum than the archive says."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.CRC == 0:  # torch.save can be told to leave them out
                    continue
                with archive.open(info) as content:
                    while content.read(1 << 20):
                        pass
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise SteersmanError(f"{path} is damaged: {error}") from error


def _without_sum(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """The same member, for a first look at it: its checksum is compared when all are."""
    if info.CRC == 0:
        cast(Any, info).CRC = None
    return info


class _Nothing:
    """What stands for every class and function that the pickled part names: it does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "_Nothing":
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _value: Any) -> None: ...

    def extend(self, _values: Any) -> None: ...

    def add(self, _value: Any) -> None: ...


class _Storages(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Finds which storages the pickled part names, and how large. Nothing that it names is looked up or run. The reader
    written in Python, because the one in C makes as much room as an index in the file says."""

    def __init__(self, content: Any) -> None:
        super().__init__(content)
        self.found: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, numel = pid
        if kind != "storage" or storage.__name__ not in _ITEM_BYTES or not isinstance(numel, int) or numel < 0:
            raise SteersmanError(f"a storage of the kind {getattr(storage, '__name__', kind)} is not read")
        self.found[str(key)] = numel * _ITEM_BYTES[storage.__name__]
        return _Nothing()
