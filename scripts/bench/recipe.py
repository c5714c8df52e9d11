"""Quality at equal tokens: FVU over learning rates for our default and its neighbours, beside the public libraries.

    python scripts/bench/recipe.py --data planted --rows 3000000
    python scripts/bench/recipe.py --data store --store acts --d-sae 1024 --k 16

Data is a store (`steersman cache`) or made here: `planted` is 512 random unit vectors in 64 dimensions, 8 active with
strengths 0.5 to 1.5; `mixture` is 1024 vectors in 128 dimensions with frequencies falling as a power of their rank, 10
active, a little noise. Every library sees the same rows once, in the same order; the peers run at three rates, with our
batch size and with 4096. Run it with the `peers` extra; `--peers none` leaves them out.
"""

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("STEERSMAN_PROGRESS", "0")

import torch
import tyro
from torch import Tensor

from steersman.sae import measure_reconstruction
from steersman.train import ActivationStore, TrainConfig, resolve, train_sae


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Literal["planted", "mixture", "store"] = "planted"
    """What to train on."""
    store: Path | None = None
    """The store, for --data store."""
    rows: int = 500_000
    """Rows of made data."""
    d_sae: int | None = None
    """Features; by default those of the made dictionary."""
    k: int | None = None
    """Active features; by default those of the made data."""
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Our learning rates, in units of the default."""
    peers: tuple[str, ...] = ("eai-sparsify", "sae-lens")
    """Libraries to run beside it; `none` for none."""
    peer_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Their learning rates."""
    seed: int = 0
    """Seed of data and training."""
    out: Path | None = None
    """Also write the rows to this JSON file."""


def made(args: Config) -> tuple[Tensor, Tensor, int]:
    """Rows [N, D], the dictionary [atoms, D] and the number active."""
    g = torch.Generator().manual_seed(args.seed)
    n, d, active = (512, 64, 8) if args.data == "planted" else (1024, 128, 10)
    dictionary = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    weights = torch.ones(n) if args.data == "planted" else torch.arange(1, n + 1).float() ** -0.5
    noise = 0.0 if args.data == "planted" else 0.02
    parts = []
    for start in range(0, args.rows, 20_000):
        m = min(20_000, args.rows - start)
        chosen = torch.multinomial(weights.expand(m, n), active, generator=g)
        strength = torch.rand(m, active, generator=g) + 0.5
        rows = torch.nn.functional.embedding_bag(chosen, dictionary, mode="sum", per_sample_weights=strength)
        parts.append(rows + noise * torch.randn(m, d, generator=g) if noise else rows)
    return torch.cat(parts), dictionary, active


def recovery(dictionary: Tensor | None, W_dec: Tensor) -> float | None:
    """Mean over the planted vectors of the best cosine of any feature."""
    if dictionary is None:
        return None
    rows = torch.nn.functional.normalize(W_dec.detach(), dim=1)
    return float((dictionary @ rows.T).max(dim=1).values.mean())


def fvu_and_dead(x: Tensor, x_hat: Tensor, fired: Tensor) -> tuple[float, float]:
    fvu = float((x - x_hat).double().square().sum() / (x - x.mean(0)).double().square().sum())
    return fvu, float(1 - fired.float().mean())


def run_sparsify(batches: list[Tensor], heldout: Tensor, d_sae: int, k: int, lr: float) -> tuple[float, float, Tensor]:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    sae = SparseCoder(heldout.shape[1], SparseCoderConfig(num_latents=d_sae, k=k))
    sae.b_dec.data = batches[0].mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    for i, x in enumerate(batches):
        for group in optimizer.param_groups:  # its trainer: linear warm-up, then linear decay to zero
            warmup = max(1, min(1000, len(batches) // 10))
            group["lr"] = lr * min((i + 1) / warmup, (len(batches) - i) / max(1, len(batches) - warmup))
        sae.set_decoder_norm_to_unit_norm()
        sae(x, x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        out = sae(heldout, heldout)
        fired = torch.zeros(d_sae, dtype=torch.bool)
        fired[out.latent_indices[out.latent_acts > 0]] = True
    return *fvu_and_dead(heldout, out.sae_out, fired), sae.W_dec


def run_saelens(batches: list[Tensor], heldout: Tensor, d_sae: int, k: int, lr: float) -> tuple[float, float, Tensor]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    D = heldout.shape[1]
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=d_sae, k=k))
    scale = math.sqrt(D) / float(torch.cat(batches[:20]).norm(dim=1).mean())  # its expected_average_only_in
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    silent = torch.zeros(d_sae)
    for i, x in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (len(batches) - i) / (len(batches) / 5))
        step = TrainStepInput(
            sae_in=x * scale, coefficients={}, dead_neuron_mask=silent > 1000, n_training_steps=i, is_logging_step=False
        )
        out = sae.training_forward_pass(step)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        silent = torch.where((out.feature_acts > 0).any(0), 0.0, silent + 1)
    with torch.no_grad():
        f = sae.encode(heldout * scale)
        x_hat = sae.decode(f) / scale
    return *fvu_and_dead(heldout, x_hat, (f > 0).any(0)), sae.W_dec


PEERS: dict[str, tuple[str, Any]] = {
    "eai-sparsify": ("sparsify", run_sparsify),
    "sae-lens": ("sae_lens", run_saelens),
}
"""Library -> its module, and what trains with it."""


def main(args: Config) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        dictionary, k, d_sae = None, args.k, args.d_sae
        if args.data == "store":
            if args.store is None:
                raise SystemExit("--data store needs --store")
            store = ActivationStore.open(args.store)
        else:
            rows, dictionary, active = made(args)
            k, d_sae = k or active, d_sae or len(dictionary)
            store = ActivationStore.from_tensors(rows.split(65_536), f"{scratch}/acts", "made", dtype="float32")
        if k is None or d_sae is None:
            raise SystemExit("--data store needs --d-sae and --k")
        base = TrainConfig(d_sae=d_sae, k=k, seed=args.seed, device="cpu")
        n_rows = store.n_batches(1)
        recipe = resolve(base, store.d_in, n_rows)
        heldout = torch.cat([b.x.float() for b in store.batches(4096, split="heldout", shuffle=False, drop_last=False)])
        results: list[dict[str, Any]] = []

        def report(row: dict[str, Any]) -> None:
            results.append(row)
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                ),
                flush=True,
            )

        for factor in args.factors:
            start = time.monotonic()
            config = base if factor == 1 else replace(base, lr=recipe.lr * factor)
            sae = train_sae(store, config, f"{scratch}/run_{factor}")
            result = measure_reconstruction(sae, [heldout])
            name = "steersman (default)" if factor == 1 else "steersman"
            row = {"library": name, "lr": recipe.lr * factor, "batch": recipe.batch_size, "fvu": result.fvu}
            row |= {"dead": result.dead_fraction, "recovery": recovery(dictionary, sae.W_dec)}
            report(row | {"seconds": time.monotonic() - start})
        for name in args.peers if args.peers != ("none",) else ():
            module, run = PEERS[name]
            if not find_spec(module):
                print(f"{name} is not installed: left out (pip install steersman[peers] for it)")
                continue
            for batch_size in sorted({recipe.batch_size, 4096}):
                batches = [b.x.float() for b in store.batches(batch_size, seed=args.seed)]
                for lr in args.peer_rates:
                    start = time.monotonic()
                    fvu, dead, W_dec = run(batches, heldout, d_sae, k, lr)
                    row = {"library": name, "lr": lr, "batch": batch_size, "fvu": fvu, "dead": dead}
                    report(row | {"recovery": recovery(dictionary, W_dec), "seconds": time.monotonic() - start})
        if args.out is not None:
            args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
