"""Print docs/methods.md: the published systems, what they are here, and what they did at equal KL.

python scripts/dev/methods_page.py > docs/methods.md
"""

import json
import textwrap
from pathlib import Path
from typing import Any

import tyro

from steersman.steer.presets.base import PRESETS
from steersman.steer.presets.listing import markdown

FIGURES = Path(__file__).parents[2] / "docs" / "methods.json"
"""What `scripts/bench/methods.py --summary` wrote."""
SWEEP = FIGURES.with_name("sweep.json")
"""What `scripts/bench/sweep.py` wrote as summary.json."""
HEAD = """\
# Published systems

What the papers call a method is here a setting of a mechanism; `preset(name).build(lm, ...)` makes it, and a
[recipe](recipes.md) may hold it. Written by `scripts/dev/methods_page.py` from the presets themselves."""
SAME = """\
## One mechanism, other settings

- ICV, the textual half of VTI, VISTA's vector and the second half of Safety Arithmetic are one function; contrast,
  strength and the sign differ.
- CAA is mean matching is EAST with weights is style vectors, type steering and the assistant axis, up to the tokens
  read, weights and centring.
- Latent steering vectors, trained style vectors, SSV and `optimised` are one loss; ReFT-r1 is the same with a gate and
  unit norm, PSR the same gate with a bias, imitating the prompted model.
- Capping is a floor or cap, StTP is set-if-below, StMP is mirror, AxBench's thresholding a floor and its clamping a
  positive clamp, SCAR `scale` of one supervised latent: rules of one edit.
- LF-Steering, personality, CorrSteer and output score all edit features; they differ in how features are chosen."""
MEASURED = """\
## At equal KL

{model}, {examples} examples of each side to build from, calibrated to KL {budget:g} per token, {items} held-out items
a task. Effect: rise of the margin between the two sides in nats per token, with its 95 % interval over items (of
persona, over pairs of a statement to agree with and one to reject, so that a push towards "Yes" is no effect); loss:
rise of the negative log-likelihood of the texts that the KL was measured on. Everything steers every token here, so
that costs compare, and each is to be read against the random vector, which costs as much. A dash was not measured. No
judge is asked. A model of this size says whether a mechanism works, not what a paper's number is. From
`scripts/bench/methods.py`.
"""


SWEPT = """\
`steersman vector sweep` on {traits} persona traits ({model}, CAA, KL {budget:g}): one half of the items chose the
layer of each trait ({chosen}), and on the other half the margin rose there by {found:.3f} nats on average. One fixed
layer for all traits gives {fixed}. For {clear} of the traits none of {nulls} nulls (a random vector, permuted labels),
each with a layer of its own choice, did as well. From `scripts/bench/sweep.py`."""


def measured(found: dict[str, Any]) -> str:
    """The table of a summary: a row a way, three columns a task."""
    names = list(found["tasks"])
    lines = [MEASURED.format(**{key: found[key] for key in ("model", "examples", "budget", "items")})]
    lines += ["| | " + " | ".join(f"{name}: effect | KL | loss" for name in names) + " |"]
    lines += ["|---|" + "---|---|---|" * len(names)]
    for row in dict.fromkeys(row for task in found["tasks"].values() for row in task):
        cells = []
        for name in names:
            one = found["tasks"][name].get(row)
            if one is None:
                cells += ["-", "-", "-"]
                continue
            mark = "" if one["reason"] in ("converged", "as it is") else " (its limit)"
            effect = f"{one['effect']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
            cells += [effect, f"{one['kl']:.3f}{mark}", f"{one['loss']:+.3f}" if "loss" in one else "-"]
        lines.append(f"| {f'`{row}`' if row in PRESETS else row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def swept(found: dict[str, Any]) -> str:
    """What a sweep over layers chose, against every fixed layer."""

    def layer(hook: str) -> str:
        return hook.split(".")[1]

    chosen = ", ".join(f"{trait} {layer(hook)}" for trait, hook in found["chosen"].items())
    fixed = ", ".join(f"{layer(hook)}: {value:.3f}" for hook, value in found["fixed"].items())
    least = min(found["p_values"].values())
    clear = sum(p == least for p in found["p_values"].values())
    text = SWEPT.format(
        chosen=chosen, fixed=fixed, found=found["found"], model=found["model"], budget=found["budget"], clear=clear,
        traits=len(found["p_values"]), nulls=round(1 / least) - 1,
    )  # fmt: skip
    return "## Which layer\n\n" + textwrap.fill(text, 120, break_on_hyphens=False)


def page() -> str:
    """The whole page."""
    parts = [HEAD, markdown(), SAME]
    if FIGURES.exists():
        parts.append(measured(json.loads(FIGURES.read_text())))
    if SWEEP.exists():
        parts.append(swept(json.loads(SWEEP.read_text())))
    return "\n\n".join(parts)


def main() -> None:
    print(page())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
