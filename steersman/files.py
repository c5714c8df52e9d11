"""Files that are either whole or absent, and folders that are there or said not to be.

A file is written under a temporary name beside its own, `.NAME.tmp`, synced, and renamed; then its folder is synced. A
reader, and a power cut, find the old file or the new one, never a part of either. What a killed process leaves behind
under the temporary name is taken over by the next one that writes the file.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from steersman.errors import SteersmanError

__all__ = [
    "check_place",
    "format_bytes",
    "fsync_folder",
    "make_folder",
    "write_bytes",
    "write_json",
    "write_text",
    "write_whole",
]


def temporary_path(path: Path) -> Path:
    """Where a file is written before it gets the name `path`."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Call `write(temporary path)`, and give what it wrote the name `path`: never half a file under the final name.

    Raises SteersmanError when the file cannot be written. Whatever is raised, no temporary file stays.
    """
    try:
        replace_whole(Path(path), write)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        raise SteersmanError(f"{path} could not be written: {getattr(error, 'strerror', None) or error}") from error


def replace_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write_whole` with the operating system's own errors, for callers who can say what to do about a full disk."""
    temporary = temporary_path(path)
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # of a disk that has become read-only, what went wrong first is to be said
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data`, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int = 2, **options: Any) -> None:
    """Write `value` as JSON ended by a newline, whole or not at all; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(value, indent=indent, **options) + "\n")


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make the folder `path`, and those it lies in, unless it is there. Raises SteersmanError when it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteersmanError(f"{path} cannot be made: {error.strerror or error}") from error


def check_place(path: str | os.PathLike[str], kind: Literal["file", "folder"], *, keep: bool = False) -> None:
    """Refuse a place that no file, or no folder with files in it, can be written to: for before the work.

    It is tried with a file of no bytes, which goes again, as do the folders made for it unless they are to be kept.

    Raises SteersmanError: a name that is empty or too long, a folder in place of a file or the other way around, what
    is neither, a place that cannot be written to.
    """
    place = Path(path)
    if not os.fspath(path).strip():
        raise SteersmanError(f"the {kind} to write to has no name")
    try:
        if kind == "file" and place.is_dir():
            raise SteersmanError(f"{path} is a folder: name a file to write")
        if kind == "file" and place.exists() and not place.is_file():
            raise SteersmanError(f"{path} is no regular file, so it is not written over")
        if kind == "folder" and place.exists() and not place.is_dir():
            raise SteersmanError(f"{path} is a file: name a folder to write to")
        folder = place if kind == "folder" else place.parent
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe = temporary_path(place) if kind == "file" else folder / f".probe.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink(missing_ok=True)  # a process of the same number on another machine may be here too
        finally:
            for one in () if keep else made:
                with suppress(OSError):  # not empty: somebody else uses it by now
                    one.rmdir()
    except (OSError, ValueError) as error:
        if isinstance(error, SteersmanError):
            raise
        raise SteersmanError(
            f"{str(path)[:200]} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(n: float, digits: int = 3) -> str:
    """Bytes as people read them, in powers of 1000 and to so many significant digits.

    >>> format_bytes(1_536_000_000), format_bytes(12)
    ('1.54 GB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.{digits}g} {unit}"
        n /= 1000
    return f"{n:.{digits}g} TB"
