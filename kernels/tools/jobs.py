"""The kernels that ship, as jobs for the compiler: one function a family, each beside what its code is expected to be.

A kernel's arguments that are no constants are given by their type. Names that end in `_ptr` and are not listed are
pointers to fp32.

Shape letters: N tokens, L latents, D width, K active latents a token, C slots of a row's buffer.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from steersman.kernels import (
    tiles,
    triton_backward,
    triton_centre,
    triton_counters,
    triton_decode,
    triton_encode,
    triton_rescue,
    triton_select,
    triton_threshold,
    triton_update,
    triton_wave,
)
from steersman.kernels.tiles import Tile
from steersman.kernels.tools.compiled import Job

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
PRECISIONS = {torch.bfloat16: ("tf32",), torch.float32: ("ieee", "tf32")}
"""How operands of a dtype are multiplied (see `operands.precision`); bf16 has only one way, whatever it is called."""
MODES = {
    "first": triton_wave.FIRST,
    "filter": triton_wave.FILTER,
    "threshold": triton_wave.THRESHOLD,
    "dense": triton_wave.DENSE,
}
"""Those of `triton_wave.wave_kernel`."""
UNITS = {80: "mma", 90: "wgmma", 100: "tcgen05"}

WIDTHS = (4096, 2304)
"""Widths D whose kernels are compiled: rows of whole tiles, and rows that are not."""
STATES = {"float32": ("*fp32", "*fp32"), "bfloat16": ("*bf16", "*bf16"), "int8": ("*i8", "*u8")}
"""The types of the first and second moments by the name of what they are kept in; exponents are always bytes."""
SMALL = 48 << 10
"""Bytes of shared memory that leave room for four programs and more on a multiprocessor."""


def shipped(capability: int, full: bool = False) -> Iterator[Job]:
    """The kernels with the tiles they ship with on GPUs of one capability; `full` adds fp32 operands, measured tiles
    and further sizes of K."""
    for family in FAMILIES:
        yield from family(capability, full)


def forms(capability: int) -> Iterator[Job]:
    """The shipped kernels with their switches in other positions: all four of any two occur."""
    seen = set()
    for job in shipped(capability):
        names = [name for name, value in job.constants.items() if isinstance(value, bool) and name not in _OWN_JOBS]
        for on in _positions(len(names)):
            form = replace(job, constants=job.constants | dict(zip(names, on)))
            key = (form.kernel.fn.__name__, *sorted(map(str, (form.types | form.constants).items())))
            if key not in seen:
                seen.add(key)
                yield form


_OWN_JOBS = ("TMA", "PTX", "SIGNED", "KEYS", "VALUES")
"""Switches that change the types of arguments, or are no choice on a GPU."""


def _positions(n: int) -> Iterator[tuple[bool, ...]]:
    """Rows of n bits among which any two columns have all four pairs: those of the columns' numbers, and the
    opposites."""
    rows = [[False] * n] + [[bool(i >> bit & 1) for i in range(n)] for bit in range((n - 1).bit_length())]
    for row in rows:
        yield tuple(row)
        yield tuple(not on for on in row)


def operands_of(full: bool) -> list[tuple[torch.dtype, str]]:
    """The dtypes of the operands and how they are multiplied."""
    dtypes = NAMES if full else (torch.bfloat16,)
    return [(dtype, precision) for dtype in dtypes for precision in PRECISIONS[dtype]]


def job(name: str, capability: int, kernel: Any, constants: dict[str, Any], types: dict[str, str], **more: Any) -> Job:
    """A job whose unlisted pointers are to fp32."""
    pointers = {arg: "*fp32" for arg in kernel.arg_names if arg.endswith("_ptr") and arg not in constants}
    return Job(name=name, capability=capability, kernel=kernel, constants=constants, types=pointers | types, **more)


# --- encode: triton_wave ---


def encode_jobs(capability: int, full: bool) -> Iterator[Job]:
    """`triton_wave.wave_kernel` in all modes, plain and signed, `gluon_wave.filter_kernel` where a tile is for it, and
    `small_batch_kernel`."""
    for dtype, precision in operands_of(full):
        waves = (tiles.IN_FULL,) if precision == "ieee" else tiles.WAVE[capability, dtype]
        for i, tile in enumerate(waves):
            plain = i == tiles.PLAIN.get((capability, dtype), 0)
            for mode in MODES if plain else ("filter",):
                yield wave_job(tile, capability, dtype, mode, precision)
            if tile.persistent:
                yield persistent_job(tile, capability, dtype)
        first, filtering = tiles.SIGNED.get((capability, dtype), (waves[0], waves[0]))
        yield wave_job(first, capability, dtype, "first", precision, signed=True)
        yield wave_job(filtering, capability, dtype, "filter", precision, signed=True)
        for tile in tiles.SMALL_BATCH[capability, dtype]:
            yield small_batch_job(tile, capability, dtype, precision)
    if full:
        for entry in tiles.entries(capability):
            tile, dtype = Tile(**entry["tile"]), getattr(torch, entry["dtype"])
            yield (
                persistent_job(tile, capability, dtype)
                if tile.persistent
                else wave_job(tile, capability, dtype, "filter")
            )


def wave_job(
    tile: Tile, capability: int, dtype: torch.dtype, mode: str, precision: str = "tf32", C: int = 1024, *,
    signed: bool = False,
) -> Job:  # fmt: skip
    """`triton_wave.wave_kernel` in one of its modes."""
    x, w = (_operand(dtype, rows, tile) for rows in (tile.BM, tile.BN))
    buffer = "*fp32" if mode == "dense" else "*i64"
    numbers = dict.fromkeys(("N", "L", "D", "first", "last"), "i32")
    constants = _constants(tile, precision)
    constants |= {"C": C, "GROUP": tile.group, "MODE": MODES[mode].value, "SIGNED": signed, "PTX": True}
    return job(
        f"encode {mode} {_label(dtype, precision)}" + " signed" * signed, capability, triton_wave.wave_kernel,
        constants, {"x": x, "w": w, "count_ptr": "*i32", "buffer_ptr": buffer} | numbers,
        warps=tile.warps, stages=tile.stages, **_product(capability, tile, precision),
    )  # fmt: skip


def persistent_job(tile: Tile, capability: int, dtype: torch.dtype, C: int = 1024) -> Job:
    """`gluon_wave.filter_kernel`: warps take and give registers, and candidates are written by one store each."""
    from steersman.kernels import gluon_wave

    layout = gluon_wave.stage_layout(tile.BK)
    boxes = {"x": (tile.BM, tile.BK), "w": (tile.BN, tile.BK)}
    types = {name: f"tensordesc<{NAMES[dtype]}[{rows},{BK}],{layout!r}>" for name, (rows, BK) in boxes.items()}
    constants = {"C": C, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "GROUP": tile.group, "S": tile.stages,
                 "WARPS": tile.warps}  # fmt: skip
    return job(
        f"encode filter {NAMES[dtype]} persistent", capability, gluon_wave.filter_kernel, constants,
        types | {"count_ptr": "*i32", "buffer_ptr": "*i64"} | dict.fromkeys(("N", "D", "first", "last"), "i32"),
        warps=tile.warps, stages=tile.stages, unit="wgmma", copies="tma", registers=168,
        needs=("USETMAXREG", "ATOMG", "STG.E.64", "FMNMX.NAN"), lacks=("STL", "LDL"),
    )  # fmt: skip


def small_batch_job(tile: Tile, capability: int, dtype: torch.dtype, precision: str = "tf32") -> Job:
    """`triton_wave.small_batch_kernel`."""
    x, w = (_operand(dtype, rows, tile) for rows in (tile.BN, tile.BM))
    return job(
        f"encode small batch {_label(dtype, precision)}", capability, triton_wave.small_batch_kernel,
        _constants(tile, precision), {"x": x, "w": w} | dict.fromkeys(("N", "L", "D"), "i32"),
        warps=tile.warps, stages=tile.stages, **_product(capability, tile, precision),
    )  # fmt: skip


def _label(dtype: torch.dtype, precision: str) -> str:
    return NAMES[dtype] + f" {precision}" * (dtype == torch.float32)


def _operand(dtype: torch.dtype, rows: int, tile: Tile) -> str:
    return f"tensordesc<{NAMES[dtype]}[{rows},{tile.BK}]>" if tile.tma else f"*{NAMES[dtype]}"


def _constants(tile: Tile, precision: str) -> dict[str, Any]:
    return {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "TMA": tile.tma, "PRECISION": precision}


def _product(capability: int, tile: Tile, precision: str) -> dict[str, str]:
    """The unit and the copies of a large product; fp32 in full has no matrix unit."""
    if precision == "ieee":
        return {}
    return {"unit": UNITS[capability], "copies": "tma" if tile.tma else "cp.async"}


# --- encode's slow path: triton_rescue ---


def rescue_jobs(capability: int, full: bool) -> Iterator[Job]:
    """The kernels of `triton_rescue`, plain and signed."""
    for dtype, precision in operands_of(full):
        for signed in (False, True):
            yield rescue_job(capability, dtype, precision, signed=signed)
    yield merge_job(capability)
    if full:
        yield rescue_job(capability, torch.bfloat16, C=4096, k=512)
        yield merge_job(capability, C=4096, k=512)


def rescue_job(
    capability: int, dtype: torch.dtype, precision: str = "tf32", C: int = 1024, k: int = 64, *, signed: bool = False
) -> Job:
    """`triton_rescue.rescue_kernel`. It multiplies 16 rows at a time, fewer than a warp group of Hopper takes."""
    tile, kind = tiles.RESCUE[dtype], f"*{NAMES[dtype]}"
    W = triton_rescue.slots_of(k, C, tile.BN)
    constants = _constants(tile, precision) | {"C": C, "K": k, "W": W, "T": 32 * tile.warps, "SIGNED": signed}
    del constants["TMA"]
    return job(
        f"encode rescue {_label(dtype, precision)} K={k}" + " signed" * signed, capability,
        triton_rescue.rescue_kernel, constants,
        {"x_ptr": kind, "w_ptr": kind, "L": "i32", "D": "i32"} | _LISTED | {"scratch_ptr": "*i64"},
        warps=tile.warps, stages=tile.stages, copies="cp.async", unit="" if precision == "ieee" else "mma",
    )  # fmt: skip


_LISTED = {"failed_ptr": "*i32", "n_failed_ptr": "*i32", "buffer_ptr": "*i64", "count_ptr": "*i32"}
"""The failed rows and their buffers."""


def merge_job(capability: int, C: int = 1024, k: int = 64) -> Job:
    """`triton_rescue.merge_kernel`."""
    tile = tiles.RESCUE[torch.bfloat16]
    constants = {"C": C, "K": k, "W": triton_rescue.slots_of(k, C, tile.BN), "BM": tile.BM, "T": 32 * tile.warps}
    return job(
        f"encode rescue merge K={k}", capability, triton_rescue.merge_kernel, constants,
        _LISTED | {"scratch_ptr": "*i64", "stride": "i32", "room": "i32"}, warps=tile.warps,
    )  # fmt: skip


# --- selection: triton_select, triton_threshold ---


def selection_jobs(capability: int, full: bool) -> Iterator[Job]:
    """The kernels of `triton_select`, plain and signed, and the counting of `triton_threshold`."""
    for C, k in ((512, 32), (1024, 64), (4096, 512)) if full else ((1024, 64),):
        for signed in (False, True):
            yield from select_jobs(capability, C, k, signed=signed)
    for keys in (False, True):
        yield job(
            "histogram" + " of keys" * keys, capability, triton_threshold.histogram_kernel,
            {"SHIFT": 16, "KEYS": keys, "BLOCK": 1024},
            {"bits_ptr": "*i32", "count_ptr": "*i32", "histogram_ptr": "*i32", "state_ptr": "*i32"}
            | {"N": "i32", "M": "i32", "width": "i32"}, warps=4,
        )  # fmt: skip
    yield job(
        "digit", capability, triton_threshold.digit_kernel, {}, {"histogram_ptr": "*i32", "state_ptr": "*i32"}, warps=1
    )


def select_jobs(capability: int, C: int, k: int, *, signed: bool = False) -> Iterator[Job]:
    """The kernels of `triton_select` for buffers of C slots and k candidates kept; those that a signed code has of its
    own, or those of any other."""
    chunk, K2 = triton_encode.chunk_of(k), triton.next_power_of_2(k)
    n, row = {"N": "i32", "stride": "i32"}, {"K": k, "K2": K2, "SIGNED": signed}
    for name, kernel, types, constants, slots in (
        ("tighten", triton_select.tighten_kernel, n | {"buffer_ptr": "*i64", "count_ptr": "*i32"},
         {"C": C, "K": k, "SLACK": triton_select.slack_of(k)}, C),
        ("reduce", triton_select.reduce_kernel, n | {"out_ptr": "*i64", "M": "i32", "n_chunks": "i32"},
         row | {"C": chunk, "VALUES": True}, chunk),
        ("reduce keys", triton_select.reduce_kernel, n | {"source_ptr": "*i64", "out_ptr": "*i64", "M": "i32",
         "n_chunks": "i32"}, row | {"C": chunk, "VALUES": False}, chunk),
        ("finish", triton_select.finish_kernel, n | {"keys_ptr": "*i64", "count_ptr": "*i32", "indices_ptr": "*i32"},
         row | {"C": C, "COUNTED": True}, C),
    ):  # fmt: skip
        if not signed or "SIGNED" in constants:
            shape = triton_select.shape_of(slots)
            constants |= {"R": shape["R"], "T": shape["T"]}
            # A row's keys stay with the threads that read them: nothing passes through shared memory but sums and the
            # sort of what is left.
            yield job(f"{name} C={C} K={k}" + " signed" * signed, capability, kernel, constants, types,
                      warps=shape["num_warps"], registers=168, shared=16 * K2)  # fmt: skip
    if not signed:
        yield job(
            f"certify C={C}", capability, triton_select.certify_kernel, {"C": C, "BLOCK": 1024},
            {"N": "i32", "count_ptr": "*i32", "failed_ptr": "*i32", "n_failed_ptr": "*i32"}, warps=4,
        )  # fmt: skip


# --- decode: triton_decode ---


def decode_jobs(capability: int, full: bool) -> Iterator[Job]:
    """The kernels of `triton_centre` and `triton_decode`, with bf16 rows in loads of 16 bytes."""
    numbers = dict.fromkeys(("N", "D", "x_stride"), "i32") | {"scale": "fp32"}
    yield job(
        "centre", capability, triton_centre.centre_kernel, {"BIAS": True, "ROWS": 4, "BD": 1024},
        {"x_ptr": "*bf16", "out_ptr": "*bf16"} | numbers, warps=4, divisible=("D", "x_stride"), registers=128,
        needs=("LDG.E.128", "STG.E.128"),
    )  # fmt: skip
    types = {"indices_ptr": "*i32", "w_ptr": "*bf16", "x_ptr": "*bf16", "residual_ptr": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("D", "K", "x_stride"), "i32")
    shapes = ((64, 4096), (32, 1024), (64, 2304), (8, 768), (128, 4096), (512, 4096))
    plain = {"BIAS": True, "KB": triton_decode.KB, "BD": triton_decode.piece_of(4096)}
    for name, kernel, constants in (
        ("decode", triton_decode.decode_kernel, plain | {"num_warps": 4}),
        *(
            (f"decode and dots K={K} D={D}", triton_decode.decode_and_dots_kernel,
             {"BIAS": True, "HELD": K <= triton_decode.MOST_HELD, **triton_decode.held_tile(K, D)})
            for K, D in (shapes if full else shapes[:3])
        ),
    ):  # fmt: skip
        known = {arg: kind for arg, kind in types.items() if arg in kernel.arg_names}
        warps = constants.pop("num_warps")
        yield job(name, capability, kernel, constants, known, warps=warps, divisible=("D",), registers=176,
                  shared=SMALL, needs=("LDG.E.128",))  # fmt: skip


# --- backward: triton_backward ---


def backward_jobs(capability: int, full: bool) -> Iterator[Job]:
    """The kernels of `triton_backward`, with bf16 rows."""
    types = dict.fromkeys(("tokens_ptr", "g_rows_ptr", "starts_ptr", "latents_ptr"), "*i32")
    types |= {"pairs_ptr": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("g_ptr", "x_ptr", "w_ptr", "rows_ptr"), "*bf16")
    types |= dict.fromkeys(("n_pairs", "n_halvings", "K", "L", "D"), "i32")
    chunk = {"CHUNK": triton_backward.CHUNK}
    for D in WIDTHS if full else WIDTHS[:1]:
        block = triton_backward.width_block(D)
        sums = {"BLOCK_P": triton_backward.PAIRS, "BLOCK_D": block}
        for name, constants, warps in (
            ("runs", {"BLOCK": 512}, 4),
            ("sort_weights", {"DOTS": True, "BLOCK": 1024}, 4),
            ("pair_dots", sums, 4),
            ("chunk_sums", chunk | sums, block // 128),
            ("row_sums", {"HOT": True} | chunk | sums, block // 128),
            ("run_sums", {}, 1),
        ):
            kernel = getattr(triton_backward, name)
            known = {arg: kind for arg, kind in types.items() if arg in kernel.arg_names}
            # Sums over pairs need nothing of other threads.
            alone = ("BAR",) if name in ("chunk_sums", "row_sums") else ()
            yield job(f"{name} D={D}", capability, kernel, constants, known, warps=warps, divisible=("D", "L"),
                      registers=128, shared=SMALL, lacks=alone)  # fmt: skip


# --- update: triton_update ---


def update_jobs(capability: int, full: bool) -> Iterator[Job]:
    """The kernels of `triton_update`, in every dtype of the moments."""
    for D in (*WIDTHS, 8192, 1024, 768, 16384) if full else WIDTHS:
        for state in STATES:
            if full or (D, state) not in ((4096, "bfloat16"), (2304, "float32")):
                yield update_job(capability, D, state)
    yield update_job(capability, WIDTHS[0], "bfloat16", touched_only=True)
    for aux, adam in ((False, True), (True, False)) if full else ():
        yield update_job(capability, WIDTHS[0], "float32", aux=aux, adam=adam)
    numbers = dict.fromkeys(("scale", "beta1", "beta2", "log_beta1", "log_beta2", "eps"), "fp32")
    numbers |= {"N": "i32", "S": "i32", "D": "i32", "n_steps_ptr": "*i32", "residual_ptr": "*bf16"}
    yield job(
        "update_b_dec", capability, triton_update.update_b_dec,
        {"ADAM": True, "CENTRED": True, "ROWS": 256, "BLOCK_D": 32}, numbers, warps=8, divisible=("D",),
        registers=128, shared=SMALL,
    )  # fmt: skip


def update_job(
    capability: int, D: int, state: str, *, aux: bool = True, adam: bool = True, touched_only: bool = False
) -> Job:
    """`triton_update.update_rows` for rows of width D with bf16 copies of the weights."""
    m, v = STATES[state]
    types = {"g_ptr": "*bf16", "x_ptr": "*bf16", "enc_rows_ptr": "*bf16", "dec_rows_ptr": "*bf16"}
    types |= dict.fromkeys(("tokens_ptr", "g_rows_ptr", "starts_ptr", "slots_ptr", "n_steps_ptr"), "*i32")
    for matrix in ("enc", "dec"):
        types |= {f"m_{matrix}_ptr": m, f"v_{matrix}_ptr": v}
        types |= {f"{moment}_{matrix}_exp_ptr": "*u8" if state == "int8" else m for moment in "mv"}
    types |= dict.fromkeys(("scale", "beta1", "beta2", "log_beta1", "log_beta2", "eps"), "fp32")
    types |= dict.fromkeys(("first_latent", "L", "D"), "i32")
    tile = dict(triton_update.tile(D))
    warps, maxnreg = tile.pop("num_warps"), tile.pop("maxnreg")
    flags = {"HOT": True, "AUX": aux, "ADAM": adam, "TOUCHED_ONLY": touched_only, "STATE": state, "COPY": True}
    flags |= {"CENTRED": True, "STRETCH": triton_update.STRETCH, "CHUNK": triton_backward.CHUNK}
    return job(
        f"update_rows D={D} {state}" + " no aux" * (not aux) + " signum" * (not adam) + " touched" * touched_only,
        capability, triton_update.update_rows, flags | tile, types, warps=warps, maxnreg=maxnreg, divisible=("D",),
        registers=128, shared=SMALL,
    )  # fmt: skip


# --- counters: triton_counters ---


def counter_jobs(capability: int, full: bool) -> Iterator[Job]:
    """The kernels of `triton_counters`."""
    types = {"indices_ptr": "*i32", "n_active_ptr": "*fp64", "n_pairs": "i32"}
    yield job("mark_active", capability, triton_counters.mark_active_kernel, {"BLOCK": triton_counters.BLOCK}, types,
              warps=4, registers=64)  # fmt: skip
    types = dict.fromkeys(("silent_ptr", "limits_ptr", "counts_ptr"), "*i32") | {"L": "i32"}
    yield job("count_silence", capability, triton_counters.count_silence_kernel,
              {"LIMITS": 2, "BLOCK": triton_counters.BLOCK}, types, warps=4, registers=64)  # fmt: skip


FAMILIES: tuple[Callable[[int, bool], Iterator[Job]], ...] = (
    encode_jobs, rescue_jobs, selection_jobs, decode_jobs, backward_jobs, update_jobs, counter_jobs
)  # fmt: skip
