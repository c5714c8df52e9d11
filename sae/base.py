"""The SAE module: parameters, encode, decode, and what every architecture shares.

Shape letters: N tokens, L latents (`d_sae`), D width (`d_in`), K active latents a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from einops import pack, unpack
from torch import Tensor, nn

from steersman.errors import SteersmanError, near_names
from steersman.html import card
from steersman.kernels import choose
from steersman.kernels import sparse_decode as differentiable_decode
from steersman.registry import Registry
from steersman.sae.config import ARCHITECTURES, SAEConfig
from steersman.sae.feature_labels import FeatureLabels
from steersman.sae.fused import FusedBatch, Gradients
from steersman.sae.input_norm import TokenNorm, token_norm
from steersman.sae.plots import plot_density
from steersman.sae.training import Latents, Step, TrainingCode, TrainingState

_ROWS_AT_ONCE = 4096
"""Latents that are worked on at a time, where that takes memory."""


class SparseCode(NamedTuple):
    """The active features of N tokens. Entries that are not active have the value 0 and any valid index."""

    values: Tensor
    """[N, K] fp32; negative only where the architecture is `signed`."""
    indices: Tensor
    """[N, K] int64 feature ids."""

    @property
    def active(self) -> Tensor:
        """[N, K] bool: which entries are active features. A value that is no number is none."""
        return self.values.abs() > 0


class InputForm(NamedTuple):
    """How an input was brought into the form that the encoder reads, to be undone after decoding."""

    shape: Any
    """What `einops.unpack` needs to give N rows their leading shape back."""
    norm: TokenNorm | None
    """The mean and scale of each row, where the SAE normalises its input."""
    n_heads: int
    """Heads of an input that came per attention head; 0 for any other."""


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Statistics of every feature over `n_tokens` tokens, with the final weights. L latents."""

    max_act: Tensor
    """[L] fp32: the largest activation on ordinary rows (of a signed code the largest |activation|); 0 for a feature
    that fired on none. Rows of huge norm, those of attention sinks, do not count here: an activation there is no unit
    for what a feature does elsewhere."""
    density: Tensor
    """[L] fp32: the fraction of the tokens on which the feature is active."""
    mean_act: Tensor
    """[L] fp32: the mean activation over the tokens on which the feature is active; 0 for a dead one."""
    n_tokens: int
    """How many tokens these statistics are over."""
    median_norm: float
    """Median |x| of the activations the SAE was trained on (of a transcoder, of those it predicts): the unit of
    `norm_frac` strengths."""

    def __repr__(self) -> str:
        return f"FeatureStats({len(self.max_act)} features over {self.n_tokens:,} tokens)"


class SAE(nn.Module):
    """A sparse autoencoder: `x_hat = f(x) W_dec + b_dec`, `f` sparse.

    `SAE(config)` builds the architecture that `config.architecture` names. `W_enc` [d_in, d_sae] is stored so that
    `W_enc.T` is contiguous: a latent's row in one piece. Arithmetic is fp32 whatever the dtype of the input.
    A transcoder is the same with another width and hook point on the way out.

    A subclass with a `name` is an architecture of its own, wherever it is written. It defines `_select`, and to be
    trained `encode_training`; what else it may say is below. It is saved with all its parameters and buffers.

    >>> sae = SAE(SAEConfig(d_in=6, d_sae=32, k=4))
    >>> x = torch.randn(5, 6)
    >>> sae.encode(x).shape, sae.encode_sparse(x).values.shape, sae(x).shape
    (torch.Size([5, 32]), torch.Size([5, 4]), torch.Size([5, 6]))
    """

    architectures: ClassVar[Registry[type[SAE]]] = ARCHITECTURES
    name: ClassVar[str] = ""
    """What `SAEConfig.architecture` calls it. A class without one is a base that architectures share."""
    saelens_name: ClassVar[str] = ""
    """What SAELens calls one that computes the same; `name`, which SAELens may not know, if nothing else is said."""
    saelens_options: ClassVar[tuple[str, ...]] = ()
    """Those of its settings that SAELens' configuration has too, under the same name."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of its own, by name, with their defaults: what `SAEConfig.options` may hold."""
    uses_k: ClassVar[bool] = False
    """Whether `k` means something for it."""
    uses_groups: ClassVar[bool] = False
    """Whether it needs `group_sizes`."""
    side_by_side: ClassVar[bool] = False
    """Whether it reads several hook points side by side, which `SAEConfig.sides` then names."""
    exact_k: ClassVar[bool] = False
    """Whether the code of a token is its K largest latents, so that K of each part of the latents hold it."""
    trainable: ClassVar[bool] = False
    """Whether `train_sae` trains it."""
    whole_batch: ClassVar[bool] = False
    """Whether training selects over the whole batch, which can then not be split into parts."""
    fused: ClassVar[bool] = False
    """Whether it says its gradients itself, in `fused_gradients`, so that the fused update trains it."""
    target_l0: ClassVar[Literal["", "optional", "required"]] = ""
    """Whether training reads `TrainConfig.target_l0`, how many features are to be active a token on average."""
    rate: ClassVar[float] = 1.0
    """The learning rate that training chooses for it, in units of the usual one: see `train.resolve`."""
    signed: ClassVar[bool] = False
    """Whether activations may be negative."""
    supervised: ClassVar[str] = ""
    """Of an architecture that trains on labels of the rows, which its `TrainingState` then has: what it is where no
    row has a label."""
    host_free: ClassVar[bool] = True
    """Whether a training step never waits for the device, so that a CUDA graph may hold it."""
    latent_dims: ClassVar[Mapping[str, int | None]] = {
        "W_enc": 1, "W_dec": 0, "b_enc": 0, "b_dec": None, "W_skip": None,
    }  # fmt: skip
    """Which dimension of a parameter or buffer counts latents, where ranks share those; of one that is not named here
    the one of size `d_sae`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__ and "saelens_name" not in cls.__dict__:
            cls.saelens_name = cls.name  # what computes something else than its base must not pass for it
        SAE.architectures.register(cls, cls)

    def __new__(cls, cfg: SAEConfig | None = None, *_args: Any, **_kwargs: Any) -> SAE:
        # Without a configuration for copies and pickles, which know their class and bring the rest themselves.
        kind: Any = SAE.architectures[cfg.architecture] if cls is SAE and cfg is not None else cls
        return super().__new__(kind)

    @classmethod
    def check(cls, cfg: SAEConfig) -> None:
        """The architecture's rules for its configuration. Raises SteersmanError for what breaks one."""
        if cls.uses_k and not 1 <= cfg.k <= cfg.d_sae:
            raise SteersmanError(f"k = {cfg.k} must lie between 1 and d_sae = {cfg.d_sae}")
        if bool(cfg.group_sizes) != cls.uses_groups:
            with_groups = [name for name, kind in SAE.architectures.items() if kind.uses_groups]
            raise SteersmanError(f"group_sizes belong to architecture {', '.join(with_groups)}, which needs them")
        if cfg.sides and not cls.side_by_side:
            raise SteersmanError(f"architecture {cfg.architecture!r} has no sides: they are a crosscoder's hook points")
        for name in cfg.options:
            if name not in cls.defaults:
                near = near_names(name, list(cls.defaults), limit=3)
                raise SteersmanError(
                    f"architecture {cfg.architecture!r} has no option {name!r}" + (f"; it has {near}" if near else "")
                )

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
        self.labels = FeatureLabels()
        self.latents = Latents()
        self._input_form: InputForm | None = None

    def __repr__(self) -> str:
        cfg = self.whole_cfg
        k = f", k={cfg.k}" if self.uses_k else ""
        if cfg.sides:
            return f"{type(self).__name__}(d_in={cfg.d_in}, d_sae={cfg.d_sae}{k}, {' | '.join(map(str, cfg.sides))})"
        to = f" -> {cfg.hook_name_out or cfg.out_width}" if cfg.transcoder else ""
        where = f", {cfg.hook_name or 'hook point unknown'}{to} of {cfg.model_name or 'an unknown model'}"
        return f"{type(self).__name__}(d_in={cfg.d_in}, d_sae={cfg.d_sae}{k}{where})"

    def _repr_html_(self) -> str:
        heldout: dict[str, Any] = self.cfg.metadata.get("heldout") or {}
        facts = [(f"held out: {name}", value) for name, value in heldout.items() if isinstance(value, int | float)]
        facts += [("labels", len(self.labels))] if self.labels else []
        stats = self.feature_stats
        drawn = [] if stats is None else [(plot_density(stats), "how many features fire on which share of tokens")]
        return card(repr(self), facts, figures=drawn)

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def options(self) -> Mapping[str, Any]:
        """The settings of its own, those that the configuration leaves open at their defaults."""
        return {**self.defaults, **self.cfg.options}

    def latent_dim(self, name: str) -> int | None:
        """The dimension of a parameter or buffer that counts latents; None where there is none, or no such tensor."""
        if name in self.latent_dims:
            return self.latent_dims[name]
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        shape = tensors[name].shape if name in tensors else ()
        return next((dim for dim, size in enumerate(shape) if size == self.cfg.d_sae), None)

    @property
    def whole_cfg(self) -> SAEConfig:
        """Its configuration; while it trains on several ranks, that of the SAE whose latents they share."""
        return self.latents.whole or self.cfg

    @property
    def input_bias(self) -> Tensor | None:
        """What is subtracted from the input before encoding: `b_dec` [D], or nothing."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the decoded code: `b_dec` [D], or nothing."""
        return self.b_dec

    @property
    def code_bias(self) -> Tensor:
        """What is added to the products with the encoder, [L], to decide what is active."""
        return self.b_enc

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code of x [N, D] at inference: values [N, K] fp32 and indices [N, K] int32."""
        raise NotImplementedError  # each architecture defines it

    def prepare_training(self, config: Any) -> None:
        """Make parameters and buffers that only training has, before a run with these settings (a `TrainConfig`)
        begins or resumes."""

    def begin_training(self, x: Tensor, config: Any) -> None:
        """Choose what is chosen by data, from the first batch x [N, D] of a run, while the biases are still zero.
        Called without gradients; sums over tokens and latents that other ranks may hold go through `self.latents`."""

    def scale_code(self, factor: Tensor) -> None:
        """Multiply every activation by `factor` (a scalar) in place, without gradients, before the first step."""
        self.W_enc.mul_(factor)
        if self.b_enc is not None:
            self.b_enc.mul_(factor)

    def encode_training(self, x: Tensor, W_enc: Tensor | None = None) -> TrainingCode:
        """The code of x [N, D] while training, with gradients.

        W_enc [L, D] stands in for the encoder's rows, where a copy of them is kept in the dtype of the products; x is
        then what they multiply, in that dtype: `input_bias` has been subtracted.
        """
        able = ", ".join(name for name, kind in SAE.architectures.items() if kind.trainable)
        raise SteersmanError(f"training of {self.cfg.architecture!r} SAEs is not supported; use one of {able}")

    def skip(self, x: Tensor) -> Tensor:
        """What a skip connection adds to the output for the input x [..., D] as it came: `x W_skip^T` [..., D_out]."""
        return x.float() @ self.W_skip.float().T

    def training_step(self, x: Tensor, target: Tensor, state: TrainingState) -> Step:
        """The losses of one step: x [N, D] is encoded, target [N, D_out] is what the output is compared with, less what
        a skip connection adds to it, which has gradients.

        Sums over tokens and latents that other ranks may hold go through `self.latents`.
        """
        code = self.encode_training(x)
        residual = target - self.decode_training(code)
        return Step(code, {"squared_error": residual.square().sum()})

    def fused_gradients(self, batch: FusedBatch) -> tuple[Step, Gradients]:
        """The losses of `training_step`, and their gradients without autograd: see `sae/fused.py`."""
        raise NotImplementedError  # each architecture that is `fused` defines it

    def after_step(self, step: Step, state: TrainingState) -> None:
        """What the architecture keeps of a step, such as a threshold. Called once for each step, without gradients."""

    def _rows(self, x: Tensor) -> tuple[Tensor, InputForm]:
        """x [..., D] as rows [N, D] on the SAE's device, normalised where the configuration says so."""
        n_heads, d_in = 0, self.cfg.d_in
        if self.cfg.reshape_heads and x.ndim > 1 and x.shape[-1] != d_in and x.shape[-2] * x.shape[-1] == d_in:
            n_heads, x = x.shape[-2], x.flatten(-2)
        if x.shape[-1] != d_in:
            raise SteersmanError(f"activations of width {x.shape[-1]} do not fit an SAE of d_in {d_in}")
        rows, shape = pack([x], "* d")
        rows = rows.to(self.device)
        if self.cfg.input_norm == "none":
            return rows, InputForm(shape, None, n_heads)
        norm = token_norm(self.cfg.input_norm, rows)
        return norm.apply(rows), InputForm(shape, norm, n_heads)

    def _restore(self, y: Tensor, form: InputForm) -> Tensor:
        """Decoded rows [N, D_out] in the form and units that the input had."""
        if form.norm is not None and not self.cfg.transcoder:  # a transcoder's output has its own scale
            y = form.norm.undo(y)
        y = unpack(y, form.shape, "* d")[0]
        return y.unflatten(-1, (form.n_heads, -1)) if form.n_heads and not self.cfg.transcoder else y

    def _dense(self, rows: Tensor) -> Tensor:
        """The dense code [N, L] fp32 of rows [N, D]."""
        values, indices = self._select(rows)
        code = torch.zeros(len(rows), self.cfg.d_sae, device=self.device)
        return code.scatter_add_(1, indices.long(), values)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The active features of x [N, D]: values and indices [N, K], largest magnitude first."""
        rows, _ = self._rows(x)
        values, indices = self._select(rows)
        return SparseCode(values, indices.long())

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The dense code of x [..., D] -> [..., L] fp32, as SAELens and SAEBench expect it."""
        rows, form = self._rows(x)
        if form.norm is not None or form.n_heads:
            self._input_form = form  # for a `decode` that is given the code alone
        return unpack(self._dense(rows), form.shape, "* l")[0]

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
        # The search hits one copy of a feature that is named twice: give every copy the value of the first.
        first = torch.searchsorted(sorted_features, features)
        return out[:, first]

    def decode(self, f: Tensor, like: Tensor | None = None) -> Tensor:
        """A dense code f [..., L] -> [..., D].

        An SAE that normalises its input undoes that: with the statistics of `like`, the input [..., D] that f codes,
        or of the input that `encode` saw last. Raises SteersmanError where neither has f's leading shape.
        """
        y = f.to(self.W_dec.dtype) @ self.W_dec
        y = y if self.output_bias is None else y + self.output_bias
        if self.cfg.transcoder or (self.cfg.input_norm == "none" and not self.cfg.reshape_heads):
            return y
        form = self._input_form if like is None else self._rows(like)[1]
        rows, shape = pack([y], "* d")
        if form is None or form.shape != shape:
            if self.cfg.input_norm == "none":
                return y
            raise SteersmanError(
                f"this SAE normalises each token ({self.cfg.input_norm}), so a code of shape {tuple(f.shape)} can only "
                "be decoded with its input: pass like=x, or call the SAE on x"
            )
        return self._restore(rows, form)

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """A sparse code, values and indices [N, K] -> [N, D], in the units of the normalised input (if it is one) and
        without a skip connection's part: `reconstruct` has both."""
        return choose(values.device).sparse_decode(values, indices, self.W_dec, self.output_bias)

    def decode_training(self, code: TrainingCode) -> Tensor:
        """A training code -> [N, D_out], with gradients to the code, `W_dec` and `b_dec`."""
        if self.latents.whole is None:
            return differentiable_decode(code.values, code.order, self.W_dec, self.b_dec)
        return self.latents.sum(differentiable_decode(code.values, code.order, self.W_dec)) + self.b_dec

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, SparseCode]:
        """The reconstruction of x [..., D], fp32, and its code (values and indices [N, K]; N tokens in all)."""
        rows, form = self._rows(x)
        values, indices = self._select(rows)
        y = self._restore(self.decode_sparse(values, indices), form)
        if self.cfg.skip_connection:
            flat = x.flatten(-2) if form.n_heads else x
            y = y + self.skip(flat.to(self.device)).reshape(y.shape)
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
        cfg.check_one_hook(purpose)
        if cfg.transcoder:
            out = cfg.hook_name_out or "another hook point"
            raise SteersmanError(
                f"{purpose} needs an SAE that writes where it reads; this is a transcoder from "
                f"{cfg.hook_name or 'one hook point'} to {out}: it can encode and decode"
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
    def fold_scales(self, scale_in: float, scale_out: float) -> None:
        """Turn an SAE of inputs `scale_in * x` and outputs `scale_out * y` into the same one of x and y."""
        if scale_in != scale_out:
            self.W_enc *= scale_in / scale_out
            if self.cfg.skip_connection:
                self.W_skip *= scale_in / scale_out
        self.fold_input_scale(scale_out)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of inputs `scale * x` into the same SAE of inputs x, decoder rows unchanged.

        With unit decoder rows the code scales with the input, so only the biases (and thresholds) are divided.
        """
        self.b_enc /= scale
        self.b_dec /= scale

    @torch.no_grad()
    def fold_linear(self, matrix: Tensor, mean: Tensor) -> None:
        """Turn an SAE of inputs and outputs z = matrix (x - mean) into the same SAE of x: matrix [D, D], mean [D].

        The code stays what it is, to the rounding; decoder rows come to have any length.
        Raises SteersmanError where input and output are not the same, or where `b_dec` is not taken off the input.
        """
        if self.cfg.transcoder or self.cfg.skip_connection or not self.cfg.apply_b_dec_to_input:
            raise SteersmanError("only an SAE that takes b_dec off its input has one linear map of input and output")
        forth = matrix.double()
        back = torch.linalg.inv(forth)
        for start in range(0, len(self.W_dec), _ROWS_AT_ONCE):
            block = slice(start, start + _ROWS_AT_ONCE)
            self.W_enc[:, block] = (forth.T @ self.W_enc[:, block].double()).to(self.W_enc)
            self.W_dec[block] = (self.W_dec[block].double() @ back.T).to(self.W_dec)
        self.b_dec.copy_(mean.double() + back @ self.b_dec.double())

    def check_feature(self, feature: int) -> None:
        """Raise a SteersmanError unless `feature` is an id of this SAE."""
        if not 0 <= feature < self.cfg.d_sae:
            raise SteersmanError(f"feature {feature} is out of range: this SAE has features 0 to {self.cfg.d_sae - 1}")

    def is_dead(self, feature: int) -> bool:
        """Whether the feature never fired on the tokens its statistics were taken from."""
        self.check_feature(feature)
        if self.feature_stats is None:
            raise SteersmanError("this SAE carries no feature statistics; run `steersman features` on it first")
        return float(self.feature_stats.density[feature]) <= 0 and float(self.feature_stats.max_act[feature]) <= 0

    def weights(self) -> dict[str, Tensor]:
        """What files hold of it, by name: all parameters and buffers."""
        return self.state_dict()

    if TYPE_CHECKING:  # the package's __init__ puts them here: `formats` builds on this module

        def save(self, path: str | Path) -> None: ...

        @staticmethod
        def load(
            path: str | Path,
            device: str | torch.device = "cpu",
            *,
            format: str | None = None,
            dtype: torch.dtype = torch.float32,
        ) -> SAE: ...
