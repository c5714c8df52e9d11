"""What the compiler makes of a kernel, for any NVIDIA GPU and with none present: registers, spills, instructions, and
what the assembler complains of.

`jobs` lists the kernels that ship and what is expected of each; `problems` says where a compiled kernel falls short.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from steersman.errors import SteersmanError

CAPABILITIES = (80, 90, 100)
"""A100, H100, B200."""
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a program may have."""

_MATRIX = {"wgmma": r"wgmma\.mma_async", "mma": r"(?<!wg)mma\.sync", "tcgen05": r"tcgen05\.mma"}
_MULTIPLY = re.compile(r"(HG|H|UTCH|I)MMA")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel with everything that decides its machine code, and what is expected of that."""

    name: str
    """For people: the kernel, its mode and dtype."""
    capability: int
    """80, 90, 100."""
    kernel: Any
    """The function that `triton.jit` or `gluon.jit` made."""
    types: dict[str, str]
    """Triton's types of the arguments that are no constants."""
    constants: dict[str, Any]
    """The arguments that are."""
    warps: int
    stages: int = 3
    maxnreg: int | None = None
    """The registers that it is launched with at most, where it says so."""
    divisible: tuple[str, ...] = ()
    """Numbers among the arguments that are multiples of 16; pointers always start on 16 bytes."""
    unit: str = ""
    """The matrix unit that it should use: wgmma, mma, tcgen05; empty for none."""
    copies: str = ""
    """How operands should come: tma, cp.async, loads; empty for no matter."""
    registers: int = 255
    """A thread's at most."""
    shared: int = 227 << 10
    """Bytes of shared memory at most."""
    needs: tuple[str, ...] = ()
    """Beginnings of machine instructions that must occur, such as `LDG.E.128`."""
    lacks: tuple[str, ...] = ()
    """Beginnings of machine instructions that must not."""
    spills: int = 0
    """Bytes of registers a thread that may be kept in memory."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor, and what it consists of."""

    name: str
    capability: int
    tile: str
    registers: int
    """A thread's; 255 is all there are."""
    stack: int
    """Bytes of local memory a thread."""
    spills: int
    """Bytes that a thread writes to local memory because registers did not suffice."""
    shared: int
    """Bytes of shared memory a program."""
    matrix: str
    """The matrix instructions used: wgmma, mma or tcgen05; empty for none."""
    copies: str
    """How operands come: tma, cp.async or loads."""
    messages: tuple[str, ...]
    """What the assembler says of losses (numbers C75xx) and warns of."""
    instructions: dict[str, int] = field(repr=False)
    """How often each machine instruction stands in the code; with operands for `WARPGROUP.DEPBAR`. Empty where the code
    was not disassembled."""
    loop: dict[str, int] = field(repr=False)
    """The same for the innermost loop around the first matrix instruction; empty where there is none."""

    def count(self, beginning: str) -> int:
        """Machine instructions that begin so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(beginning))


def compile_job(job: Job, disassemble: bool = False) -> Resources:
    """Compile and read the result. Disassembling takes half a second, and is done where it is asked for or the job
    expects something of the instructions. Raises SteersmanError under Triton's interpreter, which has no compiler."""
    if knobs.runtime.interpret:
        raise SteersmanError("nothing is compiled under TRITON_INTERPRET=1; unset it")
    source, target, options = _source(job)
    said = io.StringIO()
    # A kernel from the cache would come without the assembler's words.
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        binary = triton.compile(source, target=target, options=options)
    ptx, words = binary.asm["ptx"], said.getvalue()
    if "Used " not in words:
        raise SteersmanError(f"{job.name}: this Triton does not pass on what its assembler says: {words[:200]!r}")
    instructions, loop = {}, {}
    if disassemble or job.needs or job.lacks or job.unit == "wgmma":
        instructions, loop = read_instructions(_disassembled(binary.asm["cubin"]))
    constants = job.constants
    return Resources(
        name=job.name,
        capability=job.capability,
        tile="x".join(str(constants[b]) for b in ("BM", "BN", "BK") if b in constants) + f" w{job.warps} s{job.stages}",
        registers=_largest(r"Used (\d+) registers", words),
        stack=_largest(r"(\d+) bytes stack frame", words),
        spills=_largest(r"(\d+) bytes spill stores", words),
        shared=binary.metadata.shared,
        matrix=" ".join(name for name, pattern in _MATRIX.items() if re.search(pattern, ptx)),
        copies="tma" if "cp.async.bulk.tensor" in ptx else "cp.async" if "cp.async" in ptx else "loads",
        messages=tuple(line.strip() for line in words.splitlines() if re.search(r"C75\d\d|[Ww]arning", line)),
        instructions=instructions,
        loop=loop,
    )


def check_source(job: Job) -> None:
    """Compile as far as Triton's first form, where types must agree; far quicker than the rest. Raises what Triton
    does."""
    source, target, options = _source(job)
    backend: Any = make_backend(target)
    parsed, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


def _source(job: Job) -> tuple[Any, GPUTarget, dict[str, Any]]:
    """What Triton's compiler takes."""
    types = {name: job.types.get(name, "constexpr") for name in job.kernel.arg_names}
    # Tensors start on 16 bytes: PyTorch's allocator sees to it, and `operands` for the rows.
    attributes: Any = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in job.divisible
    }
    source = _source_type(job.kernel)(fn=job.kernel, signature=types, constexprs=job.constants, attrs=attributes)
    options = {"num_warps": job.warps, "num_stages": job.stages, "maxnreg": job.maxnreg}
    return source, GPUTarget("cuda", job.capability, 32), options


def problems(job: Job, got: Resources) -> list[str]:
    """In what `got` is not as the job expects; empty where all is well."""
    found = list(got.messages)
    if got.spills > job.spills or (got.stack > 0 and not job.spills):
        found.append(f"spills {got.spills} bytes a thread, with a stack of {got.stack}")
    if got.registers > job.registers:
        found.append(f"takes {got.registers} registers a thread, not at most {job.registers}")
    if got.shared > (most := min(job.shared, SHARED[job.capability])):
        found.append(f"takes {got.shared} bytes of shared memory, not at most {most}")
    if got.matrix != job.unit:
        found.append(f"multiplies by {got.matrix or 'no matrix unit'}, not by {job.unit or 'none'}")
    if job.copies and got.copies != job.copies:
        found.append(f"its operands come by {got.copies}, not {job.copies}")
    found += [f"has no {name}" for name in job.needs if not got.count(name)]
    found += [f"has {got.count(name)} {name}" for name in job.lacks if got.count(name)]
    if job.unit == "wgmma" and not any(_waits_for(got.loop, left) for left in (1, 2, 3)):
        found.append("waits for every product before it begins the next: no WARPGROUP.DEPBAR 0x1 in its loop")
    return found


def _waits_for(loop: dict[str, int], left: int) -> bool:
    return f"WARPGROUP.DEPBAR.LE gsb0, {left:#x}" in loop


def read_instructions(code: str) -> tuple[dict[str, int], dict[str, int]]:
    """Counts of the instructions in disassembled code, and in the innermost loop around its first product."""
    lines = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    names = [(at, text if text.startswith("WARPGROUP.DEPBAR") else text.split()[0]) for at, text in lines]
    everything = Counter(name for _, name in names if name != "NOP")
    product = next((at for at, name in names if _MULTIPLY.match(name)), None)
    loops = [(int(m[1], 16), at) for at, text in lines if (m := re.search(r"BRA(?:\.\w+)*\s+.*?(0x[0-9a-f]+)", text))]
    around = [(at - target, target, at) for target, at in loops if product is not None and target <= product <= at]
    if not around:
        return dict(everything), {}
    _, first, last = min(around)
    return dict(everything), dict(Counter(name for at, name in names if first <= at <= last))


def _source_type(kernel: Any) -> Any:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _largest(pattern: str, words: str) -> int:
    return max((int(n) for n in re.findall(pattern, words)), default=0)


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
