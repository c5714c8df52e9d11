"""Comparing shards with their checksums, each once, before or while they are read."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steersman.errors import SteersmanError
from steersman.train.store.shards import DATA_OFFSET, FileRecord, check_content


class ShardChecks:
    """The shards of one hook point, and which of them were compared with their checksums."""

    def __init__(self, files: Sequence[tuple[Path, FileRecord]]) -> None:
        """`files` are (path, record) of the shards in order."""
        self._files = files
        self._unread = np.ones(len(files), dtype=bool)
        self._lock = threading.Lock()
        self._behind: threading.Thread | None = None
        self._found: SteersmanError | None = None

    def check(self, shards: np.ndarray) -> None:
        """Compare those of these shards (numbers, in any order) that were not. Raises a SteersmanError naming one that
        is damaged."""
        if not self._unread.any():
            return
        for index in np.unique(shards[self._unread[shards]]).tolist():
            with self._lock:
                if self._unread[index]:
                    path, record = self._files[index]
                    check_content(path, record, DATA_OFFSET)
                    self._unread[index] = False

    def check_all(self) -> None:
        """Compare all shards, those that were compared before as well."""
        self._unread[:] = True
        self.check(np.arange(len(self._files)))

    def check_behind(self) -> None:
        """Have all shards compared in a thread, and raise what it has found until now."""
        if self._found is not None:
            raise self._found
        with self._lock:
            if self._behind is None and self._unread.any():
                self._behind = threading.Thread(target=self._run, name="steersman-check", daemon=True)
                self._behind.start()

    def _run(self) -> None:
        try:
            self.check(np.arange(len(self._files)))
        except (SteersmanError, OSError) as error:
            self._found = error if isinstance(error, SteersmanError) else SteersmanError(str(error))
