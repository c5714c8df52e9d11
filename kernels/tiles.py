"""Which tiles the Triton encoders run with: a table by shape and GPU, and the rule where the table has no entry.

`tiles.json` beside this file holds measured choices (written by `scripts/dev/autotune_kernels.py`); the rule is what
the cost model in `tools/cost.py` says of shapes never measured.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tiles.json")

Shape = tuple[int, int, int, int]
"""N tokens, L latents, D width, K active latents a token."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One way to run a kernel."""

    BM: int
    """Rows of a program's tile."""
    BN: int
    """Columns of a program's tile, a multiple of 8."""
    BK: int
    """Elements of the width multiplied at a time."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles in flight from memory."""
    group: int = 16
    """Blocks of rows that share the tiles of W in the cache."""
    tma: bool = True
    """Load through the tensor copy engine (sm_90 and later)."""
    persistent: bool = False
    """Run the mode FILTER by `gluon_wave`, one program a multiprocessor (sm_90, operands of 16 bits, no signed code);
    STEERSMAN_PERSISTENT=0 in the environment is as if no tile said so."""


WAVE: dict[tuple[int, torch.dtype], tuple[Tile, ...]] = {
    (80, torch.bfloat16): (Tile(BM=128, BN=128, BK=64, warps=8, stages=3, tma=False),),
    (90, torch.bfloat16): (
        Tile(BM=128, BN=256, BK=64, warps=8, stages=4, persistent=True),
        Tile(BM=128, BN=128, BK=64, warps=8, stages=3),
    ),
    (100, torch.bfloat16): (
        Tile(BM=128, BN=256, BK=64, warps=8, stages=4),
        Tile(BM=128, BN=128, BK=64, warps=8, stages=4),
    ),
    (80, torch.float32): (Tile(BM=64, BN=64, BK=32, warps=4, stages=3, tma=False),),
    (90, torch.float32): (Tile(BM=64, BN=128, BK=32, warps=4, stages=3),),
    (100, torch.float32): (Tile(BM=64, BN=128, BK=32, warps=4, stages=3),),
}
"""The shipped tiles of `wave_kernel` by capability and dtype of the operands; the first is the rule's choice."""

IN_FULL = WAVE[80, torch.float32][0]
"""The tile of `wave_kernel` where fp32 is multiplied in full: without matrix units a larger one needs more registers
than there are."""

PLAIN = {(100, torch.bfloat16): 1}
"""The entry of `WAVE` for modes other than FILTER, where the rule's choice would need more registers than there are."""

SIGNED = {
    (90, torch.bfloat16): (Tile(BM=128, BN=128, BK=64, warps=8, stages=4), WAVE[90, torch.bfloat16][0]),
    (100, torch.bfloat16): (WAVE[100, torch.bfloat16][1], WAVE[100, torch.bfloat16][1]),
}
"""The tiles of the modes FIRST and FILTER for a signed code, where the other codes' need more shared memory or more
registers than there are: a tile's 64-bit keys change their layout, and a candidate has a size and a sign."""

SMALL_BATCH: dict[tuple[int, torch.dtype], tuple[Tile, ...]] = {
    (80, torch.bfloat16): (
        Tile(BM=64, BN=16, BK=128, warps=4, stages=4, tma=False),
        Tile(BM=64, BN=64, BK=64, warps=4, stages=4, tma=False),
    ),
    (90, torch.bfloat16): (Tile(BM=64, BN=16, BK=128, warps=4, stages=4), Tile(BM=64, BN=64, BK=64, warps=4, stages=4)),
    (80, torch.float32): (
        Tile(BM=64, BN=16, BK=32, warps=4, stages=4, tma=False),
        Tile(BM=64, BN=64, BK=32, warps=4, stages=4, tma=False),
    ),
}
"""The tiles of `small_batch_kernel`: the first for up to 16 tokens, the second for up to 64. BM counts latents, BN
tokens."""
SMALL_BATCH |= {
    (100, torch.bfloat16): SMALL_BATCH[90, torch.bfloat16],
    (90, torch.float32): SMALL_BATCH[80, torch.float32],
}
SMALL_BATCH |= {(100, torch.float32): SMALL_BATCH[80, torch.float32]}

RESCUE: dict[torch.dtype, Tile] = {
    torch.bfloat16: Tile(BM=16, BN=64, BK=64, warps=4, stages=3, tma=False),
    torch.float32: Tile(BM=16, BN=64, BK=32, warps=8, stages=3, tma=False),
}
"""The tile of `rescue_kernel`."""

INTERPRETED = Tile(BM=16, BN=64, BK=32, warps=4, stages=1)
"""The tile under Triton's interpreter: several tiles even of the small shapes of a test."""


def capability(device: torch.device) -> int:
    """80, 90, 100, ...: the largest capability of the tables that the device has."""
    major, minor = torch.cuda.get_device_capability(device)
    return max([known for known in (80, 90, 100) if known <= 10 * major + minor], default=80)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a few where the interpreter plays one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def choice(shape: Shape, cc: int, dtype: torch.dtype) -> Tile:
    """The tile of `wave_kernel`: the table's entry nearest in shape, if one lies within a factor of two in every
    dimension, else the rule."""
    measured = [e for e in entries(cc) if e["dtype"] == str(dtype).removeprefix("torch.")]
    near = [(_distance(shape, e["shape"]), i) for i, e in enumerate(measured)]
    near = [(distance, i) for distance, i in near if distance <= 1.0]
    if near:
        return Tile(**measured[min(near)[1]]["tile"])
    return WAVE[cc, dtype][0]


def _distance(a: Shape, b: Any) -> float:
    """The largest ratio of two shapes' dimensions, in octaves."""
    return max(abs(math.log2(max(1, p) / max(1, q))) for p, q in zip(a, b))


def entries(cc: int) -> list[dict[str, Any]]:
    """The measured rows of the table for a capability."""
    return [e for e in _table() if e["capability"] == cc]


@functools.cache
def _table() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text())["entries"]


def extend(rows: list[dict[str, Any]], path: Path = TABLE) -> None:
    """Put rows made by `entry` into the table at `path`, which need not be there yet; a row of the same capability,
    dtype and shape is replaced."""
    before = json.loads(path.read_text())["entries"] if path.exists() else []
    kept = {(e["capability"], e["dtype"], tuple(e["shape"])): e for e in before}
    kept |= {(e["capability"], e["dtype"], tuple(e["shape"])): e for e in rows}
    path.write_text(json.dumps({"entries": [kept[key] for key in sorted(kept)]}, indent=1) + "\n")
    _table.cache_clear()
    _find.cache_clear()


def entry(shape: Shape, cc: int, dtype: torch.dtype, tile: Tile, ms: float, device: str) -> dict[str, Any]:
    """One row of the table."""
    return {
        "capability": cc,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "tile": asdict(tile),
        "ms": ms,
        "device": device,
    }


@functools.lru_cache(maxsize=1024)
def _find(shape: Shape, device: torch.device, dtype: torch.dtype, signed: bool) -> Tile:
    cc, dtype = capability(device), _known(dtype)
    return SIGNED[cc, dtype][1] if signed and (cc, dtype) in SIGNED else choice(shape, cc, dtype)


def _known(dtype: torch.dtype) -> torch.dtype:
    """fp16 runs with the tiles of bf16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def find(shape: Shape, dtype: torch.dtype, device: torch.device, signed: bool = False) -> Tile:
    """The tile of `wave_kernel` for a shape on a device."""
    return INTERPRETED if device.type != "cuda" else _find(shape, device, dtype, signed)


def find_plain(dtype: torch.dtype, device: torch.device, signed: bool = False) -> Tile:
    """The tile of `wave_kernel` for its modes FIRST, THRESHOLD and DENSE."""
    if device.type != "cuda":
        return INTERPRETED
    key = capability(device), _known(dtype)
    return SIGNED[key][0] if signed and key in SIGNED else WAVE[key][PLAIN.get(key, 0)]


def find_small_batch(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of `small_batch_kernel` for a shape on a device."""
    if device.type != "cuda":
        return INTERPRETED
    return SMALL_BATCH[capability(device), _known(dtype)][0 if shape[0] <= 16 else 1]


def find_rescue(dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of `rescue_kernel`."""
    if device.type != "cuda":
        return INTERPRETED
    return RESCUE[_known(dtype)]
