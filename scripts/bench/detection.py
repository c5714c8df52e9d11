"""How well directions find concepts in texts: the difference of the means beside trained ones, on AxBench's concept10.

For each concept a direction is made from some of its training texts and as many without it, and scores the evaluation
texts by its largest activation: AUROC against texts without the concept, and against hard negatives apart (arXiv
2501.17148). `permuted` is the difference of the means of the same texts with their labels shuffled: chance.

    python scripts/bench/detection.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data DIR/axbench_concept10
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import tyro

from steersman import LanguageModel
from steersman.steer import contrast, detect_concept


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """Folder or hub id of the model."""
    data: Path
    """Folder of the concept10 files."""
    layer: float = 0.4
    """Where to read, as a fraction of the model's depth."""
    concepts: int = 10
    """Concepts to measure."""
    examples: int = 36
    """Training texts of each side."""
    words: int = 48
    """Words of a text."""
    methods: tuple[str, ...] = ("diffmean", "reft_r1")
    """Methods of `contrast`."""
    seed: int = 0
    """Seed of the choice of examples."""


def main(args: Config) -> None:
    """Print the AUROC of every concept and method as they come, then the means."""
    lm = LanguageModel.load(args.model, device="cpu")
    hook = f"blocks.{round(args.layer * (lm.n_layers - 1))}.hook_resid_post"
    stem = args.data / "prod_2b_l20_v1"
    train, held = (parquet.read_table(f"{stem}_{part}_data.parquet").to_pylist() for part in ("train", "latent_eval"))
    named = [json.loads(line)["concept"] for line in Path(f"{stem}_metadata.jsonl").read_text().splitlines()]
    rng = random.Random(args.seed)

    def pair(row: dict[str, str]) -> tuple[str, str]:
        return row["input"] + "\n", " ".join(row["output"].split()[: args.words])

    found: dict[str, list[tuple[float, float | None]]] = {}
    for concept in range(min(args.concepts, len(named))):
        sides = [[pair(r) for r in train if r["concept_id"] == i] for i in (concept, -1)]
        positive, negative = (rng.sample(side, min(args.examples, len(side))) for side in sides)
        mine = [r for r in held if r["concept_id"] == concept and r["output"].strip()]
        texts = {
            kind: [pair(r) for r in mine if r["category"] == kind] for kind in sorted({r["category"] for r in mine})
        }
        hard = [text for kind, part in texts.items() if kind not in ("positive", "negative") for text in part]
        print(f"{concept}: {named[concept]}", flush=True)
        for method in (*args.methods, "permuted"):
            plus, minus = positive, negative
            if method == "permuted":
                mixed = rng.sample([*plus, *minus], len(plus) + len(minus))
                plus, minus = mixed[: len(plus)], mixed[len(plus) :]
            kind = "diffmean" if method == "permuted" else method
            options: dict[str, Any] = {"positions": "answer"} if kind == "diffmean" else {}
            v = contrast(lm, plus, minus, hook=hook, method=kind, diagnostics=False, **options)
            seen = detect_concept(lm, v, texts["positive"], texts["negative"], hard)
            found.setdefault(method, []).append((seen.auroc, seen.auroc_hard))
            beside = "" if seen.auroc_hard is None else f", hard negatives {seen.auroc_hard:.3f}"
            print(f"    {method:<10} {seen.auroc:.3f}{beside}", flush=True)
    print(f"mean over {min(args.concepts, len(named))} concepts at {hook} of {lm.name}")
    for method, values in found.items():
        hard = [b for _, b in values if b is not None]
        beside = f", hard negatives {sum(hard) / len(hard):.3f}" if hard else ""
        print(f"    {method:<10} {sum(a for a, _ in values) / len(values):.3f}{beside}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
