"""What the kernels should cost: operations, bytes and, on a given GPU, milliseconds.

Bytes count each operand once where it is shared through the cache, and gathered rows as often as they are gathered.
Instructions are counted in the machine code (`compiled.compile_job`), as cycles of one of a multiprocessor's four
schedulers; compares, selects, maxima and integer logic (FSETP, FMNMX, SEL, ISETP, LOP3) take two, since 16 lanes of a
scheduler do them, everything else one. A part's time is the larger of arithmetic and traffic plus what neither
overlaps: epilogues, selections, launches. Rates are what large products and copies reach, not peaks. All of it is
prediction, to explain measurements and to choose between designs, but for `ISSUED`, which is measured. Measurements
stand beside the predictions in `docs/gpu.md`.

Shape letters: N tokens, L latents, D width, K active latents a token, A candidates of the AuxK loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from steersman.kernels import tiles

Parts = dict[str, float]
"""Milliseconds by the name of a part of a training step."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The rates that bound a kernel."""

    name: str
    tflops: float
    """What a large bf16 product of the vendor's library reaches, in 10^12 operations a second."""
    bandwidth: float
    """What a copy in device memory reaches, in 10^12 bytes a second."""
    cache: float
    """What gathers of rows that mostly lie in the second-level cache reach, in 10^12 bytes a second."""
    processors: int
    """Multiprocessors."""
    ghz: float
    """Clock under the load of a large product."""
    launch_ms: float = 0.004
    """Between the end of a kernel and the work of the next."""


ISSUED = 1.0
"""Instructions a nanosecond that a scheduler issues for `triton_update.update_rows`. On an H200, its time and the count
of its instructions gave 0.9 to 1.25 at the shapes of `SHAPES`, with moments in fp32 and in 8 bits."""

H100 = Gpu(name="H100 SXM", tflops=720.0, bandwidth=3.0, cache=3.6, processors=132, ghz=1.4)
H200 = Gpu(name="H200", tflops=720.0, bandwidth=4.3, cache=3.6, processors=132, ghz=1.4)
A100 = Gpu(name="A100 80GB", tflops=250.0, bandwidth=1.75, cache=2.5, processors=108, ghz=1.3)


def taken(shape: tiles.Shape, reached: int, n: int) -> float:
    """The share of groups of n values in which a candidate is found, for latents in no particular order, when tau is
    the K-th largest of the `reached` latents before the wave.

    >>> round(taken((8192, 131072, 4096, 64), 39168, 256), 2)
    0.34
    """
    return 1 - (1 - shape[3] / reached) ** n


def epilogue_cycles(shape: tiles.Shape, tile: tiles.Tile, reached: int) -> float:
    """Cycles that a multiprocessor's epilogue of one tile takes in the mode FILTER: what every tile needs, then groups
    of a warp's values that have candidates, then places that have some, each with one of 32 threads' values."""
    warps = tile.warps / 4  # of each scheduler
    values = tile.BM * tile.BN / (32 * tile.warps)  # a thread's; the counts below are those of 128
    places = 20 * values * taken(shape, reached, 32)
    if tile.persistent:
        groups = 86 * values / 8 * taken(shape, reached, 8 * 32)
        return warps * (640 * values / 128 + groups + places) + 1400  # and an atomic
    groups = 25 * values / 4 * taken(shape, reached, 4 * 32)
    return warps * (1414 * values / 128 + groups + places) + 2500  # and barriers, an atomic


@dataclass(frozen=True, kw_only=True)
class Design:
    """What of the kernels decides their cost: numbers read from their machine code and from their loads and stores."""

    serial: float = 1.0
    """Time of the encoder's main loop over that of one whose products overlap with the next ones' loads."""
    epilogue: Callable[[tiles.Shape, tiles.Tile, int], float] = epilogue_cycles
    """Cycles of an epilogue (see `epilogue_cycles`)."""
    tighten: float
    """Cycles of a scheduler that `triton_select.tighten_kernel` takes for a row of 1024 slots, of which all are in use
    after the first wave and a quarter after the others: the mean."""
    prepare_bytes: float
    """Bytes that are moved for each element of x [N, D] before and after the encoder."""
    gather: float
    """Time of decode's gathers over that of as many bytes copied."""
    sums_apart: bool
    """Whether the gradients of the values and of b_dec are passes of their own over rows of the weights."""
    update_bytes: dict[str, float]
    """Bytes a pair of an entry of W_enc and one of W_dec that the update moves, by what the moments are kept in."""
    update_instructions: dict[str, float] = field(default_factory=dict)
    """Instructions of the update for a latent and 128 columns of both matrices, with no more pairs than are read
    together, by what the moments are kept in; none: not counted."""
    pair_instructions: float = 0.0
    """Those of each further `triton_update.PAIRS` pairs."""
    launches: int
    """Kernels of a step beside those counted by name."""
    aux_always: bool = False
    """Whether AuxK is computed where nothing is dead."""


SHIPPED = Design(
    tighten=3500.0,
    prepare_bytes=8.0,
    gather=1.0,
    sums_apart=False,
    update_bytes={"float32": 52.0, "bfloat16": 36.0, "int8": 28.3},
    update_instructions={"float32": 860.0, "bfloat16": 1030.0, "int8": 1310.0},
    pair_instructions=260.0,
    launches=22,
)
"""The kernels of this package."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations and traffic of one call."""

    flops: float
    bytes: float
    extra_ms: float = 0.0
    """What neither explains: epilogues, selections, launches."""

    def ms(self, gpu: Gpu) -> float:
        """Expected milliseconds."""
        return max(self.flops / (gpu.tflops * 1e9), self.bytes / (gpu.bandwidth * 1e9)) + self.extra_ms


def gemm(shape: tiles.Shape, item: int = 2) -> Cost:
    """The bare product of the encoder, its N x L result written in `item` bytes an element."""
    N, L, D, _ = shape
    return Cost(flops=2.0 * N * L * D, bytes=item * (N * D + L * D + N * L))


# --- encode ---


def collect(shape: tiles.Shape, tile: tiles.Tile, gpu: Gpu, design: Design = SHIPPED, item: int = 2) -> Cost:
    """`triton_encode.collect`: the product, the epilogues of all waves and the selections between them."""
    from steersman.kernels.triton_encode import plan

    N, L, D, K = shape
    schedule = plan(L, K)
    rows, epilogues, written = math.ceil(N / tile.BM), 0.0, 8.0 * N * schedule.slots
    for first, last in schedule.waves[1:]:
        rounds = rows * math.ceil((last - first) / tile.BN) / gpu.processors
        epilogues += rounds * design.epilogue(shape, tile, first) / (gpu.ghz * 1e6)
        written += 8.0 * N * K * (last - first) / first
    tighten = N / (4 * gpu.processors) * design.tighten * schedule.slots / 1024 / (gpu.ghz * 1e6)
    n_tighten = len(schedule.waves)  # one of them in the rescue, after the last wave
    return Cost(
        flops=2.0 * N * L * D * design.serial,
        bytes=item * (N * D + L * D * math.ceil(rows / tile.group)) + 2 * written,
        extra_ms=epilogues + n_tighten * tighten + (2 * n_tighten + 3) * gpu.launch_ms,
    )


def encode(shape: tiles.Shape, tile: tiles.Tile, gpu: Gpu, design: Design = SHIPPED, item: int = 2) -> Cost:
    """`triton_encode.topk_encode` without the casts before it."""
    from steersman.kernels.triton_encode import SMALL_BATCH

    N, L, D, K = shape
    if N <= SMALL_BATCH:  # W once; the pre-activations written and read, mostly in the cache
        return Cost(flops=2.0 * max(N, 16) * L * D, bytes=item * L * D + 8.0 * N * L, extra_ms=4 * gpu.launch_ms)
    found = collect(shape, tile, gpu, design, item)
    finish = 3 * 8.0 * N * K / (gpu.bandwidth * 1e9) + 8 * gpu.launch_ms
    return Cost(flops=found.flops, bytes=found.bytes, extra_ms=found.extra_ms + finish)


def buffer_bytes(shape: tiles.Shape, gpu: Gpu = H100) -> int:
    """Memory that encode takes beside its operands and result: pre-activations, or the candidates of all rows and the
    slots of the rescue's programs."""
    from steersman.kernels.triton_encode import SMALL_BATCH, plan
    from steersman.kernels.triton_rescue import PROGRAMS, slots_of

    N, L, _, K = shape
    if N <= SMALL_BATCH:
        return 4 * N * L
    C, tile = plan(L, K).slots, tiles.RESCUE[torch.bfloat16]
    return 8 * N * C + 12 * N + 8 * PROGRAMS * gpu.processors * tile.BM * slots_of(K, C, tile.BN)


# --- the training step ---


def step(
    shape: tiles.Shape, tile: tiles.Tile, gpu: Gpu, design: Design = SHIPPED, moments: str = "float32", n_aux: int = 0
) -> Parts:
    """A training step with the fused update: its parts one after the other. n_aux is A, 0 where nothing is dead."""
    N, L, D, K = shape
    copy, gathered = gpu.bandwidth * 1e9, 2.0 * N * K * D  # bytes a millisecond; of K bf16 rows for each token
    parts = {
        "prepare": design.prepare_bytes * N * D / copy,
        "encode": encode(shape, tile, gpu, design).ms(gpu),
        "decode": (design.gather * gathered + 8.0 * N * D + 12.0 * N * K) / copy,
        # A radix sort of the pairs, four passes over keys and places, each with a few launches.
        "sort by latent": 4 * 24.0 * N * K / copy + 20 * gpu.launch_ms,
        "hot latents": 0.05,  # chunks, of which most are empty
        "update": max(
            design.update_bytes[moments] * L * D / copy + 2 * gathered / (gpu.cache * 1e9),
            update_instructions(shape, design, moments) / (4 * gpu.processors * ISSUED * 1e6),
        ),
        "launches": design.launches * gpu.launch_ms,
    }
    if design.sums_apart:
        parts["dots"] = gathered / (0.6 * gpu.cache * 1e9) + 2.0 * L * D / copy
        parts["sums of numbers"] = 2.0 * L * D / copy + 0.08  # b_dec's: db_enc W_enc
    if design.aux_always or n_aux:
        parts["AuxK"] = auxk(shape, 2 * D if design.aux_always else n_aux, gpu)
    return parts


def update_instructions(shape: tiles.Shape, design: Design, moments: str) -> float:
    """Instructions that the warps of the update issue, those of threads past a row's end included."""
    from steersman.kernels.triton_update import PAIRS, tile

    N, L, D, K = shape
    if moments not in design.update_instructions:
        return 0.0
    warps = math.ceil(D / tile(D)["BLOCK_D"]) * tile(D)["BLOCK_D"] / 128
    further = max(0.0, N * K / L / PAIRS - 0.5)  # a run ends anywhere in its last few pairs
    return L * warps * (design.update_instructions[moments] + further * design.pair_instructions)


def auxk(shape: tiles.Shape, n_candidates: int, gpu: Gpu) -> float:
    """Milliseconds of AuxK over A candidates with k_aux = D / 2: five products, some 15 passes over [N, A] fp32 and,
    where A is above k_aux, another 20 of a selection."""
    N, _, D, _ = shape
    passes_over = 35 if n_candidates > D // 2 else 15
    products = 10.0 * N * D * n_candidates / (gpu.tflops * 1e9)
    return products + passes_over * 4.0 * N * n_candidates / (gpu.bandwidth * 1e9)


# --- the table ---

SHAPES: tuple[tiles.Shape, ...] = ((8192, 131072, 4096, 64), (8192, 131072, 1024, 32), (4096, 65536, 2304, 64))


def predictions(gpu: Gpu = H100, capability: int = 90, design: Design = SHIPPED) -> str:
    """A table of what is expected of encode and of whole steps at some shapes, over the bare product."""
    heads = f"{'product':>9} {'encode':>8} {'step fp32':>10} {'bf16':>6} {'int8':>6} {'memory':>8}"
    lines = [
        f"Predicted, not measured, on {gpu.name}: times over the bare product, whole steps with nothing dead,",
        "by what the moments are kept in; memory of encode over the pre-activations in bf16.",
        f"{'N,L,D,K':<22} {heads}",
    ]
    tile = tiles.WAVE[capability, torch.bfloat16][0]
    for shape in SHAPES:
        product = gemm(shape).flops / (gpu.tflops * 1e9)
        kinds = ("float32", "bfloat16", "int8")
        totals = [sum(step(shape, tile, gpu, design, moments).values()) for moments in kinds]
        first, *totals = (ms / product for ms in (encode(shape, tile, gpu, design).ms(gpu), *totals))
        memory = buffer_bytes(shape) / (2 * shape[0] * shape[1])
        named = ",".join(map(str, shape))
        line = f"{named:<22} {product:6.2f} ms {first:8.2f} {totals[0]:10.2f} {totals[1]:6.2f} {totals[2]:6.2f}"
        lines.append(f"{line} {100 * memory:6.1f} %")
        parts = step(shape, tile, gpu, design)
        lines.append("    ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items()))
    return "\n".join(lines)
