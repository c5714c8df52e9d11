"""Grouping states into concepts, and matching two sets of them one to one.

Shape letters: n states, D width, k concepts.
"""

import torch
from torch import Tensor

from steersman.errors import SteersmanError

ITERATIONS = 100


def k_means(x: Tensor, k: int, seed: int = 0, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """(centres [k, D] fp64, labels [n]) of Lloyd's iteration from k-means++ (Arthur and Vassilvitskii 2007), seeded.

    No cluster is empty: one that would be takes the state that is farthest from its centre.
    """
    x = _checked(x, k)
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < k:
        away = torch.cdist(x, centres).square().min(1).values
        if not float(away.sum()) > 0:
            raise SteersmanError(f"the states have only {len(centres)} different values, fewer than {k} concepts")
        centres = torch.cat([centres, x[torch.multinomial(away, 1, generator=generator)]])
    labels = torch.full((len(x),), -1)
    for _ in range(iterations):
        distances = torch.cdist(x, centres)
        new = distances.argmin(1)
        for j in (torch.bincount(new, minlength=k) == 0).nonzero()[:, 0].tolist():
            own = distances.gather(1, new[:, None])[:, 0]
            crowded = torch.bincount(new, minlength=k)[new] > 1
            new[own.where(crowded, -torch.inf).argmax()] = j
        if torch.equal(new, labels):
            break
        labels = new
        centres = means_of(x, labels, k)
    return centres, labels


def semi_nmf(x: Tensor, k: int, seed: int = 0, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """(concepts [k, D] fp64, labels [n]) of X ~ G U with G [n, k] not negative, U of any sign (Ding, Li and Jordan
    2010, section 3): alternating least squares for U and their multiplicative update for G, started from k-means.

    A state's label is its largest coefficient.
    """
    x = _checked(x, k)
    _, labels = k_means(x, k, seed)
    g = torch.nn.functional.one_hot(labels, k).to(x) + 0.2
    u = torch.linalg.pinv(g) @ x
    for _ in range(iterations):
        xu, uu = x @ u.T, u @ u.T
        up = xu.clamp(min=0) + g @ (-uu).clamp(min=0)
        down = (-xu).clamp(min=0) + g @ uu.clamp(min=0)
        g = g * (up / down.clamp(min=1e-12)).sqrt()
        u = torch.linalg.pinv(g) @ x
    return u, g.argmax(1)


def means_of(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """[k, D]: the mean of each group's rows; zero for a group without any."""
    sums = torch.zeros(k, x.shape[1], dtype=x.dtype).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=k).clamp(min=1)[:, None]


def matching(score: Tensor) -> list[int]:
    """For each row of `score` [k, m], m >= k, its own column, such that the total is largest (the assignment problem).

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987), O(k^2 m).

    >>> matching(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
    [1, 0]
    """
    cost = (-score).double().tolist()
    rows, columns = score.shape
    if rows > columns:
        raise SteersmanError(f"{rows} concepts cannot each have one of {columns} to itself")
    u, v = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner, way = [0] * (columns + 1), [0] * (columns + 1)  # column 0 stands for "none yet"
    for i in range(1, rows + 1):
        owner[0], j0 = i, 0
        least, used = [float("inf")] * (columns + 1), [False] * (columns + 1)
        while owner[j0]:
            used[j0], i0, delta, j1 = True, owner[j0], float("inf"), 0
            for j in range(1, columns + 1):
                if used[j]:
                    continue
                reduced = cost[i0 - 1][j - 1] - u[i0] - v[j]
                if reduced < least[j]:
                    least[j], way[j] = reduced, j0
                if least[j] < delta:
                    delta, j1 = least[j], j
            for j in range(columns + 1):
                if used[j]:
                    u[owner[j]] += delta
                    v[j] -= delta
                else:
                    least[j] -= delta
            j0 = j1
        while j0:
            owner[j0], j0 = owner[way[j0]], way[j0]
    found = [0] * rows
    for j in range(1, columns + 1):
        if owner[j]:
            found[owner[j] - 1] = j - 1
    return found


def _checked(x: Tensor, k: int) -> Tensor:
    if x.ndim != 2 or not bool(x.isfinite().all()):
        raise SteersmanError(f"states must be finite, [n, D]; got shape {tuple(x.shape)}")
    if not 1 <= k <= len(x):
        raise SteersmanError(f"{len(x)} states cannot make {k} concepts")
    return x.double()
