"""Matching pursuit (Mallat & Zhang 1993; as an SAE, arXiv 2506.03093): a code found greedily, one feature at a time.
Inference only.

Starting from the residual r = x - b_dec, each step takes the feature j with the largest positive product <r, d_j> with
its decoder row, adds the product to f_j and takes f_j's share off the residual: r <- r - <r, d_j> d_j. A token is done
when a step brought no new feature (option `stop_on_duplicate_support`), when |r| is below `residual_threshold` (unless
that is 0), or after `max_iterations` steps, d_in if that is None. As in SAELens 6, `saes/matching_pursuit_sae.py`, the
encoder is the decoder's transpose, and b_dec is in the output only where it was taken off the input.

Shape letters: N tokens, L latents, D width, T features found so far.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.kernels import choose
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig


class MatchingPursuitSAE(SAE):
    """Features by matching pursuit on the decoder's rows. `W_enc` is a view of `W_dec`, and `b_enc` is None.

    >>> sae = SAE(SAEConfig(d_in=6, d_sae=32, architecture="matching_pursuit", options={"max_iterations": 3}))
    >>> sae.encode_sparse(torch.randn(5, 6)).values.shape[1] <= 3
    True
    """

    name = "matching_pursuit"
    defaults: ClassVar[Mapping[str, Any]] = {
        "residual_threshold": 1e-2, "max_iterations": None, "stop_on_duplicate_support": True,
    }  # fmt: skip
    saelens_options = tuple(defaults)

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        super().check(cfg)
        options = {**cls.defaults, **cfg.options}
        limit, most = options["residual_threshold"], options["max_iterations"]
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < float("inf"):
            raise SteersmanError(f"option residual_threshold must be a number of 0 or more, got {limit!r}")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise SteersmanError(f"option max_iterations must be a whole number above 0, or None, got {most!r}")
        if not isinstance(options["stop_on_duplicate_support"], bool):
            raise SteersmanError("option stop_on_duplicate_support must be true or false")

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        super().__init__(cfg, generator)
        for name in ("W_enc", "b_enc"):
            delattr(self, name)
        self.register_parameter("b_enc", None)
        self._tied = True

    def __getattr__(self, name: str) -> Any:
        if name == "W_enc" and "_tied" in self.__dict__:
            return self.W_dec.T
        return super().__getattr__(name)

    @property
    def output_bias(self) -> Tensor | None:
        return self.input_bias

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        options, rows, bias = self.options, self.W_dec.detach().float(), self.input_bias
        residual = x.float() if bias is None else x.float() - bias.float()
        N, device = len(x), x.device
        values, indices = torch.zeros(N, 0, device=device), torch.zeros(N, 0, dtype=torch.int64, device=device)
        done, no_bias = torch.zeros(N, dtype=torch.bool, device=device), rows.new_zeros(len(rows))
        largest = choose(device).topk_encode
        for _ in range(options["max_iterations"] or self.cfg.d_in):
            chosen = largest(residual, rows, no_bias, 1)[1].long()
            of_chosen = rows[chosen[:, 0]]
            added = (residual * of_chosen).sum(dim=1, keepdim=True).relu().masked_fill_(done[:, None], 0.0)
            residual = residual - added * of_chosen
            known = (indices == chosen) & (values > 0)
            is_new = ~known.any(dim=1, keepdim=True) & (added > 0)
            values = torch.where(known, values + added, values)
            values = torch.cat([values, torch.where(is_new, added, 0.0)], dim=1)
            indices = torch.cat([indices, chosen], dim=1)
            if options["stop_on_duplicate_support"]:
                done |= ~is_new[:, 0]
            if options["residual_threshold"] > 0:
                done |= residual.norm(dim=1) < options["residual_threshold"]
            if bool(done.all()):
                break
        values, order = values.sort(dim=1, descending=True, stable=True)
        width = max(1, int((values > 0).sum(dim=1).max())) if N else 1
        values, indices = values[:, :width], indices.gather(1, order)[:, :width]
        return F.pad(values, (0, width - values.shape[1])), F.pad(indices, (0, width - indices.shape[1])).int()

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        raise SteersmanError("the threshold of a matching pursuit SAE is in the units of its input: it is not rescaled")
