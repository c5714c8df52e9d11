"""The SAE module: parameters, encode, decode, and what every architecture shares.

Shape letters: N tokens, L latents (`d_sae`), D width (`d_in`), K active latents a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from einops import pack, unpack
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.kernels import Order, choose
from steersman.kernels import sparse_decode as differentiable_decode
from steersman.sae.config import SAEConfig
from steersman.sae.stats import FeatureStats


class SparseCode(NamedTuple):
    """The active features of N tokens. Entries that are not active have the value 0 and any valid index."""

    values: Tensor
    """[N, K] fp32, never negative."""
    indices: Tensor
    """[N, K] int64 feature ids."""


class TrainingCode(NamedTuple):
    """A differentiable code, with what the training loop needs beside it."""

    values: Tensor
    """[N, K] fp32 with gradients to the encoder."""
    order: Order
    """The indices [N, K] and their sort, shared by all gradients of the step."""
    smallest: Tensor | None
    """The smallest selected value, where the architecture learns a threshold from it."""


class SAE(nn.Module):
    """A sparse autoencoder: `x_hat = f(x) W_dec + b_dec`, `f` sparse and non-negative.

    `SAE(config)` builds the architecture that `config.activation` names. `W_enc` [d_in, d_sae] is stored so that
    `W_enc.T` is contiguous: a latent's row in one piece. Arithmetic is fp32 whatever the dtype of the input.

    >>> sae = SAE(SAEConfig(d_in=6, d_sae=32, k=4))
    >>> x = torch.randn(5, 6)
    >>> sae.encode(x).shape, sae.encode_sparse(x).values.shape, sae(x).shape
    (torch.Size([5, 32]), torch.Size([5, 4]), torch.Size([5, 6]))
    """

    architectures: ClassVar[dict[str, type[SAE]]] = {}
    activation: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        SAE.architectures[cls.activation] = cls

    def __new__(cls, cfg: SAEConfig, *_args: Any, **_kwargs: Any) -> SAE:
        return super().__new__(SAE.architectures[cfg.activation] if cls is SAE else cls)

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        """Random unit decoder rows and the encoder their transpose (arXiv 2406.04093, sec. 2.2); biases zero."""
        super().__init__()
        self.cfg = cfg
        rows = torch.randn(cfg.d_sae, cfg.d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        self.feature_stats: FeatureStats | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def encoder_bias_in(self) -> Tensor | None:
        """What is subtracted from the input before encoding: `b_dec` [D], or nothing."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code of x [N, D] at inference: values [N, K] fp32 and indices [N, K] int32."""
        raise NotImplementedError  # each architecture defines it

    def training_code(self, x: Tensor) -> TrainingCode:
        """The code of x [N, D] while training, with gradients."""
        raise SteersmanError(f"training of {self.cfg.activation!r} SAEs is not supported; use topk or batch_topk")

    def _rows(self, x: Tensor) -> tuple[Tensor, Any]:
        if x.shape[-1] != self.cfg.d_in:
            raise SteersmanError(f"activations of width {x.shape[-1]} do not fit an SAE of d_in {self.cfg.d_in}")
        rows, shape = pack([x], "* d")
        return rows, shape

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The active features of x [N, D]: values and indices [N, K], largest first."""
        rows, _ = self._rows(x)
        values, indices = self._select(rows.to(self.device))
        return SparseCode(values, indices.long())

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The dense code of x [..., D] -> [..., L] fp32, as SAELens and SAEBench expect it."""
        rows, shape = self._rows(x)
        values, indices = self._select(rows.to(self.device))
        code = torch.zeros(len(rows), self.cfg.d_sae, device=self.device)
        code.scatter_add_(1, indices.long(), values)
        return unpack(code, shape, "* l")[0]

    @torch.no_grad()
    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """The activations of chosen features: x [N, D], features [M] int64 -> [N, M] fp32, 0 where one is not active.

        Exactly the columns of `encode`, in memory of N*(K + M).
        """
        values, indices = self.encode_sparse(x)
        order = torch.argsort(features)
        sorted_features = features[order]
        column = torch.searchsorted(sorted_features, indices).clamp_(max=len(features) - 1)
        hit = sorted_features[column] == indices
        out = torch.zeros(len(values), len(features), device=values.device)
        out.scatter_add_(1, column, torch.where(hit, values, torch.zeros_like(values)))
        # A feature named twice is found once: give every copy the value of the first.
        first = torch.searchsorted(sorted_features, features)
        return out[:, first]

    def decode(self, f: Tensor) -> Tensor:
        """A dense code f [..., L] -> [..., D]."""
        return f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """A sparse code, values and indices [N, K] -> [N, D]."""
        return choose(values.device).sparse_decode(values, indices, self.W_dec, self.b_dec)

    def decode_training(self, code: TrainingCode) -> Tensor:
        """A training code -> [N, D], with gradients to the code, `W_dec` and `b_dec`."""
        return differentiable_decode(code.values, code.order, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [..., D], fp32."""
        rows, shape = self._rows(x)
        with torch.no_grad():
            values, indices = self._select(rows.to(self.device))
            x_hat = self.decode_sparse(values, indices)
        return unpack(x_hat, shape, "* d")[0]

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Make every decoder row a unit vector."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of inputs `scale * x` into the same SAE of inputs x, decoder rows unchanged.

        With unit decoder rows the code scales with the input, so only the biases (and thresholds) are divided.
        """
        self.b_enc /= scale
        self.b_dec /= scale

    def check_feature(self, feature: int) -> None:
        """Raise a SteersmanError unless `feature` is an id of this SAE."""
        if not 0 <= feature < self.cfg.d_sae:
            raise SteersmanError(f"feature {feature} is out of range: this SAE has features 0 to {self.cfg.d_sae - 1}")

    def is_dead(self, feature: int) -> bool:
        """Whether the feature never fired on the tokens its statistics were taken from."""
        self.check_feature(feature)
        if self.feature_stats is None:
            raise SteersmanError("this SAE carries no feature statistics; run `steersman features` on it first")
        return float(self.feature_stats.max_act[feature]) <= 0

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: cfg.json, sae_weights.safetensors and the feature statistics, each atomically."""
        from steersman.sae.checkpoint import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> SAE:
        """Read a folder that `save` wrote (or a run folder that holds one)."""
        from steersman.sae.checkpoint import load

        return load(Path(path), torch.device(device))
