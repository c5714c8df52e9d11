"""Compile Triton kernels for NVIDIA GPUs with no GPU present, and read what the assembler says of them.

Run as a program with a JSON list of jobs on standard input, since a process compiles kernels or interprets them, not
both: `{"kernel": "module:name", "types": {argument: type}, "constants": {...}, "arch": 90, "warps": 4}`. Arguments not
named are pointers to fp32. Prints one JSON object per job: registers, stack and local bytes, shared memory.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any


def compile_all(jobs: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """The results of the jobs, from a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def compile_one(job: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job["kernel"].split(":")
    kernel = getattr(import_module(module), name)
    constants, types = job["constants"], job["types"]
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith("*") or arg in job.get("divisible", ())
    }
    places = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    target = GPUTarget("cuda", job["arch"], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": job["warps"]})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report.stdout)
    assert found, report.stdout
    registers, stack, shared, local = (int(number) for number in found.groups())
    return {"registers": registers, "stack": stack, "shared": max(shared, compiled.metadata.shared), "local": local}


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        sys.stdout.write(json.dumps(compile_one(job)) + "\n")
