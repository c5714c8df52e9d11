"""Several stores of the same tokens as one thing to train on: what a crosscoder of two models reads."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.sae.config import Side
from steersman.train.store.batch import ActivationBatch, ActivationSource, HooksSideBySide, RowInfo
from steersman.train.store.manifest import ROWS
from steersman.train.store.statistics import ActivationStats, stats_side_by_side
from steersman.train.store.store import ActivationStore
from steersman.train.store.view import HookView

_ROWS_AT_ONCE = 1 << 22
_COMPARED = ("token_ids", "doc_ids", "positions")


class SideBySide:
    """The rows of `sources` side by side: stores of the same tokens, of one model or several, or hook points of them.

    Each of `sources` is a store (its first hook point), its folder, or a `HookView` of some of its hook points. All
    have the same rows in the same order, which is checked here, before anything is trained: the token, document and
    position of every row are compared by their numbers. The order of batches, the split and the labels are those of the
    first.

    Raises a SteersmanError, naming the first row that differs, for stores of other tokens; and for fewer than two hook
    points, or one that is given twice.
    """

    def __init__(self, sources: Sequence[ActivationStore | HookView | str | os.PathLike[str]]) -> None:
        self.views = [_view(source) for source in sources]
        self.sides: tuple[Side, ...] = tuple(side for view in self.views for side in sides_of(view))
        """The hook points in the order of their columns."""
        places = [(str(view.store.path.resolve()), hook) for view in self.views for hook in view.hooks]
        if len(places) < 2 or len(set(places)) < len(places):
            raise SteersmanError("name two or more different stores or hook points to stand side by side")
        self._first = self.views[0]
        for view in self.views[1:]:
            check_aligned(self._first.store, view.store)
        self.d_in = sum(view.d_in for view in self.views)
        """The sum of the widths."""
        self.hook_name = "+".join(dict.fromkeys(side.hook_name for side in self.sides))
        self.model_name = "+".join(dict.fromkeys(side.model_name for side in self.sides))
        self.fingerprint = "+".join(view.fingerprint for view in self.views)

    def __repr__(self) -> str:
        return f"SideBySide({', '.join(map(repr, self.views))})"

    @property
    def n_rows(self) -> int:
        """Number of rows (tokens)."""
        return self._first.store.n_rows

    def side_stats(self) -> list[ActivationStats]:
        """Statistics of each hook point, in the order of `sides`."""
        return [stats for view in self.views for stats in stats_of_sides(view)]

    def stats(self) -> ActivationStats:
        """Statistics of the rows side by side; see `HookView.stats`."""
        return stats_side_by_side(self.side_stats())

    @property
    def has_labels(self) -> bool:
        """See `ActivationStore`; those of the first store."""
        return self._first.has_labels

    def n_labelled(self, **options: Any) -> int:
        """See `ActivationStore.n_labelled`."""
        return self._first.n_labelled(**options)

    def tokens(self, start: int, stop: int) -> RowInfo:
        """See `ActivationStore.tokens`."""
        return self._first.store.tokens(start, stop)

    def n_batches(self, batch_size: int, **options: Any) -> int:
        """See `ActivationStore.n_batches`."""
        return self._first.n_batches(batch_size, **options)

    def batches(self, batch_size: int, **options: Any) -> Iterator[ActivationBatch]:
        """See `ActivationStore.batches`; `x` is [batch_size / world_size, d_in]. Where the stores' types differ it has
        the one that holds both."""
        others = [(view.store, view.hooks) for view in self.views[1:]]
        return self._first.store.batches(batch_size, hook=self._first.hooks, beside=others, **options)


def open_sides(paths: Sequence[str | os.PathLike[str]], sides: Sequence[Side]) -> HookView | SideBySide:
    """The stores at `paths`, in the order of the hook points `sides` that they hold, side by side as a crosscoder reads
    them. Raises a SteersmanError where that is not the number of hook points, and as the stores do."""
    each, over = divmod(len(sides), len(paths))
    hooks = [[side.hook_name for side in sides[number * each : (number + 1) * each]] for number in range(len(paths))]
    if over or not each or any(len(set(here)) < each for here in hooks):
        have = ", ".join(map(str, sides))
        raise SteersmanError(f"a crosscoder of {have} needs their stores, in this order: given are {len(paths)}")
    views = [HookView(ActivationStore.open(path), here) for path, here in zip(paths, hooks)]
    return views[0] if len(views) == 1 else SideBySide(views)


def sides_of(source: ActivationSource) -> tuple[Side, ...]:
    """The hook points that a source has side by side, in the order of their columns: those of a `SideBySide`, of a view
    of a store or of a stream; one of anything else."""
    if isinstance(source, SideBySide):
        return source.sides
    if not isinstance(source, HooksSideBySide):
        return (Side(hook_name=source.hook_name, width=source.d_in, model_name=source.model_name),)
    model = source.model_name
    return tuple(Side(hook_name=hook, width=source.width(hook), model_name=model) for hook in source.hooks)


def stats_of_sides(source: ActivationSource) -> list[ActivationStats]:
    """Statistics of each of `sides_of`."""
    if isinstance(source, SideBySide):
        return source.side_stats()
    return [source.stats(hook) for hook in source.hooks] if isinstance(source, HooksSideBySide) else [source.stats()]


def _view(source: ActivationStore | HookView | str | os.PathLike[str]) -> HookView:
    if isinstance(source, HookView):
        return source
    store = source if isinstance(source, ActivationStore) else ActivationStore.open(source)
    return HookView(store, store.hook_name)


def check_aligned(a: ActivationStore, b: ActivationStore) -> None:
    """Raise a SteersmanError, naming the first row that differs, unless two stores have the same tokens, documents and
    positions row for row. Files of equal size and checksum are not read again."""
    if a.path == b.path or _same_files(a, b):
        return
    n = min(a.n_rows, b.n_rows)
    for low in range(0, n, _ROWS_AT_ONCE):
        high = min(low + _ROWS_AT_ONCE, n)
        one, other = a.tokens(low, high), b.tokens(low, high)
        differs = torch.zeros(high - low, dtype=torch.bool)
        for name in _COMPARED:
            differs |= getattr(one, name) != getattr(other, name)
        if bool(differs.any()):
            row = low + int(differs.nonzero()[0])
            raise SteersmanError(_not_aligned(a, b, row))
    if a.n_rows != b.n_rows:
        raise SteersmanError(_not_aligned(a, b, n))


def _same_files(a: ActivationStore, b: ActivationStore) -> bool:
    """Whether what is known of the stores' rows is in files of equal size and checksum."""
    both = [[(shard.rows, shard.files[ROWS]) for shard in store.manifest.shards] for store in (a, b)]
    return both[0] == both[1]


def _not_aligned(a: ActivationStore, b: ActivationStore, row: int) -> str:
    found = " and ".join(f"{_token(store, row)} in {store.path}" for store in (a, b))
    return (
        f"these stores are not of the same tokens: row {row} is {found}; cache both with one text and the same "
        "context length, packing and tokens"
    )


def _token(store: ActivationStore, row: int) -> str:
    if row >= store.n_rows:
        return f"none (there are {store.n_rows:,})"
    info = store.tokens(row, row + 1)
    return f"token {int(info.token_ids)} at position {int(info.positions)} of document {int(info.doc_ids)}"
