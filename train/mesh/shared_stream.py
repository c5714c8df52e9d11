"""A stream that the ranks which train on it make together: each runs the model over a part of the text.

Rank r of W runs every W-th forward batch and holds those rows of the shuffling buffer. All ranks know the order of all
rows, as it follows from tokens alone; of each batch they give one another the rows of their parts in one all-to-all.
The batches are those of one process, bit for bit. (Where ranks that run the model are not to train, see
`model_ranks.py`.)

Shape letters: N rows of this rank's part of a batch, D width.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.parallel import RankGroup, Ranks, comm_errors
from steersman.train.capture.stream import ActivationStream
from steersman.train.capture.stream_rows import StreamRows, batch_of
from steersman.train.store.batch import ActivationBatch
from steersman.train.store.statistics import ActivationStats


class SharedStream:
    """`stream`, which runs this rank's part (see `run_part`), with those of the other `ranks`: an `ActivationSource`.

    All ranks call `batches` together, and take as many batches from it.
    """

    def __init__(self, stream: ActivationStream, ranks: Ranks) -> None:
        self._stream, self._ranks = stream, ranks
        self.hook_name, self.model_name, self.d_in = stream.hook_name, stream.model_name, stream.d_in
        self.hooks = stream.hooks
        self.fingerprint = stream.fingerprint

    def contents(self) -> dict[str, str]:
        """Those of the stream."""
        return self._stream.contents()

    def resolve_hook(self, hook: str) -> str:
        """As of the stream."""
        return self._stream.resolve_hook(hook)

    def width(self, hook: str) -> int:
        """As of the stream."""
        return self._stream.width(hook)

    def stats(self, hook: str | None = None) -> ActivationStats:
        """Those of the stream, for which every rank runs the model over all of its rows."""
        return self._stream.stats(hook)

    def n_batches(self, batch_size: int, **reading: Any) -> int | None:
        """As of the stream."""
        return self._stream.n_batches(batch_size, **reading)

    def batches(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        **reading: Any,
    ) -> Iterator[ActivationBatch]:
        """The stream's batches. Which rows are this rank's follows from `world_size`; see `StreamRows.splits`."""
        world = self._ranks.world
        with closing(self._checked_on_all(self._stream.whole_batches(batch_size, **reading))) as batches:
            for rows in batches:
                parts = rows.splits(world.size, world_size)
                info = parts[world.index].info
                yield batch_of(_exchange([one.x for one in parts], info[:, 4], world), info)

    def _checked_on_all(self, batches: Iterator[StreamRows]) -> Generator[StreamRows]:
        """The same batches; a mistake that one rank finds is raised on all of them."""
        while True:
            rows, mistake = None, None
            try:
                rows = next(batches, None)
            except SteersmanError as error:
                mistake = str(error)
            control = self._ranks.control
            if control.all_reduce_max_(torch.tensor([mistake is not None], dtype=torch.uint8)).item():
                found: list[str | None] = [None] * control.size
                with comm_errors():
                    dist.all_gather_object(found, mistake, group=control.group)
                raise SteersmanError(next(filter(None, found)))
            if rows is None:
                return
            yield rows


def _exchange(parts: list[Tensor], owners: np.ndarray, world: RankGroup) -> Tensor:
    """Give every rank its rows of those here, `parts`, and get the rows [N, D] that `owners` [N] have."""
    here = torch.cat(parts)
    counts = np.bincount(owners, minlength=world.size).tolist()
    got = torch.empty(len(owners), here.shape[1], dtype=here.dtype, device=here.device)
    with comm_errors():  # as bytes, since not every backend knows every type
        dist.all_to_all_single(
            got.view(torch.uint8), here.view(torch.uint8), counts, list(map(len, parts)), group=world.group
        )
    place = np.argsort(owners, kind="stable")
    return torch.empty_like(got).index_copy_(0, torch.from_numpy(place).to(got.device), got)
