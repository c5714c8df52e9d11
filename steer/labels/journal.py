"""Results that took long or cost money, on disk as they come: one line of JSON each, looked up by what they follow
from. A run that was stopped, however it was, finds them again; a line that was cut short is cut off."""

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Self

from steersman.errors import SteersmanError
from steersman.files import make_folder
from steersman.folders import FolderLock
from steersman.reading import check_regular

log = logging.getLogger(__name__)

__all__ = ["LabelJournal", "digest"]


class LabelJournal:
    """A file of results by key, added to by one process at a time and by any of its threads. A context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, or make it. Raises SteersmanError where it cannot be, or another process has it open."""
        self.path = Path(path)
        make_folder(self.path.parent)
        self._guard = threading.Lock()
        self._known: dict[str, Any] = {}
        try:
            self._file = open(self.path, "ab")  # noqa: SIM115
        except OSError as error:
            raise SteersmanError(f"{path} cannot be written: {error.strerror or error}") from error
        try:
            check_regular(self.path)
            self._lock = FolderLock(self.path, "these labels")
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise SteersmanError(
                    f"{self.path}, line {number}: no result of a run that labelled features; move the file away"
                ) from error
        if whole < len(content):
            os.truncate(self.path, whole)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Any:
        """The value of `key`; None where there is none yet."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Write down the value of `key`, a JSON value."""
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n"
        with self._guard:
            self._known[key] = value
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise SteersmanError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Give the file up."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def digest(*parts: Any) -> str:
    """A key of what a result follows from, JSON values.

    >>> digest("a", {"b": 1}) == digest("a", {"b": 1}), digest("a") == digest("b")
    (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
