"""Print what the compiler makes of each shipped kernel: registers, shared memory, stack, matrix instructions.

    python scripts/dev/kernel_resources.py --full

Needs no GPU. `stack` above 0 means that registers were spilled.
"""

import json
from dataclasses import asdict, dataclass, fields

import tyro

from steersman.kernels.tools.compiled import CAPABILITIES, Resources, compile_job, shipped


@dataclass(frozen=True, kw_only=True)
class Args:
    capabilities: tuple[int, ...] = CAPABILITIES
    """Compute capabilities to compile for: 80 (A100), 90 (H100), 100 (B200)."""
    full: bool = False
    """Also fp32 operands, the measured tiles and further sizes of K."""
    json: bool = False
    """Print JSON, one line a kernel, in place of the table."""


def main(args: Args) -> None:
    names = [field.name for field in fields(Resources)]
    if not args.json:
        print("  ".join(f"{name:<{26 if name == 'name' else 14}}" for name in names))
    for capability in args.capabilities:
        for job in shipped(capability, args.full):
            row = asdict(compile_job(job))
            if args.json:
                print(json.dumps(row | {"multiplies": job.matrix}), flush=True)
            else:
                line = (f"{row[name]!s:<{26 if name == 'name' else 14}}" for name in names)
                print("  ".join(line).rstrip(), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
