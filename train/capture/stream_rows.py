"""Rows on their way from the model to whoever trains on them: what a stream hands on, within a process or to others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steersman.train.store.batch import ActivationBatch, RowInfo


@dataclass(frozen=True)
class StreamRows:
    """Rows on their way through the buffer. Of rows that another process has, only `info` is here."""

    x: torch.Tensor
    """Activations [n here, D] of the rows that are here, in their order."""
    info: np.ndarray
    """Row, token, document, position and the part that has the row (-1: nobody), [n, 5] int64."""
    part: int
    """Which part this process has; see `ActivationStream.run_part`."""

    def __len__(self) -> int:
        return len(self.info)

    @property
    def here(self) -> np.ndarray:
        """Which rows' activations are here, [n] bool."""
        return self.info[:, 4] == self.part

    def __getitem__(self, rows: slice) -> "StreamRows":
        start, stop, _ = rows.indices(len(self))
        before, n = int(self.here[:start].sum()), int(self.here[start:stop].sum())
        return StreamRows(self.x[before : before + n], self.info[rows], self.part)

    def take(self, index: np.ndarray) -> "StreamRows":
        """The rows at these places [n], in their order."""
        here = self.here
        place = (np.cumsum(here) - 1)[index[here[index]]]
        return StreamRows(self.x[torch.from_numpy(place).to(self.x.device)], self.info[index], self.part)

    def split(self, rank: int, world_size: int) -> "StreamRows":
        """What of a batch belongs to one of several ranks."""
        n = len(self)
        return self[rank * n // world_size : (rank + 1) * n // world_size]

    def splits(self, n_ranks: int, world_size: int) -> "list[StreamRows]":
        """What each of `n_ranks` ranks gets of a batch: the ranks of `world_size` are groups of neighbouring ranks, and
        those of a group get the same."""
        distinct = [self.split(rank, world_size) for rank in range(world_size)]
        return [distinct[rank * world_size // n_ranks] for rank in range(n_ranks)]


def batch_of(x: torch.Tensor, info: np.ndarray) -> ActivationBatch:
    """Rows x [n, D], all of which are here, as a batch; `info` [n, 5] is that of `StreamRows`."""

    def row_info(_: np.ndarray) -> RowInfo:
        columns = (torch.from_numpy(info[:, column].copy()) for column in (1, 2, 3))
        token_ids, doc_ids, positions = columns
        return RowInfo(token_ids.int(), doc_ids, positions.int())

    return ActivationBatch(x=x, find_rows=lambda: info[:, 0], find_info=row_info)


def joined(parts: Sequence[StreamRows]) -> StreamRows:
    """The rows of all `parts`, one after another."""
    info = np.concatenate([rows.info for rows in parts])
    return StreamRows(torch.cat([rows.x for rows in parts]), info, parts[0].part)
