"""The K largest of each row on the CPU, exact and with ties to the lower column, in few passes over the row.

The K-th largest of the maxima of groups of columns bounds the row's K-th largest value from below, so what reaches it
is all that the K largest can come from, ties included: little more than K values, as few of the K largest share a
group. They are ordered by 64-bit keys of value and column. NumPy partitions, finds and sorts in vector registers, where
PyTorch's `topk` looks at one number at a time.

A matrix that comes in tiles of columns is bounded by the tiles so far: what reached an earlier, lower bound is looked
at once more at the end. So a tile is dropped when the next one is made, and a matrix product keeps the shape that is
fast for it.

Shape letters: C rows, L columns, K selected, G columns of a group.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHARED = 1 << 20
"""Numbers of a tile from which on its rows are shared out to threads."""


class Largest:
    """The K largest of each of C rows, from tiles of their columns that come one after the other.

    `signed` takes the K of largest magnitude, with their signs. No row's result depends on the others, on where the
    tiles end or on the number of threads.

    >>> found = Largest(1, 2)
    >>> found.add(torch.tensor([[1.0, 3.0]]), 0)
    >>> found.add(torch.tensor([[3.0, 2.0]]), 2)
    >>> found.finish()
    (tensor([[3., 3.]]), tensor([[1, 2]], dtype=torch.int32), tensor([False]))
    """

    def __init__(self, n_rows: int, k: int, signed: bool = False):
        self.k, self.signed = k, signed
        n_parts = max(1, min(n_rows, torch.get_num_threads()))
        ends = [n_rows * i // n_parts for i in range(n_parts + 1)]
        self._slices = [slice(*pair) for pair in pairwise(ends)]
        self._parts = [_Rows(part.stop - part.start, k, signed) for part in self._slices]

    def add(self, Z: Tensor, first: int) -> None:
        """Look at Z [C, a tile's columns] fp32, whose first column is `first`; tiles come in order of their columns."""
        sizes = Z.abs() if self.signed else Z
        arrays = Z.numpy(), sizes.numpy(), _group_maxima(sizes, self.k).numpy()

        def look(rows: "_Rows", part: slice) -> None:
            rows.add(*(array[part] for array in arrays), first=first)

        if len(self._parts) == 1 or Z.numel() < _SHARED:
            for each in zip(self._parts, self._slices):
                look(*each)
        else:
            with ThreadPoolExecutor(len(self._parts)) as pool:  # NumPy's loops do not hold the interpreter's lock
                list(pool.map(look, self._parts, self._slices))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values [C, K], largest first, int32 columns [C, K], and which rows [C] bool are left to another way, as they
        have a NaN or a crowd of ties."""
        found = [[torch.from_numpy(array) for array in rows.finish()] for rows in self._parts]
        values, columns, left = found[0] if len(found) == 1 else (torch.cat(each) for each in zip(*found))
        return values, columns, left


def _group_maxima(Z: Tensor, k: int) -> Tensor:
    """The maxima of groups that hold every column of Z [C, L] once, about 4 K of them; NaN where a group has one."""
    C, L = Z.shape
    G = 1 << max(0, math.floor(math.log2(max(1, L / (4 * k)))))
    n_groups = L // G
    # Group j holds columns j, j + n_groups, j + 2 n_groups, ...: the maximum then runs over whole vectors.
    maxima = Z[:, : n_groups * G].view(C, G, n_groups).amax(dim=1)
    if n_groups * G == L:
        return maxima
    return torch.cat([maxima, Z[:, n_groups * G :].amax(dim=1, keepdim=True)], dim=1)


class _Rows:
    """What is known of some rows: their K largest group maxima, and the values that reached a bound."""

    def __init__(self, n_rows: int, k: int, signed: bool):
        self.k, self.signed = k, signed
        self.top = np.full((n_rows, k), -np.inf, dtype=np.float32)
        """[C, K]: the first of each row is its smallest, the bound."""
        self.left = np.zeros(n_rows, dtype=bool)
        self.found: list[tuple[NDArray, NDArray, NDArray]] = []
        """Rows, columns and values of each tile."""

    def add(self, Z: NDArray, sizes: NDArray, maxima: NDArray, first: int) -> None:
        """`sizes` [C, L] are what is compared, Z or its magnitudes; maxima are theirs."""
        C, L = Z.shape
        # In the first tile the bounds are still -inf.
        known = np.concatenate([self.top, maxima], axis=1) if self.found or maxima.shape[1] < self.k else maxima
        known.partition(known.shape[1] - self.k, axis=1)  # NaN comes last
        self.top = known[:, -self.k :].copy()
        self.left |= np.isnan(self.top).any(axis=1)
        places = np.flatnonzero(self.top[:, :1] <= sizes)
        rows = places // L
        self.left |= np.bincount(rows, minlength=C) > 4 * self.k + 64
        if self.left.any():
            self.top[self.left] = np.inf
            kept = ~self.left[rows]
            places, rows = places[kept], rows[kept]
        values = Z.reshape(-1)[places] + np.float32(0)  # -0 is 0
        self.found.append((rows, places - rows * L + first, values))

    def finish(self) -> tuple[NDArray, NDArray, NDArray]:
        C = len(self.top)
        rows, columns, values = self.found[0]
        if len(self.found) > 1:
            rows, columns, values = (np.concatenate(each) for each in zip(*self.found))
        sizes = np.abs(values) if self.signed else values
        if len(self.found) > 1:
            reached = np.flatnonzero((sizes >= self.top[rows, 0]) & ~self.left[rows])
            order = reached[np.argsort(rows[reached].astype(np.min_scalar_type(C)), kind="stable")]
            rows, columns, values, sizes = rows[order], columns[order], values[order], sizes[order]
        largest, of_columns = _largest_first(rows, columns, sizes, values != sizes, C, self.k, self.k)
        return largest, of_columns, self.left


def _largest_first(
    rows: NDArray, columns: NDArray, sizes: NDArray, negative: NDArray | bool, C: int, least: int, most: int | None
) -> tuple[NDArray, NDArray]:
    """Pairs of rows, in order, and columns as values and int32 columns [C, K], largest size first and lower columns
    first among equals; K is the fullest row's count, from `least` to `most`. What fills a row up is no number."""
    # Ascending keys: falling sizes, then rising columns; in the last bit the sign that the size lacks.
    keys = (~_ordered(sizes.view(np.int32))).astype(np.int64) << 32 | columns << 1 | negative
    counts = np.bincount(rows, minlength=C)
    padded = np.full((C, max(least, counts.max(initial=0))), np.iinfo(np.int64).max)
    padded[rows, np.arange(len(rows)) - (counts.cumsum() - counts)[rows]] = keys
    padded = np.sort(padded, axis=1)[:, :most]
    largest = _ordered(~(padded >> 32).astype(np.int32)).view(np.float32)
    if negative is not False:
        largest = np.where(padded & 1, -largest, largest)
    return largest, ((padded & 0xFFFFFFFF) >> 1).astype(np.int32)


class Above:
    """The values of C rows that are above the thresholds of their columns, from tiles of columns in order.

    >>> found = Above(2)
    >>> found.add(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([2.0, 2.0]), 0)
    >>> found.finish()
    (tensor([[3.],
            [0.]]), tensor([[1],
            [0]], dtype=torch.int32))
    """

    def __init__(self, n_rows: int):
        self._n_rows = n_rows
        self._found: list[tuple[NDArray, NDArray, NDArray]] = []

    def add(self, Z: Tensor, threshold: Tensor, first: int) -> None:
        """Look at Z [C, a tile's columns] fp32, whose first column is `first`; threshold [columns], none negative. A
        NaN is above all."""
        below, width = torch.le(Z, threshold).numpy(), Z.shape[1]
        places = np.flatnonzero(~below)
        rows = places // width
        self._found.append((rows, places - rows * width + first, Z.numpy().reshape(-1)[places]))

    def finish(self) -> tuple[Tensor, Tensor]:
        """Values [C, K], largest first, and int32 columns [C, K], K the fullest row's count and at least 1; 0 and 0
        where a row has fewer."""
        rows, columns, values = self._found[0]
        if len(self._found) > 1:
            rows, columns, values = (np.concatenate(each) for each in zip(*self._found))
            order = np.argsort(rows.astype(np.min_scalar_type(self._n_rows)), kind="stable")
            rows, columns, values = rows[order], columns[order], values[order]
        values, columns = _largest_first(rows, columns, values, False, self._n_rows, 1, None)
        counts = np.bincount(rows, minlength=self._n_rows)
        missing = np.arange(values.shape[1]) >= counts[:, None]
        values, columns = values.copy(), columns.copy()
        values[missing], columns[missing] = 0, 0
        return torch.from_numpy(values), torch.from_numpy(columns)


def _ordered(bits: NDArray) -> NDArray:
    """The bits of fp32 numbers as int32 that compare as the numbers do, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
