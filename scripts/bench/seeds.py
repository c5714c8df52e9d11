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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("STEERSMAN_PROGRESS", "0")

import torch
import tyro

from steersman.sae import SAE, compare_saes
from steersman.train import ActivationStore, TrainConfig, evaluate_sae, resolve, train_sae


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


def rows_again(store: ActivationStore, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """The batches of `train_sae`, pass after pass."""
    for epoch in count():
        yield from (batch.x.float() for batch in store.batches(batch_size, seed=seed, epoch=epoch))


def train_peer(store: ActivationStore, args: Config, name: str, lr: float, seed: int, tokens: int, batch: int) -> SAE:
    """An SAE of SAELens' trainer, read from the files that it writes."""
    from sae_lens import (  # pyright: ignore[reportMissingImports]
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    kinds: dict[str, Any] = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }
    kind, settings = kinds[name]
    torch.manual_seed(seed)
    sae = kind(
        settings(
            d_in=store.d_in, d_sae=args.d_sae, k=args.k, normalize_activations="expected_average_only_in",
            device="cpu",
        )
    )  # fmt: skip
    steps = tokens // batch
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * batch, train_batch_size_samples=batch, lr=lr, lr_end=lr / 10,
            lr_decay_steps=steps // 5, n_batches_for_norm_estimate=20, dead_feature_window=max(10, steps // 100),
        ),
        sae=sae,
        data_provider=rows_again(store, batch, seed),
    )  # fmt: skip
    folder = args.out / f"saelens-{name}-{lr:g}-{seed}"
    trainer.fit().save_inference_model(str(folder))
    return SAE.load(folder)


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
    if args.peers != ("none",) and not find_spec("sae_lens"):
        print("sae-lens is not installed: left out (pip install steersman[peers] for it)")
    elif args.peers != ("none",):
        for name in args.peers:
            for lr in args.peer_rates:
                makers[f"saelens-{name}-{lr:g}"] = lambda seed, name=name, lr=lr: train_peer(
                    store, args, name, lr, seed, tokens, batch
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
