"""What a trainer reads: a source of activations, and its batches, whose tokens can be looked up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from steersman.train.store.statistics import ActivationStats


class RowInfo(NamedTuple):
    """Where rows come from."""

    token_ids: torch.Tensor
    """The token at each row, [n] int32."""
    doc_ids: torch.Tensor
    """Number of the document in its source, [n] int64."""
    positions: torch.Tensor
    """Place of the token in its context, 0 for the first (BOS, where there is one), [n] int32. Rows are stored in the
    order of the text, so a context starts where the position does not rise."""
    labels: torch.Tensor | None = None
    """1, 0, or -1 where it is not known, [n] int8; None where the source has no labels."""


@dataclass(frozen=True, kw_only=True)
class ActivationBatch:
    """Some rows of a store or stream. The activations are there; what else is known of the rows is read on demand."""

    x: torch.Tensor
    """Activations [N, D] in the type of the source: a store's on the CPU, a stream's on its model's device."""
    find_rows: Callable[[], np.ndarray] = field(repr=False)
    """Gives the rows' numbers [N]."""
    find_info: Callable[[np.ndarray], RowInfo] = field(repr=False)
    """Gives the row data of row numbers."""

    def __reduce__(self) -> Any:
        return _restored, (type(self), self.x, self.rows, self._info)

    @cached_property
    def rows(self) -> torch.Tensor:
        """Row numbers in the store, [N] int64."""
        return torch.from_numpy(np.ascontiguousarray(self.find_rows(), dtype=np.int64))

    @cached_property
    def _info(self) -> RowInfo:
        return self.find_info(self.rows.numpy())

    @property
    def token_ids(self) -> torch.Tensor:
        """Token ids, [N] int32."""
        return self._info.token_ids

    @property
    def doc_ids(self) -> torch.Tensor:
        """Document numbers, [N] int64."""
        return self._info.doc_ids

    @property
    def positions(self) -> torch.Tensor:
        """Places in the context, [N] int32."""
        return self._info.positions

    @property
    def labels(self) -> torch.Tensor | None:
        """Labels, [N] int8: 1, 0, or -1 where it is not known; None where the source has none."""
        return self._info.labels

    def __len__(self) -> int:
        return len(self.x)


def _restored(kind: type[ActivationBatch], x: torch.Tensor, rows: torch.Tensor, info: RowInfo) -> ActivationBatch:
    """A batch from a pickle or a copy, with what is known of its rows."""
    return kind(x=x, find_rows=rows.numpy, find_info=partial(_known, info))


def _known(info: RowInfo, _rows: np.ndarray) -> RowInfo:
    return info


def batches_in(n_rows: int, batch_size: int, drop_last: bool) -> int:
    """How many batches rows make; `drop_last` leaves out one that is not full."""
    return n_rows // batch_size if drop_last else -(-n_rows // batch_size)


@runtime_checkable
class HasContents(Protocol):
    """A source that is no store and says what its rows follow from; see `ActivationStream.contents`."""

    def contents(self) -> dict[str, str]: ...


class ActivationSource(Protocol):
    """What can be trained on: an `ActivationStore`, an `ActivationStream`, or anything that reads like one."""

    @property
    def hook_name(self) -> str: ...
    @property
    def model_name(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def stats(self) -> ActivationStats: ...
    def n_batches(
        self, batch_size: int, *, split: Any = "train", heldout_fraction: float = 0.05, drop_last: bool = True
    ) -> int | None: ...
    def batches(
        self,
        batch_size: int,
        *,
        split: Any = "train",
        heldout_fraction: float = 0.05,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        drop_last: bool = True,
    ) -> Iterator[ActivationBatch]: ...


@runtime_checkable
class HooksSideBySide(ActivationSource, Protocol):
    """A source whose rows are those of one or several hook points side by side, in the order of `hooks`: a `HookView`
    of a store, or a stream. Its `hook_name` is their names joined by "+", its `d_in` the sum of their widths."""

    @property
    def hooks(self) -> tuple[str, ...]: ...
    def width(self, hook: str) -> int: ...
    def stats(self, hook: str | None = None) -> ActivationStats: ...
    def resolve_hook(self, hook: str) -> str: ...
