"""The K largest of each row on the CPU, exact and with ties to the lower column, in few passes over the row.

The K-th largest of the maxima of groups of columns bounds the row's K-th largest value from below, so what reaches it
is all that the K largest can come from, ties included: little more than K values, as few of the K largest share a
group. They are ordered by 64-bit keys of value and column. NumPy partitions, finds and sorts in vector registers, where
PyTorch's `topk` looks at one number at a time.

Shape letters: C rows, L columns, K selected, G columns of a group.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHARED = 1 << 20
"""Numbers from which on the rows are shared out to threads."""


def largest(Z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K largest of each row of Z [C, L] fp32: values [C, K], largest first, and int32 columns [C, K].

    Equal values go to the lower column first, and a NaN is larger than any number. No row's result depends on the
    others or on the number of threads.

    >>> largest(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    (tensor([[3., 3.]]), tensor([[1, 2]], dtype=torch.int32))
    """
    maxima = _group_maxima(Z, k)
    n_parts = torch.get_num_threads()
    if n_parts == 1 or Z.numel() < _SHARED:
        values, columns, left = _of_rows(Z.numpy(), maxima.numpy(), k)
    else:
        parts = zip(np.array_split(Z.numpy(), n_parts), np.array_split(maxima.numpy(), n_parts))
        with ThreadPoolExecutor(n_parts) as pool:  # NumPy's loops do not hold the interpreter's lock
            found = list(pool.map(lambda part: _of_rows(*part, k), parts))
        values, columns, left = (np.concatenate(each) for each in zip(*found))
    if left.any():
        slow_values, slow_columns = torch.sort(Z[torch.from_numpy(left)], dim=1, descending=True, stable=True)
        values[left], columns[left] = slow_values[:, :k].numpy(), slow_columns[:, :k].numpy()
    return torch.from_numpy(values), torch.from_numpy(columns)


def _group_maxima(Z: Tensor, k: int) -> Tensor:
    """The maxima [C, at least K] of groups that hold every column of Z [C, L] once; NaN where a group has one."""
    C, L = Z.shape
    G = 1 << max(0, math.floor(math.log2(max(1, L / (4 * k)))))
    n_groups = L // G
    # Group j holds columns j, j + n_groups, j + 2 n_groups, ...: the maximum then runs over whole vectors.
    maxima = Z[:, : n_groups * G].view(C, G, n_groups).amax(dim=1)
    if n_groups * G == L:
        return maxima
    return torch.cat([maxima, Z[:, n_groups * G :].amax(dim=1, keepdim=True)], dim=1)


def _of_rows(Z: NDArray, maxima: NDArray, k: int) -> tuple[NDArray, NDArray, NDArray]:
    """Values [C, K], columns [C, K] and which rows [C] are left to another way: those with NaN or a crowd of ties."""
    (C, L), n_groups = Z.shape, maxima.shape[1]
    maxima.partition(n_groups - k, axis=1)  # NaN comes last
    left = np.isnan(maxima[:, n_groups - k :]).any(axis=1)
    reached = maxima[:, n_groups - k, None] <= Z
    places = np.flatnonzero(reached)
    counts = np.bincount(places // L, minlength=C)
    left |= counts > 4 * k + 64
    if left.any():
        reached[left] = False
        places = np.flatnonzero(reached)
        counts[left] = 0
    rows = places // L
    columns = places - rows * L
    # Ascending keys: falling values (-0 is 0), then rising columns.
    bits = (Z.reshape(-1)[places] + np.float32(0)).view(np.int32)
    keys = (~_ordered(bits)).astype(np.int64) << 32 | columns
    width = max(k, int(counts.max(initial=0)))
    padded = np.full((C, width), np.iinfo(np.int64).max)
    padded[rows, np.arange(len(places)) - (counts.cumsum() - counts)[rows]] = keys
    padded = np.sort(padded, axis=1)[:, :k]
    values = _ordered(~(padded >> 32).astype(np.int32)).view(np.float32)
    return values, (padded & 0xFFFFFFFF).astype(np.int32), left


def _ordered(bits: NDArray) -> NDArray:
    """The bits of fp32 numbers as int32 that compare as the numbers do, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
