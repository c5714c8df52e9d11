"""What the architectures share whose latents are independent of each other.

Shape letters: N tokens, L latents, D width, M chosen features.
"""

import torch
from torch import Tensor

from steersman.kernels.torch_ops import largest_of_code
from steersman.sae.base import SAE


class ElementwiseSAE(SAE):
    """An SAE whose code is a function of each pre-activation alone: `_dense` defines it, for all latents or some."""

    def _dense(self, rows: Tensor, features: Tensor | None = None) -> Tensor:
        """The code of rows [N, D]: [N, L], or [N, M] of the chosen features."""
        raise NotImplementedError  # each architecture defines it

    def _encoder(self, features: Tensor | None) -> Tensor:
        """Encoder rows [L, D], or those of the chosen features [M, D]."""
        return self.W_enc.T if features is None else self.W_enc.T[features]

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return largest_of_code(lambda part: self._dense(x[part]), len(x), self.cfg.d_sae)

    @torch.no_grad()
    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """See `SAE.encode_features`. Only the chosen latents are computed: equal to the columns of `encode` up to the
        rounding of a smaller product."""
        rows, _ = self._rows(x)
        return self._dense(rows, features)


def chosen(table: Tensor, features: Tensor | None) -> Tensor:
    """Entries of `table` [L] (or a scalar, which serves every latent) for the chosen features."""
    return table if features is None or table.ndim == 0 else table[features]
