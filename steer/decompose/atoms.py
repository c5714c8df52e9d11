"""The dictionary a vector is taken apart over: the SAE's decoder rows at unit length.

Products over all L rows run in fp32; whatever is decided from them is decided again in float64, so that a choice
between features is that of a plain float64 implementation.

Shape letters: B vectors, L latents, D width, C candidates looked at again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.sae import SAE

_CACHED = 1 << 24  # entries of a dictionary up to which a float64 copy is kept: 128 MiB
_BLOCK = 4096  # rows turned to float64 at a time beyond that
_CANDIDATES = 8
_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}  # of fp32 products, by torch's setting


class Atoms:
    """Unit rows d_j / |d_j| of a dictionary [L, D], without a copy of it.

    `excluded` [L] bool marks rows that no method may choose; rows of length 0 never are.
    """

    def __init__(self, rows: Tensor, excluded: Tensor | None = None) -> None:
        self.rows = rows.detach() if rows.dtype == torch.float64 else rows.detach().float()
        self.norms = torch.cat([part.double().norm(dim=1) for part in self.rows.split(_BLOCK)])
        usable = self.norms > 0
        if excluded is not None:
            usable &= ~excluded.to(usable.device)
        self.usable = usable
        self._inverse = torch.where(usable, 1 / self.norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        self._wide: Tensor | None = None
        if not bool(usable.any()):
            raise SteersmanError("this SAE has no feature to take a vector apart with: every decoder row is 0 or dead")

    @classmethod
    def of(cls, sae: SAE, exclude_dead: bool) -> Atoms:
        """The decoder rows of `sae`, without those of features that its statistics call dead if `exclude_dead`."""
        stats = sae.feature_stats
        dead = None if stats is None or not exclude_dead else stats.max_act <= 0
        return cls(sae.W_dec, dead)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """D."""
        return self.rows.shape[1]

    def unit(self, features: Tensor) -> Tensor:
        """Unit rows [..., D] of `features` [...], float64."""
        return self.rows[features].double() * self._inverse[features][..., None]

    def correlate(self, X: Tensor, exact: bool = False) -> Tensor:
        """Inner products [B, L] of X [B, D] with every unit row (0 for rows that may not be chosen).

        In fp32, or float64 if `exact`.
        """
        if not exact and self.rows.dtype == torch.float32:
            return (X.float() @ self.rows.T).mul_(self._inverse.float())
        X = X.double()
        if self.rows.numel() <= _CACHED:
            if self._wide is None:
                self._wide = self.rows.double()
            return (X @ self._wide.T).mul_(self._inverse)
        parts = [X @ part.double().T for part in self.rows.split(_BLOCK)]
        return torch.cat(parts, dim=1).mul_(self._inverse)

    def strongest(self, R: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """The row with the largest |inner product| with each r of R [B, D], those of `taken` [B, M] left out.

        Returns ids [B] and signed inner products [B] float64. Equal ones go to the lower id. The fp32 products name
        candidates, float64 decides among them, and the error bound of an fp32 sum says whether the rest can be ruled
        out; where it cannot, more are looked at.
        """
        size = R.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        U = R / size
        score = self.correlate(U).abs_()
        score.scatter_(1, taken, -1.0)
        score[:, ~self.usable] = -1.0
        best = torch.zeros(len(R), dtype=torch.int64, device=R.device)
        value = torch.zeros(len(R), dtype=torch.float64, device=R.device)
        bound = (self.width + 8) * _UNIT_ROUNDOFF[torch.get_float32_matmul_precision()]
        todo, n = torch.arange(len(R), device=R.device), min(_CANDIDATES, len(self))
        while len(todo):
            top, ids = score[todo].topk(n, dim=1)
            ids = ids.sort(dim=1).values
            exact = torch.einsum("bcd,bd->bc", self.unit(ids), U[todo])
            open_ = score[todo].gather(1, ids) >= 0
            chosen = torch.where(open_, exact.abs(), -1.0).argmax(dim=1, keepdim=True)
            best[todo] = ids.gather(1, chosen)[:, 0]
            value[todo] = exact.gather(1, chosen)[:, 0]
            certain = (top[:, -1].double() + bound < value[todo].abs()) | (top[:, -1] < 0)
            if n == len(self):
                break
            todo, n = todo[~certain], min(8 * n, len(self))
        return best, value * size[:, 0]
