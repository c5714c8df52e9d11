"""Every shipped kernel compiles for sm_80, sm_90 and sm_100 as `kernels.tools.jobs` expects of it: no spills, nothing
that the assembler complains of, the instructions and registers named there. No GPU is needed. For sm_90 that is every
form and tile that ships, for the others one of each kernel; `scripts/dev/kernel_resources.py` compiles all of them.

The compiler runs in processes of its own, one for each capability: this one may run Triton's interpreter (see
conftest.py)."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.helpers import triton_before

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "dev" / "kernel_resources.py"
CAPABILITIES = (80, 90) if triton_before(3, 9) else (80, 90, 100)
"""Triton before 3.9 cannot compile the kernels for sm_100; `dispatch` refuses such GPUs there."""


def compiling() -> dict[str, str]:
    """The environment of a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[dict[str, Any]]]]:
    """What the compiler says of each kernel, by capability."""
    environment = compiling() | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    runs = {
        capability: subprocess.Popen(
            [sys.executable, "-W", "ignore", SCRIPT, "--json", "--capabilities", str(capability)]
            + ["--one-each"] * (capability != 90),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability in CAPABILITIES
    }  # fmt: skip
    try:
        said = {capability: run.communicate() for capability, run in runs.items()}
        for capability, run in runs.items():
            assert run.returncode == 0, said[capability][1][-2000:]
        yield {capability: [json.loads(line) for line in out.splitlines()] for capability, (out, _) in said.items()}
    finally:
        for run in runs.values():
            run.kill()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_is_as_expected(rows: dict[int, list[dict[str, Any]]], capability: int) -> None:
    wrong = {f"{row['name']} {row['tile']}": row["problems"] for row in rows[capability] if row["problems"]}
    assert not wrong


def test_every_form_of_a_kernel_is_in_order() -> None:
    """Types agree in a kernel's branches whatever its switches say."""
    code = """
from steersman.kernels.tools.compiled import check_source
from steersman.kernels.tools.jobs import forms
for job in forms(90):
    try:
        check_source(job)
    except Exception as error:
        raise AssertionError(f"{job.name} with {job.constants}") from error
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=compiling(), check=True)


def test_no_kernel_is_left_out() -> None:
    """What is launched anywhere in the package, by `kernel[grid](...)`, is a job."""
    code = """
import importlib, pathlib, re
from steersman import kernels
from steersman.kernels.tools.jobs import shipped
compiled = {job.kernel.fn.__name__ for capability in (80, 90) for job in shipped(capability)}
for file in pathlib.Path(kernels.__file__).parent.glob("*.py"):
    for name in re.findall(r"^ +(\\w+)\\[.*\\]\\(", file.read_text(), re.MULTILINE):
        assert name in compiled, f"{file.name} launches {name}, which is no job"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=compiling(), check=True)


def test_a_new_number_of_tokens_compiles_nothing() -> None:
    code = """
from steersman.kernels import triton_backward, triton_decode, triton_rescue, triton_select, triton_threshold
from steersman.kernels import gluon_wave, triton_update, triton_wave
for module in (gluon_wave, triton_decode, triton_rescue, triton_select, triton_threshold, triton_wave):
    for name in dir(module):
        if name.endswith("_kernel"):
            for p in getattr(module, name).params:
                # The width and the scale are those of a run.
                if not p.is_constexpr and not p.name.endswith("_ptr") and p.name not in ("x", "w", "D", "scale"):
                    assert p.do_not_specialize, (name, p.name)
for kernel, names in (
    (triton_backward.pair_dots, {"n_pairs"}),
    (triton_backward.runs, {"n_pairs", "n_halvings"}),
    (triton_backward.sort_weights, {"n_pairs"}),
    (triton_update.update_b_dec, {"N", "S"}),
):
    assert {p.name for p in kernel.params if p.do_not_specialize} == names
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=compiling(), check=True)


def copies_in_loops(code: str) -> list[str]:
    """The statements of kernels that give a variable the value of another, as it is, inside a loop."""
    kernels = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
    ]
    loops = [node for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.For | ast.While)]
    inside = {node for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Assign)}
    return [ast.unparse(node) for node in inside if isinstance(node.value, ast.Name)]


@pytest.mark.parametrize("file", sorted((ROOT / "steersman" / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_no_loop_keeps_the_last_value_of_another_variable(file: Path) -> None:
    """Triton's front end takes a variable for one that a loop changes where its value at the end of the body is not
    the one before the loop. `before = stage` above and `before = stage; stage += 1` inside look unchanged to it, and
    the loop reads the first value for ever."""
    assert not copies_in_loops(file.read_text())


def test_a_copy_in_a_loop_is_seen() -> None:
    code = "@gluon.jit\ndef f(n):\n    a = b = n\n    for i in range(n):\n        a = b\n        b += 1"
    assert copies_in_loops(code) == ["a = b"]
