"""What the kernels should cost: operations, bytes and, on a given GPU, milliseconds.

Bytes count each operand once where it is shared through the cache, and gathered rows as often as they are gathered. A
time is the larger of arithmetic and traffic, plus what cannot overlap: the epilogue of the encoder's tiles, launches.
Estimates, to explain measurements and choose tiles; nothing is measured here.

Shape letters: N tokens, L latents, D width, K active latents a token.
"""

import math
from dataclasses import dataclass

from steersman.kernels import tiles

SHARED_RATE = 0.75
"""Fraction of the peak that a large product reaches."""
EPILOGUE_PASS = 5.0
"""Instructions that one pass over a tile takes for each of its elements: compare, two selects, compare, select."""
EPILOGUE_FIXED = 4.0
"""The same for what happens once: bias, count, check."""
LAUNCH_MS = 0.004


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The rates that bound a kernel."""

    name: str
    tflops: float
    """Dense bf16 peak, in 10^12 operations a second."""
    bandwidth: float
    """Device memory, in 10^12 bytes a second."""
    processors: int
    """Multiprocessors."""
    ghz: float
    """Clock under load."""


H100 = Gpu(name="H100 SXM", tflops=989.0, bandwidth=3.35, processors=132, ghz=1.6)
H200 = Gpu(name="H200", tflops=989.0, bandwidth=4.8, processors=132, ghz=1.6)
A100 = Gpu(name="A100 80GB", tflops=312.0, bandwidth=2.0, processors=108, ghz=1.3)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations and traffic of one call."""

    flops: float
    bytes: float
    extra_ms: float = 0.0
    """What neither explains: the epilogue, launches."""

    def ms(self, gpu: Gpu) -> float:
        """Expected milliseconds."""
        arithmetic = self.flops / (gpu.tflops * SHARED_RATE * 1e9)
        return max(arithmetic, self.bytes / (gpu.bandwidth * 1e9)) + self.extra_ms

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            flops=self.flops + other.flops, bytes=self.bytes + other.bytes, extra_ms=self.extra_ms + other.extra_ms
        )


def gemm(shape: tiles.Shape, item: int = 2) -> Cost:
    """The bare product of the encoder, its N x L result written in `item` bytes an element."""
    N, L, D, _ = shape
    return Cost(flops=2.0 * N * L * D, bytes=item * (N * D + L * D + N * L))


def passes(shape: tiles.Shape, tile: tiles.Tile, growth: float = 4.0) -> float:
    """Expected passes of the epilogue over a tile of the last wave, for latents in no particular order.

    A quarter of a tile's row holds Poisson many candidates, `growth` K of them among L latents; a tile takes as many
    passes as the fullest of its quarters.

    >>> round(passes((8192, 131072, 4096, 64), tiles.Tile(BM=128, BN=256, BK=64, warps=8, stages=4)), 1)
    2.1
    """
    _, L, _, K = shape
    mean = growth * K * tile.BN / 4 / L
    quarters, expected, below, term = 4 * tile.BM, 0.0, 0.0, math.exp(-mean)
    for n in range(200):  # the expected maximum is the sum of P(maximum > n)
        below += term
        term *= mean / (n + 1)
        more = 1.0 - min(below, 1.0) ** quarters
        expected += more
        if more < 1e-6:
            break
    return expected


def encode(shape: tiles.Shape, tile: tiles.Tile, gpu: Gpu, growth: float = 4.0, item: int = 2) -> Cost:
    """`triton_encode.topk_encode`: the product, the epilogue on the multiprocessors' four schedulers, the selection."""
    from steersman.kernels.triton_encode import SMALL_BATCH, plan

    N, L, D, K = shape
    if N <= SMALL_BATCH:  # W once; the pre-activations written and read, mostly in the cache
        return Cost(flops=2.0 * max(N, 16) * L * D, bytes=item * L * D + 8.0 * N * L, extra_ms=4 * LAUNCH_MS)
    schedule = plan(L, K, growth)
    # A warp's instruction serves 32 elements, and a multiprocessor issues four a clock.
    instructions = tile.BM * tile.BN / 32 * (EPILOGUE_FIXED + EPILOGUE_PASS * passes(shape, tile, growth))
    rounds = math.ceil(N / tile.BM) * math.ceil(L / tile.BN) / gpu.processors
    epilogue = rounds * instructions / 4 / (gpu.ghz * 1e6)
    selection = 8.0 * N * (schedule.slots + growth * K * 2 * len(schedule.waves)) * 2
    n_launches = 2 * len(schedule.waves) + 3
    return Cost(
        flops=2.0 * N * L * D,
        bytes=item * (N * D + L * D) + selection,
        extra_ms=epilogue + n_launches * LAUNCH_MS,
    )


def decode(shape: tiles.Shape, item: int = 2) -> Cost:
    """`triton_decode`: K rows of W_dec a token, of which few are found in the cache twice."""
    N, _, D, K = shape
    return Cost(flops=2.0 * N * K * D, bytes=item * N * K * D + 8.0 * N * K + 4.0 * N * D, extra_ms=LAUNCH_MS)


def backward(shape: tiles.Shape, item: int = 2) -> Cost:
    """The latent-major sums: g and x rows gathered once for each pair (g twice), W_dec read once."""
    N, L, D, K = shape
    return Cost(flops=6.0 * N * K * D, bytes=3.0 * item * N * K * D + item * L * D, extra_ms=8 * LAUNCH_MS)


def update(shape: tiles.Shape, state: int = 4, shadow: int = 2) -> Cost:
    """Adam on both matrices in place: weights and two moments read and written, the low-precision rows written."""
    _, L, D, _ = shape
    return Cost(flops=0.0, bytes=2.0 * L * D * (8 + 4 * state + shadow))


def step(shape: tiles.Shape, tile: tiles.Tile, gpu: Gpu, state: int = 4) -> Cost:
    """A training step: encode, decode, backward and update, one after the other."""
    parts = [encode(shape, tile, gpu), decode(shape), backward(shape), update(shape, state)]
    # Parts do not overlap, so their times add; flops and bytes are kept for the reader.
    together = sum(parts[1:], parts[0])
    separate = sum(part.ms(gpu) for part in parts)
    return Cost(flops=together.flops, bytes=together.bytes, extra_ms=separate - Cost(
        flops=together.flops, bytes=together.bytes).ms(gpu))  # fmt: skip


def buffer_bytes(shape: tiles.Shape) -> int:
    """Memory that encode takes beside its operands and result."""
    from steersman.kernels.triton_encode import SMALL_BATCH, plan

    N, L, _, K = shape
    return 4 * N * L if N <= SMALL_BATCH else 8 * N * plan(L, K).slots + 12 * N
