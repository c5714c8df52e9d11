"""The exact regularisation path of `min 1/2 |v - A^T c|^2 + lambda |c|_1`, signed or with c >= 0.

The solution is piecewise linear in lambda (Osborne, Presnell and Turlach 2000; Efron et al. 2004, LARS with the lasso
modification). Between two corners the coefficients move along `w = G^-1 s` (G the active rows' Gram matrix, s their
signs) and every inner product along `A A^T w`; a corner is where an inactive row's inner product meets lambda (it
joins) or an active coefficient reaches 0 (it leaves). So the path costs one product with all rows a corner, needs no
step size and ends exactly. All vectors walk together, each at its own lambda. The inverse of G grows and shrinks by
bordering, and the last point is solved anew and checked against the optimality conditions over ALL rows in float64.

Shape letters: B vectors, L latents, D width, C slots for active rows, A active rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.steer.decompose.atoms import Atoms
from steersman.steer.decompose.terms import PathPoint

_NEAR = 16  # rows whose corners are computed again in float64
_DEPENDENT = 1e-9  # squared distance from the active rows' span below which a row cannot join
_END = 1e-8  # fraction of the largest lambda that counts as none


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The end of one vector's path."""

    features: Tensor
    """[A] int64, in the order in which they joined."""
    coefficients: Tensor
    """[A] float64."""
    path: list[PathPoint]
    """Every corner, from the first feature on."""
    penalty: float
    """lambda at the end, as a fraction of the largest."""
    violation: float
    """Largest violation of the optimality conditions over all rows, as a fraction of the largest lambda."""


class _Walk:
    """The state of B paths, in unit vectors: slots of active rows with signs, coefficients and inverse Gram matrix."""

    def __init__(self, V: Tensor, atoms: Atoms, slots: int, positive: bool, exact: bool) -> None:
        (B, D), wide = V.shape, {"dtype": torch.float64, "device": V.device}
        self.v, self.atoms, self.positive, self.exact = V, atoms, positive, exact
        self.rows = torch.zeros(B, slots, D, **wide)
        self.features = torch.full((B, slots), -1, dtype=torch.int64, device=V.device)
        self.joined = torch.zeros(B, slots, dtype=torch.int64, device=V.device)
        self.signs, self.coefficients = torch.zeros(B, slots, **wide), torch.zeros(B, slots, **wide)
        self.inverse = torch.zeros(B, slots, slots, **wide)
        self.banned = torch.full((B, 1), -1, dtype=torch.int64, device=V.device)
        self.dependent = torch.zeros(B, len(atoms), dtype=torch.bool, device=V.device)
        first, at = self._first()
        self.largest = at.clamp_min(0)
        self.penalty = self.largest.clone()
        self.live = self.largest > 0
        for b in self.live.nonzero()[:, 0].tolist():
            self.join(b, int(first[b]))

    def _first(self) -> tuple[Tensor, Tensor]:
        """The row that joins first and the inner product it does so at."""
        if not self.positive:
            nobody = torch.zeros(len(self.v), 0, dtype=torch.int64, device=self.v.device)
            ids, value = self.atoms.strongest(self.v, nobody)
            return ids, value.abs()
        score = self.atoms.correlate(self.v).masked_fill_(~self.atoms.usable, float("-inf"))
        ids = score.topk(min(_NEAR, len(self.atoms)), dim=1).indices.sort(dim=1).values
        value = torch.einsum("bcd,bd->bc", self.atoms.unit(ids), self.v)
        best = value.argmax(dim=1, keepdim=True)
        return ids.gather(1, best)[:, 0], value.gather(1, best)[:, 0]

    @property
    def count(self) -> Tensor:
        """Active rows of each vector, [B]."""
        return (self.features >= 0).sum(dim=1)

    def join(self, b: int, feature: int) -> bool:
        """Give a row a slot; False if it depends on the active ones."""
        d = self.atoms.unit(torch.tensor(feature, device=self.v.device))
        h = self.inverse[b] @ (self.rows[b] @ d)
        schur = float(1 - (self.rows[b] @ d) @ h)
        if schur < _DEPENDENT:
            self.dependent[b, feature] = True
            return False
        slot = int((self.features[b] < 0).nonzero()[0, 0])
        h = h.clone()
        h[slot] = -1.0
        self.inverse[b] += torch.outer(h, h) / schur
        self.rows[b, slot], self.features[b, slot] = d, feature
        self.joined[b, slot] = int(self.joined[b].max()) + 1
        self.coefficients[b, slot] = 0.0
        left = self.v[b] - self.coefficients[b] @ self.rows[b]
        self.signs[b, slot] = 1.0 if self.positive else torch.sign(d @ left)
        self.banned[b] = -1
        return True

    def leave(self, b: int, slot: int) -> None:
        """Free the slot of a row whose coefficient has reached 0. It cannot come straight back."""
        column = self.inverse[b, :, slot].clone()
        self.inverse[b] -= torch.outer(column, column) / column[slot]
        self.inverse[b, slot], self.inverse[b, :, slot] = 0.0, 0.0
        self.banned[b] = self.features[b, slot]
        self.features[b, slot] = -1
        self.rows[b, slot], self.signs[b, slot], self.coefficients[b, slot] = 0.0, 0.0, 0.0
        self.dependent[b] = False  # what depended on it may not any longer

    def left(self) -> Tensor:
        """What the terms leave of each vector, [B, D]."""
        return self.v - (self.coefficients[:, None] @ self.rows)[:, 0]

    def corners(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """How far lambda can fall until an inactive row joins along w [B, C]: that fall [B] and the row [B]."""
        r, u = self.left(), (w[:, None] @ self.rows)[:, 0]
        size = u.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        now, rate = self.atoms.correlate(torch.cat([r, u / size]), self.exact).chunk(2)
        fall = self._fall(now, rate * size.to(rate.dtype), self.penalty[:, None].to(now.dtype))
        inf, L = float("inf"), len(self.atoms)
        shut = torch.cat([self.features, self.banned], dim=1)
        closed = torch.cat([~self.atoms.usable | self.dependent, self.dependent[:, :1]], dim=1)
        closed.scatter_(1, torch.where(shut < 0, L, shut), True)  # the last column takes the empty slots
        fall.masked_fill_(closed[:, :L], inf)
        near, ids = fall.topk(min(_NEAR, fall.shape[1]), dim=1, largest=False)
        rows = self.atoms.unit(ids)
        exact = self._fall(
            torch.einsum("bcd,bd->bc", rows, r), torch.einsum("bcd,bd->bc", rows, u), self.penalty[:, None]
        )
        exact = torch.where(near < inf, exact, inf)
        best = exact.argmin(dim=1, keepdim=True)
        return exact.gather(1, best)[:, 0], ids.gather(1, best)[:, 0]

    def _fall(self, now: Tensor, rate: Tensor, penalty: Tensor) -> Tensor:
        """Fall of lambda after which `now - fall * rate` meets `penalty - fall` (or its negative, for both signs)."""
        inf = float("inf")
        slow = 1e-9
        up = torch.where(1 - rate > slow, (penalty - now).clamp_min(0) / (1 - rate).clamp_min(slow), inf)
        if self.positive:
            return up
        down = torch.where(1 + rate > slow, (penalty + now).clamp_min(0) / (1 + rate).clamp_min(slow), inf)
        return torch.minimum(up, down)

    def grow(self) -> None:
        """Twice the slots."""
        (B, C), D = self.features.shape, self.v.shape[1]
        pad = torch.nn.functional.pad
        self.rows = torch.cat([self.rows, self.rows.new_zeros(B, C, D)], dim=1)
        self.features, self.joined = pad(self.features, (0, C), value=-1), pad(self.joined, (0, C))
        self.signs, self.coefficients = pad(self.signs, (0, C)), pad(self.coefficients, (0, C))
        self.inverse = pad(self.inverse, (0, C, 0, C))


def walk_path(V: Tensor, atoms: Atoms, *, k: int | None, penalty: float | None, positive: bool) -> list[Solution]:
    """Walk the paths of V [B, D] float64 until k features would become k + 1, or lambda reaches `penalty` (a fraction
    of its largest value; 0 walks to the unpenalised end)."""
    size = V.norm(dim=1, keepdim=True)
    D = V.shape[1]
    walk = _Walk(V / size, atoms, min(k or 32, D), positive, exact=k is None)
    end = torch.full_like(walk.largest, max(penalty or 0.0, _END)) * walk.largest
    paths: list[list[PathPoint]] = [[] for _ in V]
    for _ in range(20 * (k or D) + 100):
        if not bool(walk.live.any()):
            break
        if k is None and int(walk.count.max()) == walk.features.shape[1] < D:
            walk.grow()
        w = (walk.inverse @ walk.signs[..., None])[..., 0]
        fall, row = walk.corners(w)
        crossing = torch.where(walk.coefficients * w < 0, -walk.coefficients / w, float("inf"))
        first, slot = crossing.min(dim=1)
        stop = walk.penalty - end
        step = torch.minimum(torch.minimum(fall, first), stop).clamp_min(0) * walk.live
        walk.coefficients += step[:, None] * w
        walk.penalty -= step
        explained = (1 - walk.left().square().sum(dim=1)).tolist()
        count = walk.count.tolist()
        for b in walk.live.nonzero()[:, 0].tolist():
            fraction = float(walk.penalty[b] / walk.largest[b])
            paths[b].append(PathPoint(penalty=fraction, n_features=count[b], explained_variance=explained[b]))
            if stop[b] <= step[b]:
                walk.live[b] = False
            elif first[b] <= step[b]:
                walk.leave(b, int(slot[b]))
            elif count[b] >= min(k or D, D):
                walk.live[b] = False
            else:
                walk.join(b, int(row[b]))
    return [_finish(walk, b, float(size[b]), paths[b]) for b in range(len(V))]


def _finish(walk: _Walk, b: int, size: float, path: list[PathPoint]) -> Solution:
    """Solve the last point anew from its active set and signs, and check it over all rows."""
    slots = (walk.features[b] >= 0).nonzero()[:, 0]
    slots = slots[walk.joined[b, slots].argsort()]
    rows, signs = walk.rows[b, slots], walk.signs[b, slots]
    penalty, largest = walk.penalty[b], walk.largest[b]
    if len(slots):
        factor = torch.linalg.cholesky(rows @ rows.T)
        coefficients = torch.cholesky_solve((rows @ walk.v[b] - penalty * signs)[:, None], factor)[:, 0]
    else:
        coefficients = walk.v.new_zeros(0)
    products = walk.atoms.correlate((walk.v[b] - coefficients @ rows)[None], exact=True)[0]
    over = (products if walk.positive else products.abs()).max() - penalty
    wrong = (-coefficients * signs).max() if len(slots) else coefficients.new_zeros(())
    violation = float(torch.stack([over, wrong]).max().clamp_min(0) / largest.clamp_min(1e-300))
    return Solution(
        features=walk.features[b, slots],
        coefficients=coefficients * size,
        path=path,
        penalty=float(penalty / largest) if largest > 0 else 1.0,
        violation=violation,
    )
