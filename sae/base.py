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
from steersman.sae.input_norm import TokenNorm, token_norm
from steersman.sae.stats import FeatureStats


class SparseCode(NamedTuple):
    """The active features of N tokens. Entries that are not active have the value 0 and any valid index."""

    values: Tensor
    """[N, K] fp32, never negative."""
    indices: Tensor
    """[N, K] int64 feature ids."""


class Entered(NamedTuple):
    """How an input was brought into the form that the encoder reads, to be undone after decoding."""

    shape: Any
    """What `einops.unpack` needs to give N rows their leading shape back."""
    norm: TokenNorm | None
    """The mean and scale of each row, where the SAE normalises its input."""
    n_heads: int
    """Heads of an input that came per attention head; 0 for any other."""


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
    A transcoder is the same with another width and hook point on the way out.

    >>> sae = SAE(SAEConfig(d_in=6, d_sae=32, k=4))
    >>> x = torch.randn(5, 6)
    >>> sae.encode(x).shape, sae.encode_sparse(x).values.shape, sae(x).shape
    (torch.Size([5, 32]), torch.Size([5, 4]), torch.Size([5, 6]))
    """

    architectures: ClassVar[dict[str, type[SAE]]] = {}
    activation: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.activation:  # not for a base that architectures share
            SAE.architectures[cls.activation] = cls

    def __new__(cls, cfg: SAEConfig, *_args: Any, **_kwargs: Any) -> SAE:
        return super().__new__(SAE.architectures[cfg.activation] if cls is SAE else cls)

    def __init__(self, cfg: SAEConfig, generator: torch.Generator | None = None):
        """Random unit decoder rows and the encoder their transpose (arXiv 2406.04093, sec. 2.2); biases zero."""
        super().__init__()
        self.cfg = cfg
        rows = torch.randn(cfg.d_sae, cfg.d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        encoder = rows.clone().T
        if cfg.transcoder:  # nothing ties what it writes to what it reads
            rows = torch.randn(cfg.d_sae, cfg.out_width, generator=generator)
            rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(cfg.out_width))
        if cfg.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(cfg.out_width, cfg.d_in))
        self.feature_stats: FeatureStats | None = None
        self._entered: Entered | None = None

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

    def training_code(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        """The code of x [N, D] while training, with gradients.

        W_enc [L, D] stands in for the encoder's rows, where a copy of them is kept in the dtype of the products.
        """
        raise SteersmanError(f"training of {self.cfg.activation!r} SAEs is not supported; use topk or batch_topk")

    def _rows(self, x: Tensor) -> tuple[Tensor, Entered]:
        """x [..., D] as rows [N, D] on the SAE's device, normalised where the configuration says so."""
        n_heads, d_in = 0, self.cfg.d_in
        if self.cfg.reshape_heads and x.ndim > 1 and x.shape[-1] != d_in and x.shape[-2] * x.shape[-1] == d_in:
            n_heads, x = x.shape[-2], x.flatten(-2)
        if x.shape[-1] != d_in:
            raise SteersmanError(f"activations of width {x.shape[-1]} do not fit an SAE of d_in {d_in}")
        rows, shape = pack([x], "* d")
        rows = rows.to(self.device)
        if self.cfg.input_norm == "none":
            return rows, Entered(shape, None, n_heads)
        norm = token_norm(self.cfg.input_norm, rows)
        return norm.apply(rows), Entered(shape, norm, n_heads)

    def _leave(self, y: Tensor, entered: Entered) -> Tensor:
        """Decoded rows [N, D_out] in the form and units that the input had."""
        if entered.norm is not None and not self.cfg.transcoder:  # a transcoder's output has its own scale
            y = entered.norm.undo(y)
        y = unpack(y, entered.shape, "* d")[0]
        return y.unflatten(-1, (entered.n_heads, -1)) if entered.n_heads and not self.cfg.transcoder else y

    def _dense(self, rows: Tensor) -> Tensor:
        """The dense code [N, L] fp32 of rows [N, D]."""
        values, indices = self._select(rows)
        code = torch.zeros(len(rows), self.cfg.d_sae, device=self.device)
        return code.scatter_add_(1, indices.long(), values)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The active features of x [N, D]: values and indices [N, K], largest first."""
        rows, _ = self._rows(x)
        values, indices = self._select(rows)
        return SparseCode(values, indices.long())

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The dense code of x [..., D] -> [..., L] fp32, as SAELens and SAEBench expect it."""
        rows, entered = self._rows(x)
        if entered.norm is not None or entered.n_heads:
            self._entered = entered  # for a `decode` that is given the code alone
        return unpack(self._dense(rows), entered.shape, "* l")[0]

    @torch.no_grad()
    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """The activations of chosen features: x [N, D], features [M] int64 -> [N, M] fp32, 0 where one is not active.

        The columns of `encode`, in memory of N*(K + M).
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

    def decode(self, f: Tensor, like: Tensor | None = None) -> Tensor:
        """A dense code f [..., L] -> [..., D].

        An SAE that normalises its input undoes that: with the statistics of `like`, the input [..., D] that f codes,
        or of the input that `encode` saw last. Raises SteersmanError where neither has f's leading shape.
        """
        y = f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec
        if self.cfg.transcoder or (self.cfg.input_norm == "none" and not self.cfg.reshape_heads):
            return y
        entered = self._entered if like is None else self._rows(like)[1]
        rows, shape = pack([y], "* d")
        if entered is None or entered.shape != shape:
            if self.cfg.input_norm == "none":
                return y
            raise SteersmanError(
                f"this SAE normalises each token ({self.cfg.input_norm}), so a code of shape {tuple(f.shape)} can only "
                "be decoded with its input: pass like=x, or call the SAE on x"
            )
        return self._leave(rows, entered)

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """A sparse code, values and indices [N, K] -> [N, D], in the units of the normalised input (if it is one) and
        without a skip connection's part: `reconstruct` has both."""
        return choose(values.device).sparse_decode(values, indices, self.W_dec, self.b_dec)

    def decode_training(self, code: TrainingCode) -> Tensor:
        """A training code -> [N, D], with gradients to the code, `W_dec` and `b_dec`."""
        return differentiable_decode(code.values, code.order, self.W_dec, self.b_dec)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, SparseCode]:
        """The reconstruction of x [..., D], fp32, and its code (values and indices [N, K]; N tokens in all)."""
        rows, entered = self._rows(x)
        values, indices = self._select(rows)
        y = self._leave(self.decode_sparse(values, indices), entered)
        if self.cfg.skip_connection:
            flat = x.flatten(-2) if entered.n_heads else x
            y = y + (flat.to(self.device).float() @ self.W_skip.float().T).reshape(y.shape)
        return y, SparseCode(values, indices.long())

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [..., D], fp32."""
        return self.reconstruct(x)[0]

    @torch.no_grad()
    def token_scale(self, x: Tensor) -> Tensor | None:
        """How many units of x one unit of the decoder's output is, for each token of x [N, D] -> [N, 1].

        None where it is one for all, as for every SAE that does not normalise its input.
        """
        norm = self._rows(x)[1].norm
        return None if norm is None else norm.scale_out

    def check_residual(self, purpose: str) -> None:
        """Raise a SteersmanError unless what the SAE writes lives where what it reads does.

        `purpose` names what needs that, such as "steering".
        """
        cfg = self.cfg
        if cfg.transcoder:
            out = cfg.hook_name_out or "another hook point"
            raise SteersmanError(
                f"{purpose} needs an SAE that writes where it reads; this is a transcoder from "
                f"{cfg.hook_name or 'one hook point'} to {out}: it can encode and decode"
            )
        if cfg.reshape_heads or cfg.hook_name.endswith("hook_z"):
            raise SteersmanError(
                f"{purpose} works on hidden states; this SAE reads {cfg.hook_name or 'attention heads'}, the outputs "
                "of the single heads before they are mixed: it can encode and decode"
            )

    def neuronpedia_url(self, feature: int) -> str:
        """The page of a feature on Neuronpedia. Raises SteersmanError where the SAE's origin does not say which."""
        self.check_feature(feature)
        page = self.cfg.metadata.get("neuronpedia_id")
        if not page:
            raise SteersmanError("this SAE's origin records no Neuronpedia page")
        return f"https://www.neuronpedia.org/{page}/{feature}"

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
    def load(
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        format: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> SAE:
        """Read an SAE from a folder, a file, or the hub (`repo-id[/subfolder][@revision]`), in any format of
        `steersman.sae.formats`; `format` names one where the files alone would mean another.

        Weights go to `device` as `dtype`, block by block, so that a file of a million features is never held twice.
        Raises SteersmanError for what is no SAE, saying what was found, and for files that are malformed.
        """
        from steersman.sae.formats import load

        return load(path, torch.device(device), format=format, dtype=dtype)
