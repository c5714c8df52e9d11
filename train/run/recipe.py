"""Training settings and the recipe that fills in those left open.

The defaults come from sweeps on real and planted data (`scripts/bench/recipe.py` repeats them). Three rules matter:

- Many steps beat large batches on short runs, so the batch grows with the number of tokens.
- An Adam step moves every weight by about the learning rate, and the weights of a unit row are about 1/sqrt(d_in), so
  the rate goes with 1/sqrt(d_in); it falls with the cube root of the number of steps. Architectures that find more at
  another one say so (`SAE.rate`).
- The last quarter of the run decays to zero, which is where the squared error falls most.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

from steersman.config import check_types, setting
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.kernels import Implementation, RuleName, StateDtype
from steersman.sae import SAE
from steersman.train.run.frozen import Frozen
from steersman.train.store.statistics import LARGE_NORM_RATIO


@renamed_fields(activation="architecture")
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train an SAE. Every field left at None is filled in by `resolve`.

    Settings that say only how a run is computed, kept or reported (device, kernels, logging, checkpoints, layout) may
    change when it is resumed. On another device or with other kernels it resumes from the same weights, but no longer
    gives the bits of the run that was not moved.

    >>> TrainConfig(d_sae=4096, k=32).architecture
    'topk'
    """

    d_sae: int
    """Number of features."""
    k: int = 0
    """Active features a token: exactly (topk, abs_topk, matryoshka_topk), on average (batch_topk, matryoshka), or not
    used."""
    architecture: str = "topk"
    """The SAE's architecture: the name of one of `SAE.architectures` that is trainable."""
    target_l0: float | None = None
    """How many features are to be active a token, on average over the batch, where that is no fixed number: jumprelu
    needs it; relu and gated then find the coefficient of their penalty by themselves."""
    matryoshka_widths: tuple[int, ...] = ()
    """Of a Matryoshka SAE: the widths of the nested SAEs, rising, the last of them d_sae. None given: 1/32, 3/32, 7/32,
    15/32 and all of d_sae, groups that double from 1/32 on (arXiv 2503.17547)."""
    hook_out: str | None = None
    """Hook point of the store that is to be predicted, which makes it a transcoder; None: the activations that are
    read."""
    skip_connection: bool = False
    """Whether a transcoder's output also has a linear part, `W_skip x` of the input as it came (arXiv 2501.18823)."""
    tokens: int | None = None
    """Rows to train on, passing over the store as often as that takes; None is one pass."""
    batch_size: int | None = None
    """Rows a step; None: a power of two between 512 and 4096 that leaves about 1000 steps."""
    lr: float | None = None
    """Peak learning rate of Adam for the weights; None: 0.05 / sqrt(d_in) * (1000 / steps)^(1/3), half of it where the
    architecture says so (matryoshka, jumprelu), and a fifth of that with `init`."""
    bias_lr_ratio: float = 3.0
    """Learning rate of the biases, in units of `lr`; a transcoder's have a tenth of it."""
    warmup: float = 0.02
    """Fraction of the steps over which the learning rate rises from 0."""
    decay: float = 0.25
    """Fraction of the steps, at the end, over which the learning rate falls to 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the optimiser's moments; Signum uses the first. What Adam adds to the root of the second moment
    follows from the size of a batch: see `adam_eps`."""
    optimizer: RuleName = "adam"
    """How gradients move the weights: adam, or signum (the sign of the first moment, half the state). Both move every
    feature in every step; adam_touched and signum_touched leave features without a gradient, and their moments, as
    they are, which pays when a batch touches few of them."""
    state_dtype: StateDtype = "float32"
    """What the optimiser's moments of the weights are kept in: float32, or bfloat16 or int8 (blocks of 128 with one
    exponent) with stochastic rounding, for a half or a quarter of the memory."""
    fused_update: bool | None = None
    """Whether gradients, optimiser and normalisation are one pass that never writes a dense gradient; None: where there
    are kernels for it and nothing forbids it (gradient clipping, accumulation, replicated weights). False is autograd
    with dense gradients."""
    frozen: Frozen | None = None
    """What stays random, for a baseline that finds no features (arXiv 2602.14111): the decoder's rows or the encoder's,
    as they begin, or decoder rows that keep a cosine of 0.8 to their first value (soft_decoder). None: nothing."""
    aux_coefficient: float = 0.25
    """Weight of the AuxK loss, which trains dead features on the residual; 0 turns it off."""
    k_aux: int | None = None
    """Dead features a token that AuxK may use; None: d_in / 2."""
    dead_after: int | None = None
    """A feature is dead when it has not fired for this many tokens; None: 1 % of the run, at least 10 steps."""
    grad_clip: float | None = None
    """Largest global gradient norm; None does not clip."""
    grad_accumulation: int = 1
    """Parts a batch is split into, one after the other, to save memory. The step is the same."""
    cuda_graph: bool = setting(False, identity=False)
    """Whether steps are replayed as CUDA graphs, which saves the host's time where steps are short. Needs the fused
    update and an architecture that never waits for the device, as topk."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is saved in their place; 0 saves the weights themselves."""
    max_norm_ratio: float | None = LARGE_NORM_RATIO
    """Rows whose norm is above this many times the median are left out of training, and of the scale of the inputs:
    attention sinks, which can hold most of the variance. Their places in a batch are taken by other rows of it. None
    trains on all rows."""
    heldout_fraction: float = 0.05
    """Fraction of the rows, from the last documents, that is never trained on."""
    seed: int = 0
    """The one source of every random choice: initial weights and order of rows."""
    log_every: int = setting(10, identity=False)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = setting(1000, identity=False)
    """Steps between two checkpoints."""
    keep_checkpoints: int = setting(2, identity=False)
    """Checkpoints kept in the run folder, the newest ones; at least 1."""
    statistics_tokens: int = setting(1_000_000, identity=False)
    """Rows over which the finished SAE's feature statistics are taken, at most."""
    device: str = setting("auto", identity=False)
    """Where to train: auto, cpu, cuda, cuda:1, ..."""
    latent_shards: int | None = setting(None, identity=False)
    """With several processes (torchrun): how many of them share the latents; the rest of the factor are replicas that
    share the batch. None: all of them. Does not change the result, so a run may be resumed with another layout."""
    model_ranks: int = setting(0, identity=False)
    """With several processes and no store: how many of them, the last ones, run the model and send its activations to
    the others, which train. 0: every rank does both. Does not change the result."""
    timeout_seconds: float = setting(600.0, identity=False)
    """With several processes: how long one may be silent before the others end with an error."""
    kernels: Implementation = setting("auto", identity=False)
    """Implementation of the SAE's arithmetic: triton (NVIDIA GPUs), torch, or auto, the faster that the device has."""
    wandb_project: str | None = setting(None, identity=False)
    """Weights & Biases project to log to as well; None does not. A resumed run goes on with its run there."""
    extend: bool = setting(False, identity=False)
    """Whether the run in the folder, finished or not, may go on to more `tokens` than it was made for. It goes back to
    the checkpoint where the learning rate began to fall, which is kept for this, and ends with the same bits as a run
    of the greater length with the first one's rates, batch size and other settings; the rate falls over the same
    fraction of the steps, at the new end. A folder without a run is trained as usual."""
    whiten: Literal["zca", "pca"] | None = None
    """Train on whitened rows, in which all directions vary alike, so that features in directions in which rows vary
    little are found as well; the SAE that is saved reads rows as they are. Squared errors while training, and in
    metrics.jsonl, are those of whitened rows. zca keeps the axes of the rows, pca does not. None: only scale rows."""
    whiten_shrinkage: float | None = None
    """With `whiten`, how far the covariance is shrunk towards that of rows that vary alike in all directions: 0 whitens
    wholly, 1 not at all. None: 0.1."""
    init: str | None = setting(None, identity=False)
    """SAE to start from (fine-tuning), whatever format it is in, of this architecture, width and hook point: a folder,
    file or name. Its weights are part of what the run is. None: random weights."""
    options: dict[str, Any] = setting(default_factory=dict)
    """Settings that the architecture has of its own, by name; those left out are at its defaults."""

    def __post_init__(self) -> None:
        check_types(self)
        kind = SAE.architectures[self.architecture]
        trainable = ", ".join(name for name, one in SAE.architectures.items() if one.trainable)
        checks: list[tuple[bool, str]] = [
            (kind.trainable, f"cannot train {self.architecture!r}; use one of {trainable}"),
            (
                not kind.uses_k or 1 <= self.k <= self.d_sae,
                f"k = {self.k} must lie between 1 and d_sae = {self.d_sae}",
            ),
            *self._checks_of_l0(kind),
            *self._checks_of_widths(kind),
            (
                not self.skip_connection or self.hook_out is not None,
                "skip_connection is of a transcoder: say what it predicts with hook_out",
            ),
            (self.batch_size is None or self.batch_size >= 1, f"batch_size = {self.batch_size} must be at least 1"),
            (self.tokens is None or self.tokens >= 1, f"tokens = {self.tokens} must be at least 1"),
            (self.lr is None or 0 < self.lr < 1, f"lr = {self.lr} must lie between 0 and 1"),
            (0 <= self.warmup <= 1 and 0 <= self.decay <= 1, "warmup and decay are fractions of the run: 0 to 1"),
            (0 <= self.ema < 1, f"ema = {self.ema} must be at least 0 and below 1"),
            (
                self.max_norm_ratio is None or self.max_norm_ratio > 1,
                f"max_norm_ratio = {self.max_norm_ratio} must be above 1, or None",
            ),
            (0 < self.heldout_fraction < 1, f"heldout_fraction = {self.heldout_fraction} must lie between 0 and 1"),
            (self.grad_accumulation >= 1, f"grad_accumulation = {self.grad_accumulation} must be at least 1"),
            (self.model_ranks >= 0, f"model_ranks = {self.model_ranks} must be at least 0"),
            (self.timeout_seconds > 0, f"timeout_seconds = {self.timeout_seconds} must be above 0"),
            (self.keep_checkpoints >= 1, f"keep_checkpoints = {self.keep_checkpoints} must be at least 1"),
            (self.log_every >= 1 and self.checkpoint_every >= 1, "log_every and checkpoint_every must be at least 1"),
            (
                not self.fused_update or self.grad_clip is None,
                "the fused update never has the whole gradient, so it cannot clip its norm: "
                "use fused_update=False or grad_clip=None",
            ),
            (
                not self.fused_update or self.grad_accumulation == 1,
                "the fused update moves the weights as it takes their gradient, so it cannot add up parts of a batch: "
                "use fused_update=False or grad_accumulation=1",
            ),
            (
                self.frozen is None or self.init is None,
                f"frozen={self.frozen} keeps weights as they begin at random, and init begins from an SAE's: use one",
            ),
            (
                not self.fused_update or self.frozen is None,
                f"the fused update moves all weights, and frozen={self.frozen} keeps some: use fused_update=False",
            ),
            (
                not self.fused_update or kind.fused,
                f"{self.architecture} has a loss of its own: use fused_update=False",
            ),
            (
                not kind.side_by_side or self.hook_out is None,
                f"{self.architecture} writes the activations that it reads: hook_out is for transcoders",
            ),
            (
                not kind.side_by_side or (self.whiten is None and self.init is None),
                f"{self.architecture} scales each hook point by itself: whiten and init are for SAEs of one",
            ),
            (
                not kind.whole_batch or self.grad_accumulation == 1,
                f"{self.architecture} selects over the whole batch: use grad_accumulation=1 and a smaller batch_size",
            ),
        ]
        checks += [
            (
                self.whiten is None or self.init is None,
                "init starts from decoder rows of one length, which whitening changes: use whiten or init",
            ),
            (self.whiten is None or self.hook_out is None, "whiten is for SAEs: a transcoder has two kinds of rows"),
            (self.whiten_shrinkage is None or bool(self.whiten), "whiten_shrinkage is a setting of whiten: give both"),
            (
                self.whiten_shrinkage is None or 0 <= self.whiten_shrinkage < 1,
                f"whiten_shrinkage = {self.whiten_shrinkage} must be at least 0 and below 1",
            ),
        ]
        for ok, message in checks:
            if not ok:
                raise SteersmanError(message)

    def _checks_of_l0(self, kind: type[SAE]) -> list[tuple[bool, str]]:
        target, required = self.target_l0, kind.target_l0 == "required"
        return [
            (
                target is not None or not required,
                f"{self.architecture} needs target_l0: how many features are to be active a token, on average",
            ),
            (not (required and self.k), f"{self.architecture} reads no k: target_l0 says how many features are active"),
            (
                target is None or bool(kind.target_l0),
                f"{self.architecture} does not read target_l0" + (": it has k" if kind.uses_k else ""),
            ),
            (
                target is None or 0 < target <= self.d_sae,
                f"target_l0 = {target} must lie above 0 and be at most d_sae = {self.d_sae}",
            ),
        ]

    def _checks_of_widths(self, kind: type[SAE]) -> list[tuple[bool, str]]:
        widths, nested = self.matryoshka_widths, [n for n, one in SAE.architectures.items() if one.uses_groups]
        return [
            (
                kind.uses_groups or not widths,
                f"matryoshka_widths belong to architecture {' or '.join(nested)}, not to {self.architecture!r}",
            ),
            (
                not widths or _rises_to(widths, self.d_sae),
                f"matryoshka_widths = {list(widths)} must rise and end at d_sae = {self.d_sae}, such as "
                f"{' '.join(map(str, nested_widths(self.d_sae)))}",
            ),
        ]

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many features each group of a Matryoshka SAE adds; none of another architecture."""
        if not SAE.architectures[self.architecture].uses_groups:
            return ()
        ends = self.matryoshka_widths or nested_widths(self.d_sae)
        return tuple(end - start for start, end in pairwise((0, *ends)))

    def record(self) -> dict[str, Any]:
        """The settings as files hold them: under the names that they always had, without those of the layout."""
        return {
            _ON_DISK.get(name, name): value
            for name, value in asdict(self).items()
            if name not in _UNRECORDED and (name not in _RECORDED_IF_SET or _is_set(value))
        }

    @classmethod
    def of_run(cls, training: Mapping[str, Any]) -> "TrainConfig":
        """The settings of a finished run from what its SAE's metadata says of its `training`: those that decide what it
        is, with the sizes and rates that it used in place of what was left open.

        Raises SteersmanError for what is no such record.
        """
        ours = {theirs: name for name, theirs in _ON_DISK.items()}
        named = {ours.get(name, name): value for name, value in training.items()}
        known = {field.name for field in fields(cls)} - _NO_IDENTITY
        settings: dict[str, Any] = {"max_norm_ratio": None}
        settings |= {name: tuple(v) if isinstance(v, list) else v for name, v in named.items() if name in known}
        try:
            batch_size = named["batch_size"]
            settings |= {"tokens": named["n_steps"] * batch_size, "dead_after": named["dead_after_steps"] * batch_size}
            return cls(**settings)
        except (KeyError, TypeError) as error:
            raise SteersmanError(f"what this SAE says of its training is no record of a run: {error}") from error


def nested_widths(d_sae: int) -> tuple[int, ...]:
    """The widths of the nested SAEs where none are given.

    >>> nested_widths(65536)
    (2048, 6144, 14336, 30720, 65536)
    """
    return tuple(sorted({max(1, d_sae * part // 32) for part in (1, 3, 7, 15, 32)}))


def _rises_to(widths: tuple[int, ...], d_sae: int) -> bool:
    return widths[-1] == d_sae and all(low < high for low, high in pairwise((0, *widths)))


_ON_DISK = {"architecture": "activation"}
"""Fields that files know by another name."""
_RECORDED_IF_SET = (
    "options",
    "hook_out",
    "target_l0",
    "frozen",
    "whiten",
    "whiten_shrinkage",
    "init",
    "matryoshka_widths",
    "skip_connection",
)
_UNRECORDED = ("latent_shards", "model_ranks", "timeout_seconds", "extend")
_NO_IDENTITY = {field.name for field in fields(TrainConfig) if not field.metadata.get("identity", True)}


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ((), {}, "")


def identity_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's record says that must be the same to resume it."""
    training = {name: value for name, value in record["training"].items() if name not in _NO_IDENTITY}
    return {**record, "training": {"max_norm_ratio": None} | training}


def as_recorded(config: TrainConfig, record: Mapping[str, Any]) -> TrainConfig:
    """The settings with which the run of this record (empty: a new one) goes on. One that began before rows of huge
    norm were left out keeps them; another `max_norm_ratio` than the default is refused there like any change."""
    training = record.get("training")
    begun_before = isinstance(training, dict) and "max_norm_ratio" not in training
    default = config.max_norm_ratio == LARGE_NORM_RATIO
    return replace(config, max_norm_ratio=None) if begun_before and default else config


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The resolved schedule of one run: counts are steps unless named otherwise."""

    batch_size: int
    n_steps: int
    lr: float
    warmup_steps: int
    decay_steps: int
    k_aux: int
    dead_after_steps: int

    def lr_factor(self, step: int) -> float:
        """The learning rate of `step` (from 0) as a fraction of the peak: linear up, flat, linear down."""
        up = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        down = (self.n_steps - step) / self.decay_steps if self.decay_steps else 1.0
        return min(1.0, up, down)

    @property
    def decay_start(self) -> int:
        """How many steps are done when the learning rate begins to fall: until then, nothing depends on `n_steps`."""
        return self.n_steps - self.decay_steps

    def of_length(self, n_steps: int, decay: float) -> "Recipe":
        """The same with more steps, of which the fraction `decay` at the end is that in which the rate falls."""
        return replace(self, n_steps=n_steps, decay_steps=round(decay * n_steps))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str | os.PathLike[str]) -> "Recipe":
        """The schedule that a file holds; SteersmanError, naming `where` it stands, for anything else."""
        try:
            recipe = cls(**record)
        except TypeError:
            recipe = None
        if recipe is None or not all(_is_count(name, value) for name, value in asdict(recipe).items()):
            raise SteersmanError(f"{where}: its recipe is not the schedule of a run")
        return recipe


def _is_count(name: str, value: Any) -> bool:
    if name == "lr":
        return isinstance(value, int | float) and 0 < value < math.inf
    return isinstance(value, int) and not isinstance(value, bool) and value >= (name in ("batch_size", "n_steps"))


def adam_eps(n_values: int) -> float:
    """What Adam adds to the root of its second moment (arXiv 1412.6980, alg. 1) in a run whose batches hold `n_values`
    numbers, rows x width.

    The loss is a mean over them, so gradients fall as 1 / n_values. Up to 2^20 numbers this is the 1e-8 that is usual;
    beyond, it falls with the gradients, which it would damp else.

    >>> adam_eps(4096 * 256), adam_eps(8192 * 4096)
    (1e-08, 3.125e-10)
    """
    return 1e-8 * min(1.0, 2**20 / n_values)


FINE_TUNING = 0.2
"""What the learning rate left open is multiplied by where a run starts from an SAE that is there."""


def tokens_of(config: TrainConfig, n_rows: int | None) -> int:
    """How many rows a run takes, where there are `n_rows` to train on (None: endless)."""
    tokens = config.tokens if config.tokens is not None else n_rows
    if tokens is None:
        raise SteersmanError("an endless stream of activations needs --tokens: how many to train on")
    if tokens == 0 or n_rows == 0:
        raise SteersmanError("no rows are left to train on beside those that are held out: give more text")
    return tokens


def _share_of_rate(config: TrainConfig) -> float:
    """The learning rate that is chosen where none is given, in units of that of a TopK SAE from random weights."""
    return SAE.architectures[config.architecture].rate * (FINE_TUNING if config.init else 1)


def resolve(config: TrainConfig, d_in: int, n_rows: int | None) -> Recipe:
    """Fill in what `config` leaves open for activations of width d_in and `n_rows` rows to train on (None: endless).

    >>> recipe = resolve(TrainConfig(d_sae=4096, k=32), d_in=64, n_rows=1_000_000)
    >>> recipe.batch_size, recipe.n_steps, round(recipe.lr, 4)
    (1024, 976, 0.0063)
    """
    tokens = tokens_of(config, n_rows)
    batch_size = config.batch_size or min(4096, max(512, 1 << round(math.log2(max(1, tokens / 1000)))))
    batch_size = min(batch_size, tokens) if n_rows is None else min(batch_size, tokens, n_rows)
    n_steps = tokens // batch_size
    if batch_size < config.grad_accumulation:
        raise SteersmanError(f"a batch of {batch_size} rows cannot be split into {config.grad_accumulation} parts")
    lr = config.lr if config.lr is not None else 0.05 / math.sqrt(d_in) * (1000 / n_steps) ** (1 / 3)
    dead_after = config.dead_after if config.dead_after is not None else max(n_steps // 100, 10) * batch_size
    return Recipe(
        batch_size=batch_size,
        n_steps=n_steps,
        lr=lr if config.lr is not None else min(lr, 0.05 / math.sqrt(d_in) * 2) * _share_of_rate(config),
        warmup_steps=round(config.warmup * n_steps),
        decay_steps=round(config.decay * n_steps),
        k_aux=config.k_aux if config.k_aux is not None else max(1, d_in // 2),
        dead_after_steps=max(1, math.ceil(dead_after / batch_size)),
    )
