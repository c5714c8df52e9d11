"""What a recipe finds at equal tokens: F1, MCC and FVU for our defaults, their neighbours and the public libraries.

    python scripts/bench/recipe.py --data tree --out recipe.json --architectures topk batch_topk
    python scripts/bench/recipe.py --data tree --out recipe.json --batches 0.5 2 --ks 0.5 2 --widths 0.5 2 --peers none
    python scripts/bench/recipe.py --data store --store acts --d-sae 1024 --k 16

Data is a store (`steersman cache`) or made here: `planted` is 512 random unit vectors in 64 dimensions, 8 active with
strengths 0.5 to 1.5; `mixture` is 1024 vectors in 128 dimensions with frequencies falling as a power of their rank, 10
active, a little noise; `tree` is 128 correlated roots with frequencies falling as a power of their rank and four
children each, of which at most one is active, and only with its root: 640 vectors in 96 dimensions.

Settings vary one at a time around the default: learning rate (`--factors`), batch size, k and width. Every library sees
the same rows once, in the same order; the peers run at three rates, with our batch size and with 4096. Run it with the
`peers` extra; `--peers none` leaves them out. A row that the file `--out` holds is not run again.

F1 is that of each feature as a detector of the planted vector nearest it, averaged; MCC the mean cosine of features and
planted vectors matched one to one (arXiv 2505.20254); recovery the mean over the planted vectors of the best cosine of
any feature. `dead` counts features that fire on no held-out row, `dead_in_training` those that the finished SAE has on
none of the rows it was trained on: a rare feature is silent on few rows.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("STEERSMAN_PROGRESS", "0")

import torch
import tyro
from torch import Tensor

from steersman.sae import SAE, SAEConfig, compare_saes
from steersman.train import ActivationStore, TrainConfig, resolve, train_sae

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Literal["planted", "mixture", "tree", "store"] = "planted"
    """What to train on."""
    store: Path | None = None
    """The store, for --data store."""
    rows: int = 500_000
    """Rows of made data."""
    d_sae: int | None = None
    """Features; by default those of the made dictionary."""
    k: int | None = None
    """Active features; by default those of the made data."""
    architectures: tuple[str, ...] = ("topk",)
    """Our architectures."""
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Our learning rates, in units of the default."""
    batches: tuple[float, ...] = ()
    """Our further batch sizes, in units of the default."""
    ks: tuple[float, ...] = ()
    """Further numbers of active features, in units of the default."""
    widths: tuple[float, ...] = ()
    """Further widths, in units of the default."""
    settings: tuple[str, ...] = ()
    """Further fields of `TrainConfig`, each as NAME=JSON, each varied alone at the default rate."""
    peers: tuple[str, ...] = ("eai-sparsify", "sae-lens")
    """Libraries to run beside it; `none` for none."""
    peer_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Their learning rates."""
    seed: int = 0
    """Seed of data and training."""
    out: Path | None = None
    """The JSON file of finished rows, which later calls add to."""


# Made data


class Made(NamedTuple):
    """A dictionary and what its rows are made by."""

    vectors: Tensor
    """[atoms, D]"""
    active: int
    """Active atoms a row, about."""
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    """Rows [N, D] and the strengths of their atoms [N, atoms]."""


def made(data: str, seed: int) -> Made:
    g = torch.Generator().manual_seed(seed)
    n, d, active = {"planted": (512, 64, 8), "mixture": (1024, 128, 10), "tree": (640, 96, 15)}[data]
    vectors = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    if data == "tree":
        return Made(vectors, active, _tree(vectors, g))
    weights = torch.ones(n) if data == "planted" else torch.arange(1, n + 1).float() ** -0.5
    noise = 0.0 if data == "planted" else 0.02

    def draw(m: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.multinomial(weights.expand(m, n), active, generator=g)
        strength = torch.rand(m, active, generator=g) + 0.5
        rows = torch.nn.functional.embedding_bag(chosen, vectors, mode="sum", per_sample_weights=strength)
        return rows + noise * torch.randn(m, d, generator=g), torch.zeros(m, n).scatter_(1, chosen, strength)

    return Made(vectors, active, draw)


def _tree(vectors: Tensor, g: torch.Generator, roots: int = 128, children: int = 4) -> Any:
    """Roots fire by a Gaussian copula of low rank; with each, in three of four rows, one of its children."""
    rate = 0.4 * torch.arange(1, roots + 1).float() ** -0.5
    bar = math.sqrt(2) * torch.erfinv(1 - 2 * rate)
    loadings = 0.3 * torch.nn.functional.normalize(torch.randn(roots, 8, generator=g), dim=1)
    own = (1 - loadings.square().sum(1)).sqrt()
    share = torch.tensor([0.4, 0.2, 0.1, 0.05, 0.25])  # of the children, and of none

    def draw(m: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        z = torch.randn(m, 8, generator=g) @ loadings.T + own * torch.randn(m, roots, generator=g)
        root = z > bar
        child = torch.multinomial(share, m * roots, replacement=True, generator=g).view(m, roots)
        fires = torch.nn.functional.one_hot(child, children + 1)[..., :children].bool() & root[..., None]
        both = torch.cat([root, fires.flatten(1)], dim=1)
        strength = both * (torch.rand(m, len(vectors), generator=g) * 0.5 + 0.75)
        return strength @ vectors, strength

    return draw


def blocks(world: Made, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    for start in range(0, rows, 20_000):
        yield world.draw(min(20_000, rows - start), g)


# What was found


class Trained(NamedTuple):
    """An SAE of any library."""

    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Of rows [N, D] the dense code [N, L] and the reconstruction."""
    W_dec: Tensor


def measured(trained: Trained, heldout: list[tuple[Tensor, Tensor | None]], vectors: Tensor | None) -> Row:
    """The figures over held-out rows and, of made data, the strengths of their atoms."""
    W_dec = torch.nn.functional.normalize(trained.W_dec.detach(), dim=1)
    nearest = None if vectors is None else (W_dec @ vectors.T).abs().argmax(dim=1)
    counts = torch.zeros(3, len(W_dec), dtype=torch.float64)  # fired, atom active, both
    x = torch.cat([rows for rows, _ in heldout])
    error, variance, active = 0.0, float((x - x.mean(0)).double().square().sum()), 0
    for rows, strength in heldout:
        with torch.no_grad():
            f, x_hat = trained.run(rows)
        error += float((rows - x_hat).double().square().sum())
        fired = f.abs() > 0
        active += int(fired.sum())
        counts[0] += fired.sum(0)
        if strength is not None and nearest is not None:
            there = strength[:, nearest] > 0
            counts[1] += there.sum(0)
            counts[2] += (there & fired).sum(0)
    found: Row = {"fvu": error / variance, "l0": active / len(x), "dead": float((counts[0] == 0).double().mean())}
    if vectors is not None:
        truth = SAE(SAEConfig(d_in=vectors.shape[1], d_sae=len(vectors), k=1))
        ours = SAE(SAEConfig(d_in=vectors.shape[1], d_sae=len(W_dec), k=1))
        truth.W_dec.data, ours.W_dec.data = vectors, W_dec
        f1 = 2 * counts[2] / (counts[0] + counts[1]).clamp_min(1)
        found |= {"f1": float(f1.mean()), "mcc": compare_saes(ours, truth, by="decoder").mcc}
        found["recovery"] = float((vectors @ W_dec.T).max(dim=1).values.mean())
    return found


def run_sparsify(batches: list[Tensor], d_sae: int, k: int, lr: float) -> Trained:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    sae = SparseCoder(batches[0].shape[1], SparseCoderConfig(num_latents=d_sae, k=k))
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

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = sae(x, x)
        return torch.zeros(len(x), d_sae).scatter_(1, out.latent_indices, out.latent_acts), out.sae_out

    return Trained(run, sae.W_dec)


def run_saelens(batches: list[Tensor], d_sae: int, k: int, lr: float) -> Trained:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    D = batches[0].shape[1]
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

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        f = sae.encode(x * scale)
        return f, sae.decode(f) / scale

    return Trained(run, sae.W_dec)


PEERS: dict[str, tuple[str, Any]] = {
    "eai-sparsify": ("sparsify", run_sparsify),
    "sae-lens": ("sae_lens", run_saelens),
}
"""Library -> its module, and what trains with it."""


class Results:
    """The rows of the file, which grows by one as each is finished."""

    def __init__(self, out: Path | None):
        self.out = out
        self.rows: list[Row] = json.loads(out.read_text()) if out is not None and out.exists() else []

    def add(self, cell: Row, run: Callable[[], Row]) -> None:
        """Run a cell that is not there yet."""
        if any(all(row.get(name) == value for name, value in cell.items()) for row in self.rows):
            return
        start = time.process_time()
        row = cell | run() | {"cpu_seconds": time.process_time() - start}
        self.rows.append(row)
        if self.out is not None:
            self.out.write_text(json.dumps(self.rows, indent=1) + "\n")
        shown = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in row.items())
        print("  ".join(f"{name} {value}" for name, value in shown), flush=True)


def of_architecture(architecture: str, d_sae: int, k: int, **settings: Any) -> TrainConfig:
    sparsity: Row = {"k": k} if SAE.architectures[architecture].uses_k else {"target_l0": float(k)}
    return TrainConfig(architecture=architecture, d_sae=d_sae, device="cpu", **sparsity, **settings)


def neighbours(
    args: Config, default: TrainConfig, lr: float, batch_size: int, k: int
) -> Iterator[tuple[Row, TrainConfig]]:
    """The default and what differs from it in one thing, each with its name."""
    for factor in args.factors:
        yield {"varied": "lr", "factor": factor}, default if factor == 1 else replace(default, lr=lr * factor)
    for factor in args.batches:
        yield {"varied": "batch", "factor": factor}, replace(default, batch_size=round(batch_size * factor))
    for factor in args.ks:
        other = of_architecture(default.architecture, default.d_sae, round(k * factor), seed=args.seed)
        yield {"varied": "k", "factor": factor}, other
    for factor in args.widths:
        other = of_architecture(default.architecture, round(default.d_sae * factor), k, seed=args.seed)
        yield {"varied": "width", "factor": factor}, other
    for setting in args.settings:
        name, value = setting.split("=", 1)
        yield {"varied": name, "factor": json.loads(value)}, replace(default, **{name: json.loads(value)})


def main(args: Config) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        vectors, k, d_sae = None, args.k, args.d_sae
        if args.data == "store":
            if args.store is None:
                raise SystemExit("--data store needs --store")
            store = ActivationStore.open(args.store)
            batches = store.batches(4096, split="heldout", shuffle=False, drop_last=False)
            heldout: list[tuple[Tensor, Tensor | None]] = [(batch.x.float(), None) for batch in batches]
        else:
            world = made(args.data, args.seed)
            vectors, k, d_sae = world.vectors, k or world.active, d_sae or len(world.vectors)
            drawn = (rows for rows, _ in blocks(world, args.rows, args.seed + 1))
            store = ActivationStore.from_tensors(drawn, f"{scratch}/acts", "made", dtype="float32")
            heldout = list(blocks(world, 40_000, args.seed + 2))
        if k is None or d_sae is None:
            raise SystemExit("--data store needs --d-sae and --k")
        results, n_rows = Results(args.out), store.n_batches(1)
        common = {"data": str(args.store or args.data), "rows": n_rows, "seed": args.seed}
        batch_size = 0
        for architecture in args.architectures:
            default = of_architecture(architecture, d_sae, k, seed=args.seed)
            recipe = resolve(default, store.d_in, n_rows)
            batch_size = recipe.batch_size
            for number, (name, config) in enumerate(neighbours(args, default, recipe.lr, batch_size, k)):

                def run(config: TrainConfig = config, number: int = number, architecture: str = architecture) -> Row:
                    sae = train_sae(store, config, f"{scratch}/{architecture}_{number}")
                    stats = sae.feature_stats
                    dead = None if stats is None else float((stats.density == 0).float().mean())
                    trained = Trained(lambda x: ((f := sae.encode(x)), sae.decode(f)), sae.W_dec)
                    return measured(trained, heldout, vectors) | {"dead_in_training": dead}

                of = resolve(config, store.d_in, n_rows)
                cell = {
                    "library": "steersman",
                    "architecture": architecture,
                    **name,
                    "lr": of.lr,
                    "batch": of.batch_size,
                }
                results.add(
                    common
                    | cell
                    | {"k": k if name["varied"] != "k" else round(k * name["factor"]), "d_sae": config.d_sae},
                    run,
                )
        for name in args.peers if args.peers != ("none",) else ():
            module, peer = PEERS[name]
            if not find_spec(module):
                print(f"{name} is not installed: left out (pip install steersman[peers] for it)")
                continue
            for size in sorted({batch_size, 4096}):
                batches = [b.x.float() for b in store.batches(size, seed=args.seed)]
                for lr in args.peer_rates:
                    cell = {"library": name, "architecture": "topk", "lr": lr, "batch": size, "k": k, "d_sae": d_sae}
                    results.add(
                        common | cell,
                        lambda: measured(peer(batches, d_sae, k, lr), heldout, vectors),  # noqa: B023
                    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
