"""Every shipped tile compiles for sm_80, sm_90 and sm_100, on the matrix units and without spills. No GPU is needed.

The compiler runs in a process of its own: this one may run Triton's interpreter (see conftest.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import triton_before

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent.parent / "scripts" / "dev" / "kernel_resources.py"
UNITS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
# What a program may have: the largest shared memory of A100, H100 and B200.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_shipped_tiles(capability: int) -> None:
    if capability == 100 and triton_before(3, 9):
        pytest.skip("this Triton cannot compile them; dispatch refuses such GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "--json", "--capabilities", str(capability)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        print(row)  # noqa: T201 - shown with pytest -s
        where = f"{row['name']} {row['tile']} sm_{capability}"
        assert row["stack"] == 0, f"{where} spills"
        assert row["shared"] <= SHARED[capability], where
        if row["multiplies"]:
            # The rescue of a few rows multiplies 16 at a time, fewer than a warp group of Hopper takes.
            unit = "mma" if "rescue" in row["name"] else UNITS[capability]
            assert row["matrix"] == unit, where
            assert row["copies"] == ("tma" if capability >= 90 and "rescue" not in row["name"] else "cp.async"), where
    assert sum(row["name"] == "encode filter bf16" for row in rows) == (1 if capability == 80 else 2)
    assert {"encode first bf16 signed", "encode filter bf16 signed"} <= {row["name"] for row in rows}


def test_a_new_number_of_tokens_compiles_nothing() -> None:
    code = """
from steersman.kernels import triton_decode, triton_rescue, triton_select, triton_threshold, triton_wave
for module in (triton_decode, triton_rescue, triton_select, triton_threshold, triton_wave):
    for name in dir(module):
        if name.endswith("_kernel"):
            for p in getattr(module, name).params:
                if not p.is_constexpr and not p.name.endswith("_ptr") and p.name not in ("x", "w"):
                    assert p.do_not_specialize, (name, p.name)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)
