"""Does a sweep find a good layer? `sweep_layers` on persona statements, against every fixed layer.

For each trait: vectors at the swept layers from one part of the statements (CAA at the answer), the layer chosen on
another, its effect on a third. A fixed layer is one that is used for every trait; the best of them is chosen in
hindsight, on the same third part, which favours it.

    python scripts/bench/sweep.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data DIR --out sweeps/
"""

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

from steersman import LanguageModel
from steersman.steer import Sweep, bootstrap, sweep_layers

TRAITS = ("agreeableness", "conscientiousness", "extraversion", "neuroticism", "openness")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """Folder or hub id of the model."""
    data: Path
    """Folder of the persona statements (anthropics/evals), one TRAIT.jsonl each."""
    out: Path = Path("bench-sweep")
    """Folder for one resumable file a trait, and summary.json."""
    layers: tuple[int, ...] = (5, 11, 17, 23, 27)
    """Layers to sweep."""
    budget: float = 0.2
    """KL in nats per token."""
    examples: int = 64
    """Statements for the vectors."""
    texts: int = 6
    """Statements to measure the KL on."""
    items: int = 32
    """Held-out statements: one half chooses, the other reports."""
    nulls: int = 1
    """Random vectors, and as many of permuted labels, a layer."""
    seed: int = 0
    """Seed of the choice of statements."""


def statements(path: Path, n: int, seed: int) -> list[tuple[str, str, str]]:
    """(prompt, matching answer, other answer) of n statements, as many to agree with as to reject."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [
        (f"Question: {r['question']}\nAnswer:", r["answer_matching_behavior"], r["answer_not_matching_behavior"])
        for r in rows
    ]
    random.Random(seed).shuffle(found)
    sides = [[f for f in found if f[1] == answer] for answer in (" Yes", " No")]
    return [side for pair in zip(*sides) for side in pair][:n]


def main(args: Config) -> None:
    """Sweep and print the table."""
    lm = LanguageModel.load(args.model, device="cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in args.layers]
    sweeps: dict[str, Sweep] = {}
    for trait in TRAITS:
        rows = statements(args.data / f"{trait}.jsonl", args.examples + args.items + args.texts, args.seed)
        made, rest = rows[: args.examples], rows[args.examples :]
        # Neighbours are of different answers, so that each half of the items has both: two and two take turns.
        items = [rest[i + j] for i in range(0, args.items, 4) for j in (0, 2, 1, 3)]
        sweeps[trait] = sweep_layers(
            lm, [(p, a) for p, a, _ in made], [(p, b) for p, _, b in made], items=items, hooks=hooks, method="caa",
            texts=[p for p, _, _ in rest[args.items :]], target_kl=(args.budget,), nulls=args.nulls, max_length=64,
            out=args.out / f"{trait}.json",
        )  # fmt: skip
        print(f"\n{trait}\n{sweeps[trait].to_text()}", flush=True)
    chosen = {t: s.choices[args.budget] for t, s in sweeps.items()}
    fixed = {h: statistics.fmean(s.effect(h, args.budget).mean for s in sweeps.values()) for h in hooks}
    best = max(fixed, key=lambda hook: fixed[hook])
    found = statistics.fmean(c.effect.mean for c in chosen.values())
    less = [
        x - y
        for t, s in sweeps.items()
        for x, y in zip(s.cell(chosen[t].hook_name, args.budget).effects[1::2], s.cell(best, args.budget).effects[1::2])
    ]
    layer = dict(zip(hooks, args.layers))
    print("\nchosen layers: " + ", ".join(f"{t} {layer[c.hook_name]}" for t, c in chosen.items()))
    shown = ", ".join(f"{layer[h]}: {v:.3f}" for h, v in fixed.items())
    print(f"effect at the chosen layers {found:.3f}; at each fixed layer {shown}")
    print(f"chosen less the best fixed layer in hindsight ({layer[best]}), per item: {bootstrap(less)}")
    summary = {
        "model": lm.name, "budget": args.budget, "chosen": {t: c.hook_name for t, c in chosen.items()},
        "effects": {t: {h: s.effect(h, args.budget).mean for h in hooks} for t, s in sweeps.items()},
        "found": found, "fixed": fixed, "p_values": {t: c.p_value for t, c in chosen.items()},
    }  # fmt: skip
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
