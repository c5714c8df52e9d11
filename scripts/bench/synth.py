"""Find a planted dictionary: our trainers beside SAELens', on SynthSAEBench's data, judged by SAELens' own measures.

    python scripts/bench/synth.py --folder synth --out synth.json                          # the small size, on a CPU
    python scripts/bench/synth.py --folder synth --out synth16k.json --size 16k --device cuda

SynthSAEBench (arXiv 2602.14687; `sae_lens.synthetic`) makes activations of known features: unit vectors in
superposition, with firing rates that fall as a power of their rank, correlations of low rank, and a forest in which a
child fires only with its parent and never with a sibling. `16k` is its standard model, 16,384 features in 768
dimensions, of which an SAE of 4,096 latents sees 200 million samples; `small` is the same kind of world with 3,072
features in 256 dimensions, 768 latents and half a million samples. Both have four features to a latent.

Both sides see the same rows in the same order, once. SAELens' trainer is `SAETrainer` at each of `--rates` and
`--peer-batches`, the rate falling over the last fifth; a latent counts as dead after a tenth of the run, because the
default of 1000 steps would leave its AuxK out of short runs. The rest is its defaults. Then both SAEs are opened by
SAELens from the folder that was saved, as users would, and measured by its `eval_sae_on_synthetic_data` on rows that
neither saw: F1 of each latent as a detector of the feature nearest it (mean), MCC, uniqueness, explained variance, L0.
CPU seconds are those of the whole call that trains, with what it reads, plots and saves; ours also measures on
held-out rows and takes statistics. `--speed` times the steps alone, ours and theirs in turn on the same batches.

Every finished row is in the file `--out` at once; a row that is there is not run again. It needs the `peers` extra.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("STEERSMAN_PROGRESS", "0")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import tyro
from sae_lens import SAE as PeerSAE  # pyright: ignore[reportMissingImports]
from sae_lens import synthetic  # pyright: ignore[reportMissingImports]
from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore[reportMissingImports]
from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]
from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]
from torch import Tensor

from steersman.sae import SAE as OurSAE
from steersman.sae import SAEConfig
from steersman.train import ActivationBatch, ActivationStats, ActivationStore, TrainConfig, Trainer, resolve, train_sae

Side = Literal["ours", "saelens"]
Row = dict[str, Any]

PEER_NAMES = {
    "topk": "topk",
    "batch_topk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
    "jumprelu": "jumprelu",
}
"""Our architectures, and what SAELens calls theirs."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A size of the benchmark."""

    n_features: int
    d_in: int
    d_sae: int
    exponent: float
    p_min: float
    orthogonal_steps: int
    samples: int
    widths: tuple[int, ...]
    """Nested widths of Matryoshka SAEs, of both sides."""


WORLDS = {
    "small": World(
        n_features=3072, d_in=256, d_sae=768, exponent=0.4, p_min=1e-3, orthogonal_steps=0, samples=500_000,
        widths=(24, 96, 384, 768),
    ),
    "16k": World(
        n_features=16384, d_in=768, d_sae=4096, exponent=0.5, p_min=5e-4, orthogonal_steps=100, samples=200_000_000,
        widths=(128, 512, 2048, 4096),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    folder: Path
    """Where the small size's rows are kept between calls, and SAEs while they are measured."""
    out: Path
    """The JSON file of finished rows, which later calls add to."""
    size: Literal["small", "16k"] = "small"
    """Which world."""
    samples: int | None = None
    """Rows to train on; by default those of the size."""
    side: Literal["ours", "saelens", "both"] = "both"
    """Whose trainers."""
    architectures: tuple[str, ...] = tuple(PEER_NAMES)
    """Which architectures."""
    l0: tuple[int, ...] = (25,)
    """Active latents a token."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """SAELens' learning rates. Its default, 3e-4, is for runs a hundred times as long as the small size."""
    peer_batches: tuple[int, ...] = (512,)
    """SAELens' batch sizes: 512 is our own default for the small size, 1024 the default of its runner."""
    factors: tuple[float, ...] = (1.0,)
    """Our learning rates, in units of the default."""
    batch_sizes: tuple[int, ...] = (0,)
    """Our batch sizes; 0 is the default."""
    options: tuple[str, ...] = ()
    """Further fields of our `TrainConfig`, as NAME=JSON; rows with them are rows of their own."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the SAEs; the rows stay the same."""
    eval_samples: int = 50_000
    """Rows to measure on."""
    device: str = "cpu"
    """Where to train; the 16k size is meant for a GPU."""
    threads: int = 0
    """Threads of PyTorch; 0 leaves its default."""
    only: str = ""
    """Run only the rows whose key holds this text."""
    speed: bool = False
    """Run nothing else: time the steps of both trainers, in turn."""
    table: bool = False
    """Run nothing: print the file's rows as a table, SAELens at its best rate (by F1)."""


def world_model(world: World, device: str) -> Any:
    """The generator of a world."""
    steps = world.orthogonal_steps
    return synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=world.n_features,
            hidden_dim=world.d_in,
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(
                exponent=world.exponent, max_prob=0.4, min_prob=world.p_min
            ),
            hierarchy=synthetic.HierarchyConfig(
                total_root_nodes=128, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
            ),
            orthogonalization=synthetic.OrthogonalizationConfig(num_steps=steps, lr=3e-4) if steps else None,
            correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
            bias=False,
            seed=0,
        ),
        device=device,
    )  # fmt: skip


def seeded(model: Any, number: int, n: int) -> tuple[Tensor, Tensor]:
    """Block `number` of a world's samples: rows [n, D] and their features [n, F]. Block -1 is for measuring."""
    with torch.random.fork_rng([model.device] if model.device.startswith("cuda") else []):
        torch.manual_seed(1_000_003 + number)
        return model.sample_with_features(n)


class Generated:
    """The samples of a world as a source of training rows, made as they are read. Block 0 is held out."""

    BLOCK = 16_384
    hook_name, model_name = "made", "synthsaebench"

    def __init__(self, model: Any, samples: int):
        self.model, self.samples = model, samples
        self.d_in, self.fingerprint = model.cfg.hidden_dim, f"synthsaebench {samples}"

    def stats(self) -> ActivationStats:
        x = seeded(self.model, 0, self.BLOCK)[0].cpu()
        norms = x.norm(dim=1)
        return ActivationStats(
            mean=x.mean(0), mean_norm=float(norms.mean()), median_norm=float(norms.median()),
            mean_squared_norm=float(norms.square().mean()), n_rows=len(x),
        )  # fmt: skip

    def n_batches(self, batch_size: int, *, split: str = "train", **_: Any) -> int:
        return (self.samples if split == "train" else self.BLOCK) // batch_size

    def batches(self, batch_size: int, *, split: str = "train", start: int = 0, **_: Any) -> Iterator[ActivationBatch]:
        per_block = self.BLOCK // batch_size
        n = self.n_batches(batch_size, split=split)
        rows = torch.empty(0, self.d_in)
        for i in range(start, n):
            if i == start or i % per_block == 0:
                rows = seeded(self.model, 0 if split != "train" else 1 + i // per_block, self.BLOCK)[0]
            x = rows[i % per_block * batch_size : (i % per_block + 1) * batch_size]
            yield ActivationBatch(x=x, find_rows=partial(np.arange, len(x)), find_info=_nothing_known)


def _nothing_known(_: np.ndarray) -> Any:
    raise NotImplementedError("made rows come from no text")


def source_of(args: Config, model: Any, samples: int) -> Any:
    """The rows to train on: those of the small size are kept on disk."""
    if args.size != "small":
        return Generated(model, samples)
    folder = args.folder / f"{args.size}_{samples}"
    if not folder.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        n_blocks = -(-samples // (19 * Generated.BLOCK)) * 20  # a twentieth is held out
        blocks = (seeded(model, 1 + i, Generated.BLOCK)[0] for i in range(n_blocks))
        ActivationStore.from_tensors(blocks, folder, "made", dtype="float32")
    return ActivationStore.open(folder)


class Replay:
    """The rows to measure on, drawn once: what SAELens' measures ask of a generator and of its dictionary."""

    def __init__(self, model: Any, samples: int, block: int = 4096):
        self.feature_vectors = model.feature_dict.feature_vectors
        self._decode, self._next = model.feature_dict, 0
        parts = [seeded(model, -1 - i, block)[1] for i in range(-(-samples // block))]
        self._features = [part.to_sparse() for part in parts]
        self.block, self.samples = block, block * len(parts)

    def sample(self, n: int) -> Tensor:
        assert n == self.block
        self._next += 1
        return self._features[(self._next - 1) % len(self._features)].to_dense()

    def __call__(self, features: Tensor) -> Tensor:
        return self._decode(features)


def measured(folder: Path, replay: Replay, device: str) -> Row:
    """What SAELens finds of the SAE that a folder holds."""
    found = synthetic.eval_sae_on_synthetic_data(
        PeerSAE.load_from_disk(str(folder), device=device), replay, replay, replay.samples, replay.block
    )
    quality = found.classification
    return {
        "f1": quality.f1_score, "mcc": found.mcc, "uniqueness": found.uniqueness, "ev": found.explained_variance,
        "l0": found.sae_l0, "precision": quality.precision, "recall": quality.recall, "dead": found.dead_latents,
    }  # fmt: skip


# Our side


def our_config(args: Config, cell: Row, source: Any) -> TrainConfig:
    world = WORLDS[args.size]
    chosen = dict(option.split("=", 1) for option in cell["options"])
    chosen = {name: json.loads(value) for name, value in chosen.items()}
    kind = OurSAE.architectures[cell["architecture"]]
    chosen |= {"k": cell["target"]} if kind.uses_k else {"target_l0": float(cell["target"])}
    if kind.uses_groups:
        chosen["matryoshka_widths"] = world.widths
    config = TrainConfig(
        d_sae=world.d_sae, architecture=cell["architecture"], seed=cell["seed"], device=args.device,
        batch_size=cell["batch_size"] or None, tokens=cell["samples"], statistics_tokens=65_536, log_every=50, **chosen,
    )  # fmt: skip
    if cell["rate"] == 1:
        return config
    return replace(config, lr=resolve(config, source.d_in, source.n_batches(1)).lr * cell["rate"])


def ours(args: Config, cell: Row, source: Any, out: Path) -> None:
    train_sae(source, our_config(args, cell, source), out)


# SAELens' side


def peer_trainer(args: Config, cell: Row, source: Any) -> Any:
    batch_size = cell["batch_size"]
    world, name = WORLDS[args.size], PEER_NAMES[cell["architecture"]]
    settings: Row = {"d_in": world.d_in, "d_sae": world.d_sae, "device": args.device}
    if name == "jumprelu":  # Gemma Scope 2's penalty, as ours
        settings |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": cell["target"]}
    else:
        settings["k"] = cell["target"]
    if name == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = list(world.widths)
    settings |= {"normalize_activations": "expected_average_only_in"}
    torch.manual_seed(cell["seed"])
    kind, config = get_sae_training_class(name)
    n_steps = cell["samples"] // batch_size
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=n_steps * batch_size, train_batch_size_samples=batch_size, device=args.device,
            lr=cell["rate"], lr_end=cell["rate"] / 10, lr_decay_steps=n_steps // 5,
            dead_feature_window=min(1000, n_steps // 10),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        kind(config(**settings)),
        _rows_of(source, batch_size),
    )  # fmt: skip
    trainer.activation_scaler.scaling_factor = world.d_in**0.5 / source.stats().mean_norm  # as it would estimate it
    return trainer


def saelens(args: Config, cell: Row, source: Any, out: Path) -> None:
    peer_trainer(args, cell, source).fit().save_inference_model(str(out))


def _rows_of(source: Any, batch_size: int) -> Iterator[Tensor]:
    while True:
        for batch in source.batches(batch_size):
            yield batch.x.float()


def step_times(args: Config, cell: Row, source: Any, steps: int = 20, rounds: int = 7) -> Row:
    """CPU microseconds a sample of a step of each trainer, in turn on the same batches: medians over rounds, after one
    that is not counted."""
    size = cell["batch_size"]
    config = our_config(args, {**cell, "batch_size": size, "options": [], "rate": 1}, source)
    recipe = resolve(config, source.d_in, source.n_batches(1))
    sae = SAEConfig(
        d_in=source.d_in, d_sae=config.d_sae, k=config.k, architecture=config.architecture,
        group_sizes=config.group_sizes,
    )  # fmt: skip
    trainer = Trainer(config, recipe, source.stats(), sae)
    peer = peer_trainer(args, {**cell, "rate": 3e-3}, source)
    batches = list(islice(_rows_of(source, size), steps))
    trainer.fit_encoder_scale(batches[0])
    times: dict[str, list[float]] = {"ours": [], "saelens": []}
    for _ in range(rounds + 1):
        for side, step in (("ours", trainer.step), ("saelens", peer.step)):
            start = time.process_time()
            for rows in batches:
                step(rows)
            times[side].append((time.process_time() - start) / (steps * size) * 1e6)
    found = {side: statistics.median(each[1:]) for side, each in times.items()}
    return {**found, "ratio": statistics.median(b / a for a, b in zip(times["ours"][1:], times["saelens"][1:]))}


SIDES: dict[str, Callable[[Config, Row, Any, Path], None]] = {"ours": ours, "saelens": saelens}


def cells(args: Config) -> Iterator[Row]:
    """What to run: for each architecture, L0 and seed, ours and theirs in turn."""
    samples = args.samples or WORLDS[args.size].samples
    for seed in args.seeds:
        for target in args.l0:
            for architecture in args.architectures:
                cell = {"size": args.size, "samples": samples, "architecture": architecture, "target": target}
                cell |= {"seed": seed}
                of_ours = [
                    cell | {"side": "ours", "rate": factor, "batch_size": size, "options": list(args.options)}
                    for factor in args.factors
                    for size in args.batch_sizes
                ]
                of_theirs = [
                    cell | {"side": "saelens", "rate": rate, "batch_size": size}
                    for rate in args.rates
                    for size in args.peer_batches
                ]
                of_theirs = of_theirs if architecture in PEER_NAMES else []
                for pair in zip(of_ours + [None] * len(of_theirs), of_theirs + [None] * len(of_ours)):
                    yield from (one for one in pair if one and args.side in ("both", one["side"]))


def key(cell: Row) -> str:
    """What a row is known by."""
    names = ("size", "samples", "side", "architecture", "target", "rate", "batch_size", "options", "seed")
    return " ".join(f"{name}={cell[name]}" for name in names if cell.get(name) not in (None, [], 0) or name == "seed")


def table(rows: list[Row]) -> str:
    """Rows at our defaults beside SAELens' at the rate with the best F1, in Markdown."""
    lines = ["| L0 | architecture | trainer | F1 | MCC | uniqueness | explained variance | L0 found |"]
    lines += ["|---" * 8 + "|"]
    defaults = [
        row
        for row in rows
        if row.get("side") == "ours" and not row["options"] and key({**row, "rate": 1.0, "batch_size": 0}) == row["key"]
    ]
    for row in sorted(defaults, key=lambda row: (row["target"], list(PEER_NAMES).index(row["architecture"]))):
        same = ("size", "samples", "architecture", "target", "seed")
        theirs = [other for other in rows if other.get("side") == "saelens" and all(other[x] == row[x] for x in same)]
        for one in (row, *([max(theirs, key=lambda other: other["f1"])] if theirs else [])):
            trainer = "Steersman" if one is row else f"SAELens, rate {one['rate']:g}"
            figures = [f"{one[name]:.3f}" for name in ("f1", "mcc", "uniqueness", "ev")]
            figures += [f"{one['l0']:.1f}"]
            lines.append(f"| {one['target']} | `{one['architecture']}` | {trainer} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(args: Config) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row] = json.loads(args.out.read_text()) if args.out.exists() else []
    if args.table:
        print(table(rows))
        return
    done = {row["key"] for row in rows}
    if args.speed:
        for architecture in args.architectures:
            cell = {"size": args.size, "architecture": architecture, "target": args.l0[0], "seed": 0}
            cell |= {"samples": args.samples or WORLDS[args.size].samples, "batch_size": args.peer_batches[0]}
            source = source_of(args, world_model(WORLDS[args.size], args.device), cell["samples"])
            name = f"speed {key(cell)}"
            row = {"key": name, **cell, **step_times(args, cell, source)}
            rows = [one for one in rows if one["key"] != name] + [row]
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(architecture, "µs a sample", {side: round(row[side], 2) for side in ("ours", "saelens", "ratio")})
        return
    wanted = [(key(cell), cell) for cell in cells(args)]
    wanted = [(name, cell) for name, cell in wanted if name not in done and args.only in name]
    if not wanted:
        print("every row is there")
        return
    model = world_model(WORLDS[args.size], args.device)
    replay = Replay(model, args.eval_samples)
    for name, cell in wanted:
        source, out = source_of(args, model, cell["samples"]), args.folder / name.replace("/", "_").replace(" ", ",")
        shutil.rmtree(out, ignore_errors=True)  # an SAE that other code trained is not this one, nor its time
        cpu, wall = time.process_time(), time.perf_counter()
        SIDES[cell["side"]](args, cell, source, out)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        row = {"key": name, **cell, **measured(out, replay, args.device)}
        row |= {"cpu_seconds": cpu, "seconds": wall, "us_per_sample": 1e6 * cpu / cell["samples"]}
        rows.append(row)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
        figures = ("f1", "mcc", "uniqueness", "ev", "l0", "dead", "us_per_sample")
        print(name, " ".join(f"{figure} {row[figure]:.4g}" for figure in figures), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
