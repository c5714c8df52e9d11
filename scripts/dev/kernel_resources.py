"""Print what the compiler makes of each shipped kernel: registers, shared memory, stack, matrix instructions.

    python scripts/dev/kernel_resources.py --full

Needs no GPU. `stack` above 0 means that registers were spilled.
"""

import argparse  # not tyro: runs on a bare GPU image too
import json
from dataclasses import asdict, fields

from steersman.kernels.tools.compiled import CAPABILITIES, Resources, compile_job, shipped


def main(args: argparse.Namespace) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capabilities", type=int, nargs="*", default=CAPABILITIES,
        help="compute capabilities to compile for: 80 (A100), 90 (H100), 100 (B200)",
    )  # fmt: skip
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--full", action=switch, default=False, help="also fp32 operands, measured tiles, more K")
    parser.add_argument("--json", action=switch, default=False, help="print JSON, one line a kernel, for the table")
    main(parser.parse_args())
