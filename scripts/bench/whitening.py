"""What whitening finds, and what it costs: MCC, F1 and FVU on planted features, and on a store of a model's rows.

    python scripts/bench/whitening.py
    steersman cache --model stories260k --text stories.jsonl --hook blocks.2.hook_resid_post --tokens 400000 --out acts
    python scripts/bench/whitening.py --store acts --d-sae 1024 --k 16

Planted rows are sparse sums of more unit vectors than there are dimensions. `even`: these vectors lie alike in all
directions, in groups of four of which the first one is on whenever another is. `stretched`: along some axes they have
ten times as much as along others. `common`: all of them share one direction. Features are matched to the planted
vectors one to one by their decoder rows (MCC, arXiv 2505.20254); F1 is that of the feature nearest a vector as a
detector of it, on rows that were held out, averaged over the vectors.

On a store nothing is planted: FVU on rows held out, the share of features that are silent on them, and the MCC of two
seeds.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("STEERSMAN_PROGRESS", "0")

import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize

from steersman.sae import SAE, SAEConfig, compare_saes
from steersman.train import ActivationStore, TrainConfig, train_sae

WIDTH, VECTORS, ACTIVE, HELD_OUT = 48, 192, 6, 4000


@dataclass(frozen=True, kw_only=True)
class Config:
    store: Path | None = None
    """Store of a model's rows, in place of planted ones."""
    d_sae: int = VECTORS
    """Features."""
    k: int = ACTIVE
    """Active features a token."""
    rows: int = 100_000
    """Planted rows."""
    passes: int = 4
    """Passes over the rows."""
    shrinkages: tuple[float, ...] = (0.01, 0.1, 0.3)
    """Values of whiten_shrinkage; without whitening comes first."""
    kinds: tuple[str, ...] = ("even", "stretched", "common")
    """Kinds of planted rows."""
    architecture: str = "topk"
    """The SAE's architecture."""


def planted(kind: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, D], the planted unit vectors [V, D], and which of them are on in each row [n, V]."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(VECTORS, WIDTH, generator=g)
    if kind == "stretched":
        vectors *= torch.arange(1, WIDTH + 1).pow(-0.6)
    if kind == "common":
        vectors += 2 * torch.randn(1, WIDTH, generator=g)
    vectors = normalize(vectors, dim=1)
    often = torch.arange(1, VECTORS + 1).pow(-0.5)
    on = torch.rand(n, VECTORS, generator=g) < (ACTIVE * often / often.sum()).clamp(max=0.9)
    if kind == "even":
        on &= on[:, torch.arange(VECTORS) // 4 * 4] | (torch.arange(VECTORS) % 4 == 0)
    strength = (1 + 0.3 * torch.randn(n, VECTORS, generator=g)).clamp_min(0)
    noise = 0.03 * torch.randn(n, WIDTH, generator=g)
    return (on * strength) @ vectors + torch.randn(WIDTH, generator=g) + noise, vectors, on & (strength > 0)


def found(sae: SAE, vectors: Tensor, rows: Tensor, on: Tensor) -> dict[str, float]:
    truth = SAE(SAEConfig(d_in=WIDTH, d_sae=VECTORS, k=ACTIVE))
    with torch.no_grad():
        truth.W_dec.copy_(vectors)
        truth.W_enc.copy_(vectors.T)
    nearest = (vectors @ normalize(sae.W_dec.detach(), dim=1).T).argmax(dim=1)
    active = sae.encode(rows)[:, nearest] > 0
    both = (active & on).sum(0)
    f1 = 2 * both / (active.sum(0) + on.sum(0)).clamp_min(1)
    return {"mcc": compare_saes(sae, truth, by="decoder").mcc or 0.0, "f1": float(f1.mean())}


def trained(args: Config, store: ActivationStore, folder: Path, **settings: Any) -> SAE:
    tokens = args.passes * store.n_rows
    name = "-".join(f"{value}" for value in settings.values())
    config = TrainConfig(d_sae=args.d_sae, k=args.k, architecture=args.architecture, tokens=tokens, **settings)
    return train_sae(store, config, folder / name)


def main(args: Config) -> None:
    settings: list[dict[str, Any]] = [{}]
    settings += [{"whiten": "zca", "whiten_shrinkage": shrinkage} for shrinkage in args.shrinkages]
    for kind in args.kinds if args.store is None else (str(args.store),):
        with tempfile.TemporaryDirectory() as name:
            folder, held = Path(name), ()
            if args.store is None:
                rows, vectors, on = planted(kind, args.rows + HELD_OUT)
                store = ActivationStore.from_tensors(
                    rows[: args.rows].split(10_000), folder / "acts", "planted", dtype="float32"
                )
                held = (vectors, rows[args.rows :], on[args.rows :])
            else:
                store = ActivationStore.open(args.store)
            for number, one in enumerate(settings):
                sae = trained(args, store, folder / str(number), seed=0, **one)
                heldout = sae.cfg.metadata["heldout"]
                line = {"rows": kind, "shrinkage": one.get("whiten_shrinkage", "not whitened"), "fvu": heldout["fvu"]}
                if held:
                    line |= found(sae, *held)
                else:
                    other = trained(args, store, folder / f"{number} again", seed=1, **one)
                    line |= {"silent": heldout["dead_share"], "seeds_mcc": compare_saes(sae, other, by="decoder").mcc}
                print(
                    json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in line.items()}), flush=True
                )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
