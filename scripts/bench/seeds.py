"""Do SAEs of other seeds find the same features? MCC of three seeds for each architecture, beside SAELens' trainers.

    steersman cache --model stories260k --text stories.jsonl --hook blocks.2.hook_resid_post --tokens 400000 --out acts
    python scripts/bench/seeds.py --store acts --out runs/seeds

Each architecture trains with its defaults, once for each seed, which decides the first weights and the order of rows.
SAELens' trainers see the same rows in the same order, in batches of our size, at each of their rates. MCC is the mean
similarity of features matched one to one (arXiv 2505.20254), averaged over the pairs of seeds. Runs in the folder are
resumed or read again. Run it with the `peers` extra; `--peers none` leaves them out.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("STEERSMAN_PROGRESS", "0")

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from steersman.sae import SAE, compare_saes
from steersman.train import ActivationStore, TrainConfig, evaluate_sae, resolve, train_sae
from study.peers import PeerConfig, installed, train_peer


@dataclass(frozen=True, kw_only=True)
class Config:
    store: Path
    """Store to train on."""
    out: Path = Path("bench-seeds")
    """Folder of the runs, and of seeds.json."""
    architectures: tuple[str, ...] = ("topk", "batch_topk")
    """Ours, each with its defaults."""
    peers: tuple[str, ...] = ("topk", "batchtopk")
    """SAELens' trainers; `none` for none."""
    peer_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Their learning rates."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each."""
    d_sae: int = 1024
    """Features."""
    k: int = 16
    """Active features a token, on average where the architecture is not told."""
    passes: int = 4
    """Passes over the store's rows."""


def config_of(args: Config, architecture: str, seed: int, tokens: int) -> TrainConfig:
    kind = SAE.architectures[architecture]
    settings: dict[str, Any] = {"k": args.k} if kind.uses_k else {"target_l0": float(args.k)}
    return TrainConfig(
        d_sae=args.d_sae, architecture=architecture, seed=seed, tokens=tokens, device="cpu", **settings
    )  # fmt: skip


def agreement(saes: list[SAE]) -> dict[str, float]:
    """Of the pairs of seeds: MCC, its chance level, and the share of features above 0.7."""
    found = compare_saes(*saes).matchings.values()
    return {
        "mcc": statistics.fmean(one.mcc or 0.0 for one in found),
        "mcc_by_chance": statistics.fmean(one.chance or 0.0 for one in found),
        "shared": statistics.fmean(one.shared for one in found),
    }


def main(args: Config) -> None:
    store = ActivationStore.open(args.store)
    tokens = args.passes * store.n_batches(1)
    batch = resolve(config_of(args, "topk", 0, tokens), store.d_in, store.n_batches(1)).batch_size
    makers: dict[str, Callable[[int], SAE]] = {
        name: lambda seed, name=name: train_sae(store, config_of(args, name, seed, tokens), args.out / f"{name}-{seed}")
        for name in args.architectures
        if name != "none"
    }
    if args.peers != ("none",) and "sae-lens" not in installed():
        print("sae-lens is not installed: left out (pip install steersman[peers] for it)")
    elif args.peers != ("none",):
        for name in args.peers:
            for lr in args.peer_rates:
                settings = PeerConfig(
                    library="sae-lens", architecture=name, d_sae=args.d_sae, k=args.k, lr=lr, batch_size=batch,
                    n_steps=tokens // batch,
                )  # fmt: skip
                makers[f"saelens-{name}-{lr:g}"] = lambda seed, name=name, lr=lr, settings=settings: train_peer(
                    store, replace(settings, seed=seed), args.out / f"saelens-{name}-{lr:g}-{seed}"
                )
    rows: list[dict[str, Any]] = []
    for name, make in makers.items():
        start, saes = time.process_time(), []
        for seed in args.seeds:
            folder = args.out / f"{name}-{seed}"
            saes.append(SAE.load(folder) if (folder / "cfg.json").exists() else make(seed))
        seconds = time.process_time() - start
        measured = [evaluate_sae(sae, store).reconstruction for sae in saes]
        row = {"name": name, "rows": tokens, "batch": batch, **agreement(saes)}
        row |= {
            figure: statistics.fmean(getattr(one, figure) for one in measured)
            for figure in ("fvu", "l0", "dead_fraction")
        }
        rows.append(row | {"cpu_seconds": seconds})
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in rows[-1].items()
            ),
            flush=True,
        )
        (args.out / "seeds.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
