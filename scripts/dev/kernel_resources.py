"""Print what the compiler makes of each shipped kernel: registers, spills, shared memory, matrix instructions.

    python scripts/dev/kernel_resources.py --full

Needs no GPU. What is not as it should be (see `Job`) is printed below its line, and the command then fails. With
--predict it prints what the cost model expects of encode and of whole steps instead.
"""

import argparse  # not tyro: runs on a bare GPU image too
import json
from dataclasses import asdict, fields

from steersman.kernels.tools import cost
from steersman.kernels.tools.compiled import CAPABILITIES, Resources, compile_job, problems
from steersman.kernels.tools.jobs import shipped


def main(args: argparse.Namespace) -> None:
    if args.predict:
        print(cost.predictions(cost.H100, 90))
        return
    names = [f.name for f in fields(Resources) if f.repr and f.name != "messages"]
    wide = {"name": 30, "tile": 20}
    if not args.json:
        print("  ".join(f"{name:<{wide.get(name, 10)}}" for name in names))
    n_wrong = 0
    for capability in args.capabilities:
        seen = set()
        for job in shipped(capability, args.full):
            kernel = job.kernel.fn.__name__
            if args.only not in job.name or (args.one_each and kernel in seen):
                continue
            seen.add(kernel)
            got = compile_job(job, disassemble=bool(args.count))
            wrong = problems(job, got)
            n_wrong += bool(wrong)
            row = asdict(got)
            if args.json:
                print(json.dumps(row | {"problems": wrong}), flush=True)
                continue
            print("  ".join(f"{row[name]!s:<{wide.get(name, 10)}}" for name in names).rstrip(), flush=True)
            for each in wrong:
                print(f"    ! {each}", flush=True)
            for name in args.count:
                in_loop = sum(n for instruction, n in got.loop.items() if instruction.startswith(name))
                print(f"    {got.count(name)} {name}, {in_loop} in the loop around the product")
    if n_wrong and not args.json:
        raise SystemExit(f"kernel_resources: {n_wrong} kernels are not as they should be")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capabilities", type=int, nargs="*", default=CAPABILITIES,
        help="compute capabilities to compile for: 80 (A100), 90 (H100), 100 (B200)",
    )  # fmt: skip
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--full", action=switch, default=False, help="also fp32 operands, measured tiles, more K")
    parser.add_argument("--one-each", action=switch, default=False, help="of each kernel only its first form and tile")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--count", nargs="*", default=(), help="beginnings of machine instructions to count, such as LDG.E.128"
    )
    parser.add_argument(
        "--predict", action=switch, default=False, help="instead print what they should cost on an H100"
    )
    parser.add_argument("--json", action=switch, default=False, help="print JSON, one line a kernel")
    main(parser.parse_args())
