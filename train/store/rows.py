"""Token ids, document ids and positions of a store's rows, by row number."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.errors import SteersmanError
from steersman.train.store.batch import RowInfo
from steersman.train.store.shards import FileRecord, check_content, check_size, read_header

_OPEN_SHARDS = 64
"""Row files kept mapped at once: 16 bytes a row of each, so a few hundred megabytes at most."""

_KINDS = {np.int32: "I32", np.int64: "I64", np.int8: "I8"}


def row_columns(labels: bool) -> dict[str, type[np.signedinteger[Any]]]:
    """What a row file holds of every row, by name, in the order of `RowInfo`: `labels` where the store has them."""
    columns = {"token_ids": np.int32, "doc_ids": np.int64, "positions": np.int32}
    return {**columns, "labels": np.int8} if labels else columns


class RowTable:
    """Reads the row files of a store, memory-mapped, a bounded number at a time."""

    def __init__(self, files: Sequence[tuple[Path, int, FileRecord]], *, labels: bool = False) -> None:
        """`files` are (path, number of rows, record) of the shards in order; `labels` says whether they hold those."""
        self._files, self._columns = list(files), row_columns(labels)
        self.ends = np.cumsum([0, *(rows for _, rows, _ in files)])
        self.verified: set[int] = set()
        """Files that were compared with their checksums, each of them when it is first read."""
        self._open: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def _shard(self, index: int) -> dict[str, np.ndarray]:
        path, n_rows, record = self._files[index]
        check_size(path, record)  # reading a mapping beyond the end of its file ends the process without a word
        if (found := self._open.get(index)) is not None:
            self._open.move_to_end(index)
            return found
        if index not in self.verified:
            check_content(path, record)
            self.verified.add(index)
        header = read_header(path)
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        columns = {}
        for name, dtype in self._columns.items():
            entry = header.get(name, {})
            if entry.get("dtype") != _KINDS[dtype] or entry.get("shape") != [n_rows]:
                raise SteersmanError(f"{path}: holds no {name} of {n_rows} rows; restore it, or write the store again")
            offset = start + entry["data_offsets"][0]
            columns[name] = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(n_rows,))
        self._open[index] = columns
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return columns

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of one column, copied."""
        first = int(np.searchsorted(self.ends, start, side="right")) - 1
        parts = []
        for index in range(first, len(self._files)):
            low, high = self.ends[index], self.ends[index + 1]
            if low >= stop:
                break
            parts.append(self._shard(index)[name][max(start - low, 0) : min(stop, high) - low])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self._columns[name])

    def take(self, rows: np.ndarray) -> RowInfo:
        """The row data of any rows, in the order given."""
        shards = np.searchsorted(self.ends, rows, side="right") - 1
        columns = {name: np.empty(len(rows), dtype=dtype) for name, dtype in self._columns.items()}
        for index in np.unique(shards):
            here = np.flatnonzero(shards == index)
            local = rows[here] - self.ends[index]
            for name, column in self._shard(int(index)).items():
                columns[name][here] = column[local]
        return RowInfo(**{name: torch.from_numpy(column) for name, column in columns.items()})

    def range(self, start: int, stop: int) -> RowInfo:
        """The row data of rows start..stop."""
        return RowInfo(**{name: torch.from_numpy(self.column(name, start, stop)) for name in self._columns})

    def document_start(self, row: int) -> int:
        """The first row of the stretch of rows around `row` that belong to its document."""
        document = self.column("doc_ids", row, row + 1)[0]
        while row > 0:
            low = max(0, row - 65536)
            other = np.flatnonzero(self.column("doc_ids", low, row) != document)
            if len(other):
                return low + int(other[-1]) + 1
            row = low
        return 0
