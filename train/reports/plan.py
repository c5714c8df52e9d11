"""What a training run needs of a machine: bytes of memory per rank, bytes sent per step, and the time of a step.

The memory and network tables are those of this code, item by item; tests compare the network table with what the
sockets carry, and `scripts/dev/check_plan.py` compares the memory table with the peak of a process. What an
architecture's parameters are is asked of its SAE, made without memory. The time is a sum of work divided by rates, with
nothing overlapped: an estimate that is too high rather than too low.

Shape letters: N tokens of a replica's batch, L latents of a rank, D width of what is read, D_out of what is predicted,
K active latents a token, n latent ranks, d replicas.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from steersman.config import check_types
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.files import format_bytes
from steersman.html import card
from steersman.kernels.torch_ops import BLOCK_BYTES, CODE_BYTES
from steersman.kernels.update import PART
from steersman.parallel import Mesh
from steersman.sae import SAE, SAEConfig, Side
from steersman.train.run.recipe import TrainConfig

FP32 = 4
_ADAM_BYTES = 28
"""Bytes that Adam moves a parameter: gradient, weight and two moments read, weight and two moments written."""

_LIBRARIES = 16 << 20
"""What matrix libraries and their threads keep beside the tensors, as measured on the CPU."""
_FULLEST, _DENSE = 10, 3
"""Of an architecture without k: the candidates of the fullest row, for each feature that is active on average; and how
many times the dense code exists while they are found. As measured."""
_ROW_INFO = 40
"""Bytes that the first model rank sends a row to say which it is and who has it."""


@renamed_fields(activation="architecture")
@renamed_fields(batch="batch_size")
@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """See what a training run needs: memory per rank by item, network per step, and the time of a step."""

    d_in: int
    """Width of the activations; of several hook points that are read side by side the sum."""
    d_sae: int
    """Number of features."""
    k: int
    """Active features a token; of jumprelu the target."""
    d_out: int | None = None
    """Width of what a transcoder predicts; None: an SAE."""
    skip_connection: bool = False
    """Whether a transcoder has a linear part beside."""
    whiten: bool = False
    """Whether rows are whitened."""
    batch_size: int = 4096
    """Rows a step, over all ranks."""
    ranks: int = 1
    """Processes, one for each accelerator."""
    latent_shards: int | None = None
    """How many ranks share the latents; None: all of them."""
    model_ranks: int = 0
    """Processes beside these that run the model and send them its activations."""
    architecture: str = "topk"
    """The SAE's architecture: the name of one of `SAE.architectures`."""
    matryoshka_widths: tuple[int, ...] = ()
    """Of a Matryoshka SAE: the widths of the nested SAEs; none given: those that `TrainConfig` has then."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the activations in the store."""
    k_aux: int | None = None
    """Dead features a token that AuxK may use; None: d_in / 2."""
    dead: int = 0
    """Dead features to assume. With any, AuxK costs a second reconstruction."""
    ema: bool = False
    """Whether a moving average of the weights is kept."""
    fused: bool = False
    """Whether gradients, optimiser and normalisation are one pass, as on GPUs: without dense gradients, with a copy of
    the weights in bf16."""
    cuda_graph: bool = False
    """Whether steps are replayed as CUDA graphs, whose memory stays beside that of other steps. Needs `fused` and one
    rank."""
    flops: float = 4e14
    """Floating-point operations a second of one rank's matrix products."""
    memory_bandwidth: float = 2.5e12
    """Bytes a second of one rank's memory."""
    network_bandwidth: float = 5e10
    """Bytes a second that one rank can send."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("d_in", "d_sae", "k", "batch_size", "ranks", "flops", "memory_bandwidth", "network_bandwidth"):
            if getattr(self, name) <= 0:
                raise SteersmanError(f"{name} = {getattr(self, name)} must be above 0")
        if self.cuda_graph and not (self.fused and self.ranks == 1):
            raise SteersmanError("cuda_graph=True needs fused=True and ranks=1")
        if self.model_ranks < 0:
            raise SteersmanError(f"model_ranks = {self.model_ranks} must be at least 0")
        if self.k > self.d_sae:
            raise SteersmanError(f"k = {self.k} must be at most d_sae = {self.d_sae}")
        if self.d_out is None and self.skip_connection:
            raise SteersmanError("skip_connection is a transcoder's: give d_out")
        if self.d_out is not None and self.whiten:
            raise SteersmanError("whiten is for SAEs: a transcoder has two kinds of rows")
        if self.fused and self.out_width != self.d_in:
            raise SteersmanError(
                f"the fused update trains transcoders of equal widths, not {self.d_in} and {self.d_out}"
            )
        if self.matryoshka_widths:
            self._training()  # which has the rules

    @property
    def out_width(self) -> int:
        """Width of what is predicted."""
        return self.d_in if self.d_out is None else self.d_out

    @cached_property
    def sizes(self) -> "Sizes":
        """How many numbers the SAE's tensors have, as it is in training."""
        training, half = self._training(), self.d_in // 2
        sides = (Side(hook_name="a", width=half), Side(hook_name="b", width=self.d_in - half))
        cfg = SAEConfig(
            d_in=self.d_in,
            d_sae=self.d_sae,
            k=training.k,
            architecture=self.architecture,
            transcoder=self.d_out is not None,
            apply_b_dec_to_input=self.d_out is None,
            d_out=self.d_out,
            skip_connection=self.skip_connection,
            group_sizes=training.group_sizes,
            sides=sides if SAE.architectures[self.architecture].side_by_side else (),
        )
        with torch.device("meta"):
            sae = SAE(cfg)
            sae.prepare_training(training)
        return Sizes.of(sae)

    def _training(self) -> TrainConfig:
        by_target = SAE.architectures[self.architecture].target_l0 == "required"
        sparsity: dict[str, Any] = {"target_l0": float(self.k)} if by_target else {"k": self.k}
        sparsity["matryoshka_widths"] = self.matryoshka_widths
        return TrainConfig(d_sae=self.d_sae, architecture=self.architecture, **sparsity)

    @property
    def n_prefixes(self) -> int:
        """Reconstructions of a step: one, or of a Matryoshka SAE one for each nested SAE."""
        return len(self._training().group_sizes) if SAE.architectures[self.architecture].uses_groups else 1


class Sizes(NamedTuple):
    """How many numbers the tensors of an SAE have."""

    a_latent: int
    """Of the parameters that belong to latents, those of one."""
    shared: int
    """Of those that do not."""
    buffers: int
    """Of what is not trained, all of it."""
    largest: int
    """Of the largest tensor, those of a latent."""

    @classmethod
    def of(cls, sae: SAE) -> "Sizes":
        """Those of an SAE, which may be on the meta device."""
        of_latents = {name: p for name, p in sae.named_parameters() if sae.latent_dim(name) is not None}
        shared = sum(p.numel() for name, p in sae.named_parameters() if name not in of_latents)
        d_sae = sae.cfg.d_sae
        return cls(
            a_latent=sum(p.numel() for p in of_latents.values()) // d_sae,
            shared=shared,
            buffers=sum(value.numel() for value in sae.buffers()),
            largest=max(p.numel() for p in of_latents.values()) // d_sae,
        )


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The three tables, each item with its bytes or seconds, for one rank."""

    mesh: Mesh
    memory: dict[str, float] = field(default_factory=dict)
    """Bytes held at the moment of the step that needs most."""
    checkpoint: float = 0.0
    """Bytes of host memory while a checkpoint is written; on GPUs the copy of the state is kept for the next."""
    network: dict[str, float] = field(default_factory=dict)
    """Bytes sent per step."""
    from_model: float = 0.0
    """Bytes sent per step by the first of the ranks that run the model; the others send a little less."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per step."""

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def network_bytes(self) -> float:
        return sum(self.network.values())

    def _repr_html_(self) -> str:
        return card("RunPlan", text=self.to_text())

    def to_text(self) -> str:
        """The tables as lines."""
        mesh = self.mesh
        lines = [f"mesh: {mesh.data} data x {mesh.latent} latent ranks", "memory per rank:"]
        lines += [f"  {name:<28}{_bytes(n):>12}" for name, n in self.memory.items()]
        lines += [f"  {'together':<28}{_bytes(self.memory_bytes):>12}"]
        lines += [f"  {'host, during a checkpoint':<28}{_bytes(self.checkpoint):>12}", "sent per step and rank:"]
        lines += [f"  {name:<28}{_bytes(n):>12}" for name, n in self.network.items()]
        lines += [
            f"  {'together':<28}{_bytes(self.network_bytes):>12}",
            *self._streamed(),
            "time per step, nothing overlapped:",
        ]
        lines += [f"  {name:<28}{1e3 * t:>9.3g} ms" for name, t in self.seconds.items()]
        return "\n".join([*lines, f"  {'together':<28}{1e3 * sum(self.seconds.values()):>9.3g} ms"])

    def _streamed(self) -> list[str]:
        return [f"sent per step by a model rank:{_bytes(self.from_model):>12}"] if self.from_model else []


def _bytes(n: float) -> str:
    return format_bytes(n, digits=4)


def plan_run(config: PlanConfig) -> RunPlan:
    """The tables of `config`. Raises a SteersmanError, naming sizes that fit, when the mesh does not divide evenly.

    >>> plan = plan_run(PlanConfig(d_in=4096, d_sae=131072, k=64, batch_size=8192, ranks=8))
    >>> round(plan.memory["weights"] / 1e6), round(plan.network["reconstruction"] / 1e6)
    (537, 235)
    """
    mesh = Mesh.over(config.ranks, d_sae=config.d_sae, batch_size=config.batch_size, latent=config.latent_shards)
    memory, network = _memory(config, mesh), _network(config, mesh)
    sizes = config.sizes
    owned = (config.d_sae // mesh.world_size * sizes.a_latent + sizes.shared) * FP32
    checkpoint = owned * (3 + config.ema) + config.d_sae // mesh.world_size * sizes.largest * FP32
    checkpoint += config.d_in**2 * FP32 if config.whiten else 0
    return RunPlan(
        mesh=mesh,
        memory=memory,
        checkpoint=checkpoint,
        network=network,
        from_model=config.batch_size * (config.d_in * _item(config) / config.model_ranks + _ROW_INFO)
        if config.model_ranks
        else 0,
        seconds=_seconds(config, mesh, sum(network.values())),
    )


def _memory(c: PlanConfig, mesh: Mesh) -> dict[str, float]:
    N, D, D_out, L = c.batch_size // mesh.data, c.d_in, c.out_width, c.d_sae // mesh.latent
    sizes, transcoder, by_k = c.sizes, c.d_out is not None, SAE.architectures[c.architecture].uses_k
    matrix = L * sizes.largest * FP32
    held = (L * sizes.a_latent + sizes.shared) * FP32
    owned = (L * sizes.a_latent / mesh.data + sizes.shared) * FP32
    P = min(c.k if by_k else _FULLEST * c.k, L)
    dense = min(BLOCK_BYTES, N * L * FP32) if by_k else _DENSE * min(CODE_BYTES, N * L * FP32)
    selection = mesh.latent * N * P * (2 * FP32 + 8 + FP32 + 1) if mesh.latent > 1 else 0
    held_throughout = {
        "weights": held,
        "weights in bf16": 2 * L * D * 2 if c.fused else 0,
        "optimiser state": 2 * owned,
        "moving average": owned if c.ema else 0,
        "counters": (L * 2 + sizes.buffers) * FP32,
        "whitening": D * D * FP32 if c.whiten else 0,
        "libraries": _LIBRARIES,
    }
    code = {"code and its order": N * P * (FP32 + 4 + 3 * 8 + 2 * FP32), "selection over ranks": selection}
    gradients = held + (owned if mesh.data > 1 else 0)
    nested = {}
    if c.n_prefixes > 1:  # the residual of each and, where they are not made a few tokens at a time, what each adds
        n_tables = 2 if c.fused or mesh.latent > 1 else 1
        nested = {"residuals of the nested SAEs": n_tables * c.n_prefixes * N * D_out * FP32}
    row = D + D_out if transcoder else D
    read_ahead = 2 * N * row * _item(c)
    moments = [
        # The encoder: the scaled batch and its centred copy, or what is predicted.
        {
            "batch": read_ahead + N * (D + D_out) * FP32,
            "encoder in bf16": 0 if c.fused else L * D * 2,
            "pre-activations": dense,
            **code,
        },
        # The gradients: the reconstruction and the residual come to the batch.
        {"gradients": held, "batch": read_ahead + N * (D + (3 + c.skip_connection) * D_out) * FP32, **code, **nested},
        # The update: one matrix at a time is projected (one process) or received from the replicas.
        {"gradients": gradients, "update, exchange": matrix, "batch": read_ahead + N * row * FP32, **code},
    ]
    if c.fused:  # the gradients: the residual and the centred batch, in bf16, come to the scaled batch
        moments[1:] = [{"batch": read_ahead + N * D * (FP32 * (1 + transcoder) + 2 * 2), **code, **nested}]
    most = max(moments, key=lambda moment: sum(moment.values()))
    if c.cuda_graph:  # they read a batch of their own
        held_throughout["memory of the graphs"] = sum(most.values()) - read_ahead + N * D * _item(c)
    items = held_throughout | most
    return {name: n for name, n in items.items() if n}


def _item(c: PlanConfig) -> int:
    return FP32 if c.store_dtype == "float32" else 2


def _network(c: PlanConfig, mesh: Mesh) -> dict[str, float]:
    """Bytes that one rank sends in a step, by ring algorithms: an all-reduce of S bytes over n ranks sends
    2 (n - 1) / n S, an all-gather of S from each rank (n - 1) S, a reduce-scatter of S (n - 1) / n S."""
    n, d = mesh.latent, mesh.data
    N, D, D_out, L = c.batch_size // d, c.d_in, c.out_width, c.d_sae // n
    sizes = c.sizes
    reduce_n, reduce_d = 2 * (n - 1) / n, 2 * (d - 1) / d
    P = min(c.k, L)
    k_aux = c.k_aux if c.k_aux is not None else max(1, D // 2)
    # The fused update gathers what each PART latents add to it, the others sum it.
    bias = (n - 1) * -(-L // PART) * D * FP32 if c.fused else reduce_n * D * FP32
    bias = bias if c.d_out is None else 0  # a transcoder's is of its output alone
    items = {
        "batch": (n - 1) / n * N * (D if c.d_out is None else D + D_out) * _item(c),
        "reconstruction": c.n_prefixes * reduce_n * N * D_out * FP32,
        "bias gradient, dead counts": bias + (n - 1) * 2 * 4,
        "gradients": (d - 1) / d * L * sizes.a_latent * FP32 + reduce_d * sizes.shared * FP32,
        "weights": (d - 1) / d * L * sizes.a_latent * FP32,
        "silence counters": reduce_d * L,
    }
    kind = SAE.architectures[c.architecture]
    if kind.exact_k:
        items["proposals"] = (n - 1) * N * P * FP32
    if kind.whole_batch and kind.uses_k:
        counts = 2 * 65536 * FP32
        items["selection by counting"] = (reduce_n + reduce_d) * (counts + FP32) + (n - 1) * N * FP32 + (d - 1) * FP32
    if c.dead:
        items["AuxK reconstruction"] = c.n_prefixes * reduce_n * N * D_out * FP32
        if c.dead > k_aux:
            items["AuxK proposals"] = (n - 1) * N * min(k_aux, -(-c.dead // n)) * FP32
    return {name: size for name, size in items.items() if size}


def _seconds(c: PlanConfig, mesh: Mesh, sent: float) -> dict[str, float]:
    N, D, D_out, L = c.batch_size // mesh.data, c.d_in, c.out_width, c.d_sae // mesh.latent
    pairs = N * min(c.k, L) / mesh.latent + N  # active here on average
    linear = 2 * N * D * D if c.whiten else 6 * N * D * D_out if c.skip_connection else 0
    items = {
        "encode": 2 * N * L * D / c.flops,
        "whitening" if c.whiten else "skip connection": linear / c.flops,
        "decode and gradients": 2 * pairs * (D + D_out) * FP32 / c.memory_bandwidth,
        "gradients written, projected": 2.5 * L * (D + D_out) * FP32 / c.memory_bandwidth,
        "update": _ADAM_BYTES * (L * c.sizes.a_latent / mesh.data + c.sizes.shared) / c.memory_bandwidth,
        "network": sent / c.network_bandwidth,
    }
    return {name: seconds for name, seconds in items.items() if seconds or name == "network"}
