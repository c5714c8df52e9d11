"""What the compiler makes of the shipped kernels, for any NVIDIA GPU and with none present: registers, shared memory,
stack, matrix instructions.

Shape letters: N tokens, L latents, D width, K active latents a token, C slots of a row's buffer.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steersman.errors import SteersmanError
from steersman.kernels import (
    tiles,
    triton_decode,
    triton_encode,
    triton_rescue,
    triton_select,
    triton_threshold,
    triton_wave,
)
from steersman.kernels.tiles import Tile

CAPABILITIES = (80, 90, 100)
MODES = {
    "first": triton_wave.FIRST,
    "filter": triton_wave.FILTER,
    "threshold": triton_wave.THRESHOLD,
    "dense": triton_wave.DENSE,
}
"""Those of `triton_wave.wave_kernel`."""

_MATRIX = {"wgmma": r"wgmma\.mma_async", "mma": r"(?<!wg)mma\.sync", "tcgen05": r"tcgen05\.mma"}
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel with everything that decides its machine code."""

    name: str
    """For people: the kernel, its mode and dtype."""
    capability: int
    """80, 90, 100."""
    kernel: Any
    """The `triton.jit` function."""
    types: dict[str, str]
    """Triton's types of the arguments that are no constants."""
    constants: dict[str, Any]
    """The arguments that are."""
    warps: int
    stages: int
    matrix: bool
    """Whether it multiplies."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor."""

    name: str
    capability: int
    tile: str
    registers: int
    """A thread's; 255 is all there are."""
    stack: int
    """Bytes of local memory a thread, where registers that did not fit are kept: 0 is no spills."""
    shared: int
    """Bytes of shared memory a program."""
    matrix: str
    """The matrix instructions used: wgmma, mma or tcgen05; empty for none."""
    copies: str
    """How operands come: tma, cp.async or loads."""


def compile_job(job: Job) -> Resources:
    """Compile and read the result. Raises SteersmanError under Triton's interpreter, which has no compiler."""
    if knobs.runtime.interpret:
        raise SteersmanError("nothing is compiled under TRITON_INTERPRET=1; unset it")
    types = {name: job.types.get(name, "constexpr") for name in job.kernel.arg_names}
    # Tensors start on 16 bytes: PyTorch's allocator sees to it, and `operands` for the rows.
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(fn=job.kernel, signature=types, constexprs=job.constants, attrs=aligned)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    ptx = binary.asm["ptx"]
    usage = _usage(binary.asm["cubin"])
    copies = "tma" if "cp.async.bulk.tensor" in ptx else "cp.async" if "cp.async" in ptx else "loads"
    constants = job.constants
    return Resources(
        name=job.name,
        capability=job.capability,
        tile="x".join(str(constants[b]) for b in ("BM", "BN", "BK") if b in constants) + f" w{job.warps} s{job.stages}",
        registers=usage["REG"],
        stack=max(usage["STACK"], usage["LOCAL"]),
        shared=binary.metadata.shared,
        matrix=" ".join(name for name, pattern in _MATRIX.items() if re.search(pattern, ptx)),
        copies=copies,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)}


def wave_job(tile: Tile, capability: int, dtype: torch.dtype, mode: str, C: int = 1024, *, signed: bool = False) -> Job:
    """`triton_wave.wave_kernel` in one of its modes."""
    x, w = (_operand(dtype, rows, tile) for rows in (tile.BM, tile.BN))
    tau_and_buffer = {"bias_ptr": "*fp32", "tau_ptr": "*fp32", "buffer_ptr": "*fp32" if mode == "dense" else "*i64"}
    numbers = dict.fromkeys(("N", "L", "D", "first", "last"), "i32")
    return Job(
        name=f"encode {mode} {_NAMES[dtype]}" + " signed" * signed,
        capability=capability,
        kernel=triton_wave.wave_kernel,
        types={"x": x, "w": w, "count_ptr": "*i32"} | tau_and_buffer | numbers,
        constants=_constants(tile)
        | {"C": C, "GROUP": tile.group, "MODE": MODES[mode].value, "LIMIT": triton_wave.LIMIT, "SIGNED": signed},
        warps=tile.warps,
        stages=tile.stages,
        matrix=True,
    )


def small_batch_job(tile: Tile, capability: int, dtype: torch.dtype) -> Job:
    """`triton_wave.small_batch_kernel`."""
    x, w = (_operand(dtype, rows, tile) for rows in (tile.BN, tile.BM))
    return Job(
        name=f"encode small batch {_NAMES[dtype]}",
        capability=capability,
        kernel=triton_wave.small_batch_kernel,
        types={"x": x, "w": w, "bias_ptr": "*fp32", "out_ptr": "*fp32"} | dict.fromkeys(("N", "L", "D"), "i32"),
        constants=_constants(tile),
        warps=tile.warps,
        stages=tile.stages,
        matrix=True,
    )


def rescue_job(capability: int, dtype: torch.dtype, C: int = 1024, k: int = 64, *, signed: bool = False) -> Job:
    """`triton_rescue.rescue_kernel`."""
    tile, kind = tiles.RESCUE[dtype], f"*{_NAMES[dtype]}"
    types = {"x_ptr": kind, "w_ptr": kind, "bias_ptr": "*fp32", "failed_ptr": "*i32", "n_failed_ptr": "*i32"}
    constants = _constants(tile) | {"C": C, "K": k, "W": min(C, triton.next_power_of_2(k + tile.BN)), "SIGNED": signed}
    del constants["TMA"]
    return Job(
        name=f"encode rescue {_NAMES[dtype]}" + " signed" * signed,
        capability=capability,
        kernel=triton_rescue.rescue_kernel,
        types=types | {"buffer_ptr": "*i64", "L": "i32", "D": "i32"},
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=True,
    )


def selection_jobs(capability: int, C: int, k: int, *, signed: bool = False) -> Iterator[Job]:
    """The kernels of `triton_select` for buffers of C slots and k candidates kept; those that a signed code has of its
    own, or those of any other."""
    chunk, K2 = triton_encode.chunk_of(k), triton.next_power_of_2(k)
    per_warp = triton_select.SLOTS_PER_WARP
    n = {"N": "i32"}
    for name, kernel, types, constants, warps in (
        ("tighten", triton_select.tighten_kernel, n | {"buffer_ptr": "*i64", "count_ptr": "*i32", "tau_ptr": "*fp32"},
         {"C": C, "K": k, "R": 1}, max(1, C // per_warp)),
        ("reduce", triton_select.reduce_kernel,
         n | {"source_ptr": "*fp32", "out_ptr": "*i64", "M": "i32", "n_chunks": "i32"},
         {"C": chunk, "K": k, "R": 1, "VALUES": True, "SIGNED": signed}, max(1, chunk // per_warp)),
        ("finish", triton_select.finish_kernel, n | {"keys_ptr": "*i64", "values_ptr": "*fp32", "indices_ptr": "*i32"},
         {"C": C, "K": k, "K2": K2, "R": 1, "SIGNED": signed}, max(1, K2 // 256)),
        ("certify", triton_select.certify_kernel,
         n | {"count_ptr": "*i32", "failed_ptr": "*i32", "n_failed_ptr": "*i32"}, {"C": C, "BLOCK": 1024}, 4),
    ):  # fmt: skip
        if not signed or "SIGNED" in constants:
            yield Job(name=f"{name} C={C} K={k}" + " signed" * signed, capability=capability, kernel=kernel,
                      types=types, constants=constants, warps=warps, stages=3, matrix=False)  # fmt: skip


def decode_jobs(capability: int) -> Iterator[Job]:
    """`triton_decode.decode_kernel` with and without the residual, and the counting of `triton_threshold`."""
    types = {"values_ptr": "*fp32", "indices_ptr": "*i32", "w_ptr": "*bf16", "bias_ptr": "*fp32", "x_ptr": "*fp32"}
    types |= {"out_ptr": "*fp32", "squares_ptr": "*fp32", "D": "i32", "K": "i32"}
    for residual in (False, True):
        constants = {"BIAS": True, "RESIDUAL": residual, "KB": triton_decode.KB, "BD": 512}
        yield Job(name="decode" + " residual" * residual, capability=capability, kernel=triton_decode.decode_kernel,
                  types=types, constants=constants, warps=4, stages=3, matrix=False)  # fmt: skip
    types = {"bits_ptr": "*i32", "histogram_ptr": "*i32", "state_ptr": "*i32", "M": "i32"}
    yield Job(name="histogram", capability=capability, kernel=triton_threshold.histogram_kernel, types=types,
              constants={"SHIFT": 16, "BLOCK": 4096}, warps=4, stages=3, matrix=False)  # fmt: skip


def shipped(capability: int, full: bool = False) -> Iterator[Job]:
    """The kernels with the tiles they ship with on GPUs of one capability; `full` adds fp32 and further sizes of K."""
    for dtype in _NAMES if full else (torch.bfloat16,):
        for i, tile in enumerate(tiles.WAVE[capability, dtype]):
            plain = i == tiles.PLAIN.get((capability, dtype), 0)
            for mode in MODES if plain else ("filter",):
                yield wave_job(tile, capability, dtype, mode)
        first, filtering = tiles.SIGNED.get((capability, dtype), (tiles.WAVE[capability, dtype][0],) * 2)
        yield wave_job(first, capability, dtype, "first", signed=True)
        yield wave_job(filtering, capability, dtype, "filter", signed=True)
        for tile in tiles.SMALL_BATCH[capability, dtype]:
            yield small_batch_job(tile, capability, dtype)
        yield rescue_job(capability, dtype)
        yield rescue_job(capability, dtype, signed=True)
    yield from decode_jobs(capability)
    if full:
        for entry in tiles.entries(capability):
            yield wave_job(Tile(**entry["tile"]), capability, getattr(torch, entry["dtype"]), "filter")
        yield rescue_job(capability, torch.bfloat16, C=4096, k=512)
    for C, k in ((512, 32), (1024, 64), (4096, 512)) if full else ((1024, 64),):
        yield from selection_jobs(capability, C, k)
        yield from selection_jobs(capability, C, k, signed=True)


def _operand(dtype: torch.dtype, rows: int, tile: Tile) -> str:
    return f"tensordesc<{_NAMES[dtype]}[{rows},{tile.BK}]>" if tile.tma else f"*{_NAMES[dtype]}"


def _constants(tile: Tile) -> dict[str, Any]:
    return {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "TMA": tile.tma, "PRECISION": "tf32"}
