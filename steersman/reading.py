"""Reading small files that anybody may have written: bounded before they are parsed, and one kind of error.

Only regular files are opened, so that a pipe cannot hang a reader and a device cannot fill its memory; a file's size is
checked before its content is read; and whatever a parser raises becomes a `SteersmanError` that names the file.
"""

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError

__all__ = [
    "check_regular",
    "one_error",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_json_object",
    "read_text",
    "shown",
]

JSON_BYTES = 64 << 20
"""Largest JSON file that is read where the reader names no other bound."""


@contextmanager
def one_error(what: str | os.PathLike[str]) -> Iterator[None]:
    """The door of a reader of files that anybody may have written: whatever reading `what` raises is a SteersmanError
    with the cause behind it. Checks say more; this is for what none of them foresaw."""
    try:
        yield
    except SteersmanError:
        raise
    except MemoryError as error:
        raise SteersmanError(f"{what} takes more memory to read than there is") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # a device's, which is no fault of the file
            raise
        reason = " ".join(str(error).split())[:200]
        kind = type(error).__name__
        raise SteersmanError(f"{what} is damaged or not what is read here ({kind}: {reason})") from error


def shown(value: Any) -> str:
    """What a file holds, as text for a message: a few entries and digits, however much there is.

    >>> shown("x" * 100), shown(12)
    ("'xxxxxxxxxxxx...xxxxxxxxxxxxx'", '12')
    """
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a very long {type(value).__name__}"


def check_regular(path: str | os.PathLike[str]) -> int:
    """Size in bytes of the regular file at `path` (links are followed); `SteersmanError` where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise SteersmanError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise SteersmanError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise SteersmanError(f"{path} is {kind}; a file is expected here")
    return found.st_size


def read_bytes(path: str | os.PathLike[str], *, limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; `SteersmanError`, naming the file, for any other."""
    if (size := check_regular(path)) > limit:
        raise SteersmanError(f"{path} has {size:,} bytes, and at most {limit:,} are read here")
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise SteersmanError(f"{path} cannot be read: {error.strerror or error}") from error


def read_text(path: str | os.PathLike[str], *, limit: int = JSON_BYTES) -> str:
    """The content of a regular UTF-8 file of at most `limit` bytes; `SteersmanError`, naming the file, otherwise."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SteersmanError(f"{path} is not UTF-8 text (byte {error.start})") from error


def parse_json(content: str | bytes, where: str | os.PathLike[str]) -> Any:
    """The value of a JSON text; `SteersmanError` naming `where` it stands when it is none, nests without end, or holds
    numbers of thousands of digits.

    >>> parse_json('{"k": 2}', "cfg.json")
    {'k': 2}
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise SteersmanError(f"{where}: the JSON in it is nested too deeply") from None
    except ValueError as error:
        raise SteersmanError(f"{where}: not readable as JSON ({error})") from error


def read_json(path: str | os.PathLike[str], *, limit: int = JSON_BYTES) -> Any:
    """The value in a JSON file; `SteersmanError`, naming the file, when there is none to read."""
    return parse_json(read_bytes(path, limit=limit), path)


def read_json_object(path: str | os.PathLike[str], *, limit: int = JSON_BYTES) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    value = read_json(Path(path), limit=limit)
    if not isinstance(value, dict):
        raise SteersmanError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value
