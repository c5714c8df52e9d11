"""The backward and update kernels compile for sm_80, sm_90 and sm_100 at the tiles they ship with, with no spills."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.compiled import compile_all
from support.helpers import triton_before

from steersman.kernels.triton_backward import CHUNK, PAIRS, width_block
from steersman.kernels.triton_update import tile

INTEGERS = (
    "tokens_ptr",
    "latents_ptr",
    "starts_ptr",
    "hot_starts_ptr",
    "chunk_latents_ptr",
    "slots_ptr",
    "n_steps_ptr",
)
SCALARS = {"scale": "fp32", "beta1": "fp32", "beta2": "fp32", "eps": "fp32", "D": "i32", "L": "i32", "n_pairs": "i32"}
STATES = {"float32": ("*fp32", "*fp32", "*fp32"), "int8": ("*i8", "*u8", "*u8"), "bfloat16": ("*bf16",) * 3}


def job(name: str, arch: int, types: dict[str, str], **constants: Any) -> dict[str, Any]:
    module = "triton_update" if name == "update_rows" else "triton_backward"
    known = dict.fromkeys(INTEGERS, "*i32") | SCALARS | dict.fromkeys(("rows_ptr", "g_ptr", "x_ptr"), "*bf16")
    if name == "vector_matrix_parts":
        known["w_ptr"] = "*bf16"
        constants = {"ROWS": 512, **constants}
    kernel = f"steersman.kernels.{module}:{name}"
    warps = constants.pop("num_warps", 4)
    job = {"kernel": kernel, "arch": arch, "types": known | types, "constants": constants, "warps": warps}
    return job | {"divisible": ["D"]}


def jobs(arch: int, D: int, state: str) -> list[dict[str, Any]]:
    m, v, exponents = STATES[state]
    types = {f"{kind}_{matrix}_ptr": t for matrix in ("enc", "dec") for kind, t in (("m", m), ("v", v))}
    types |= {f"{kind}_{matrix}_exp_ptr": exponents for matrix in ("enc", "dec") for kind in "mv"}
    types |= {"enc_rows_ptr": "*bf16", "dec_rows_ptr": "*bf16"}
    flags = {"HOT": True, "AUX": True, "ADAM": True, "TOUCHED_ONLY": False, "STATE": state, "COPY": True}
    sums = {"BLOCK_P": PAIRS, "BLOCK_D": width_block(D)}
    update = job("update_rows", arch, types, **flags, **tile(D))
    if state != "float32":
        return [update]
    return [
        update,
        job("pair_dots", arch, {"w_ptr": "*bf16"}, **sums),
        job("chunk_sums", arch, {}, SIZE=CHUNK, **sums),
        job("row_sums", arch, {}, HOT=True, **sums),
        job("scalar_sums", arch, {}, BOTH=True, BLOCK_P=64, num_warps=1),
        job("vector_matrix_parts", arch, {}, BLOCK_L=16, BLOCK_D=width_block(D, 256)),
    ]


def test_kernels_are_not_specialised_on_the_number_of_pairs() -> None:
    code = (
        "from steersman.kernels.triton_backward import pair_dots\n"
        "assert {p.name for p in pair_dots.params if p.do_not_specialize} == {'n_pairs'}"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_tiles_compile_without_spills(arch: int, tmp_path: Path) -> None:
    """4096 and 2304 take the tile of 512 and that of 256 columns; the state's dtypes are spread over the two."""
    if arch == 100 and triton_before(3, 9):
        pytest.skip("dispatch refuses such GPUs with this Triton")
    todo = [*jobs(arch, 4096, "float32"), *jobs(arch, 4096, "int8"), *jobs(arch, 2304, "bfloat16")]
    for what, got in zip(todo, compile_all(todo, tmp_path)):
        name = what["kernel"].split(":")[1]
        print(f"sm_{arch} {name} {what['constants']}: {got}")  # noqa: T201
        assert got["stack"] == got["local"] == 0, (name, what["constants"], got)
        assert got["registers"] <= 128, (name, got)
        assert got["shared"] <= 48 << 10, (name, got)
