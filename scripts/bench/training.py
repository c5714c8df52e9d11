"""Time one training step against eai-sparsify's and against the bare matrix product of its encoder, on the same data,
in turn, in one process.

Run it in an environment with the `peers` extra: `pip install steersman[peers]`.

    python scripts/bench/training.py --d-sae 4096 16384 --steps 20
    python scripts/bench/training.py --d-sae 16384 --architectures topk batch_topk matryoshka jumprelu --threads 1

With several `--architectures`, it is their steps that are timed, in turn, and given over that of the first.

Both steps read the same batches and do what their trainers do for a batch already in memory: forward, backward,
projection of the decoder's gradient, an Adam step, decoder normalisation, dead-feature counters. Peak memory is what
five steps add to a process of each library, over what it holds with the data and every import done.

The product is x [N, D] times W [D, L] in the faster of fp32 and bf16, which is bf16 where the processor has
instructions for it. Ratios are medians over rounds. On one thread they are given for processor time too, which other
work on the machine disturbs less than the clock on the wall.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import torch
import tyro

from steersman.sae import SAE, SAEConfig
from steersman.train import ActivationStats, TrainConfig, Trainer, resolve


@dataclass(frozen=True, kw_only=True)
class Config:
    batch_size: int = 4096
    """Tokens a step."""
    d_sae: tuple[int, ...] = (4096,)
    """Numbers of features to time."""
    d_in: int = 384
    """Width."""
    k: int = 32
    """Active features; of architectures that have no k, how many are to be active on average."""
    architectures: tuple[str, ...] = ("topk",)
    """What is trained; of several the steps are compared with that of the first, and not with another library's."""
    dead: int = 0
    """Features that are dead in every step, so that AuxK is part of it."""
    steps: int = 15
    """Timed steps of each library, after three that are not."""
    threads: int = 0
    """Threads of PyTorch; 0 leaves its default."""
    memory: bool = True
    """Measure peak memory too."""
    out: Path | None = None
    """Also write the rows to this JSON file."""
    child: str | None = None
    """Used by the script itself: take steps with this library and print the peak memory."""


def our_step(args: Config, d_sae: int, x: torch.Tensor, architecture: str = "topk") -> Any:
    kind = SAE.architectures[architecture]
    config = TrainConfig(
        d_sae=d_sae,
        k=args.k if kind.uses_k else 0,
        target_l0=None if kind.uses_k else args.k,
        architecture=architecture,
        batch_size=args.batch_size,
        device="cpu",
    )
    squared = float(x.square().sum(dim=1).mean())
    norms = x.norm(dim=1)
    stats = ActivationStats(
        mean=x.mean(dim=0),
        mean_norm=float(norms.mean()),
        median_norm=float(norms.median()),
        mean_squared_norm=squared,
        n_rows=len(x),
    )
    # A long run, so that no warm-up or decay falls into what is timed.
    recipe = replace(resolve(config, args.d_in, 10_000_000), warmup_steps=0)
    cfg = SAEConfig(d_in=args.d_in, d_sae=d_sae, k=config.k, architecture=architecture, group_sizes=config.group_sizes)
    trainer = Trainer(config, recipe, stats, cfg)
    trainer.fit_encoder_scale(x)

    def with_dead(x: torch.Tensor) -> None:
        silent = torch.zeros(d_sae, dtype=torch.int32)
        silent[:: d_sae // args.dead] = trainer.recipe.dead_after_steps
        trainer.dead_latents.restore(silent)
        trainer.step(x)

    return with_dead if args.dead else trainer.step


def sparsify_step(args: Config, d_sae: int, x: torch.Tensor) -> Any:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    sae = SparseCoder(args.d_in, SparseCoderConfig(num_latents=d_sae, k=args.k))
    sae.b_dec.data = x.mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    since_fired = torch.zeros(d_sae, dtype=torch.long)

    def step(x: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(d_sae, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since_fired.add_(len(x))
        since_fired[fired] = 0

    return step


def product(args: Config, d_sae: int, x: torch.Tensor) -> Any:
    """The matrix product alone, in the faster of bf16 and fp32: the floor of a step that computes every
    pre-activation."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        W, few = torch.randn(d_sae, args.d_in, dtype=dtype), x[:256].to(dtype)
        torch.mm(few, W.T)
        start = time.perf_counter()
        torch.mm(few, W.T)
        found.append((time.perf_counter() - start, dtype, W))
    _, dtype, W = min(found, key=lambda each: each[0])
    rows, Z = x.to(dtype), torch.empty(len(x), d_sae, dtype=dtype)
    return lambda _: torch.mm(rows, W.T, out=Z)


PEER, PRODUCT = "eai-sparsify", "product"
MAKERS = {"steersman": our_step, PEER: sparsify_step}


def made_batches(args: Config) -> torch.Tensor:
    """Three batches: a mixture of sparse directions, so that the code is used as it is on real activations."""
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(2 * args.d_in, args.d_in), dim=1)
    active = torch.rand(3, args.batch_size, len(atoms)).topk(16, dim=2).indices
    batches = torch.stack([atoms[a].sum(dim=1) for a in active])
    return batches + 0.05 * torch.randn(3, args.batch_size, args.d_in)


def peak_mb(args: Config, d_sae: int, name: str) -> float:
    """Peak memory in MB that steps of a library add, in a process of its own."""
    command = [sys.executable, __file__, "--d-sae", str(d_sae), "--d-in", str(args.d_in), "--k", str(args.k)]
    command += ["--batch-size", str(args.batch_size), "--threads", str(args.threads), "--child", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident(field: str) -> float:
    """MB that the process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def take_steps(args: Config, name: str) -> None:
    """What the process of `peak_mb` does. The libraries' threads and imports are paid for by a tiny SAE first."""
    batches = made_batches(args)
    warm = MAKERS[name](args, 2048, batches[0, :512])
    warm(batches[0, :512])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step = MAKERS[name](args, args.d_sae[0], batches[0])
    for i in range(5):
        step(batches[i % 3])
    print(resident("VmHWM") - before)


def compare_architectures(args: Config) -> None:
    """Steps of each architecture, in turn in one process, and their times over those of the first."""
    for d_sae in args.d_sae:
        batches = made_batches(args)
        steps = {name: our_step(args, d_sae, batches[0], name) for name in args.architectures}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(args.steps + 3):
            for name, step in steps.items():
                start = time.process_time()
                step(batches[i % 3])
                times[name].append(time.process_time() - start)
        times = {name: found[3:] for name, found in times.items()}
        first = times[args.architectures[0]]
        for name, found in times.items():
            ratio = statistics.median(own / other for own, other in zip(found, first))
            print(f"d_sae {d_sae}  {name:<16} {1e3 * statistics.median(found):7.0f} ms of processor  ratio {ratio:.3f}")


def main(args: Config) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child is not None:
        take_steps(args, args.child)
        return
    if len(args.architectures) > 1:
        compare_architectures(args)
        return
    makers = {name: make for name, make in MAKERS.items() if name != PEER or find_spec("sparsify")}
    if PEER not in makers:
        print(f"{PEER} is not installed: steersman alone (pip install steersman[peers] for both)")
    rows = []
    for d_sae in args.d_sae:
        batches = made_batches(args)
        steps = {name: make(args, d_sae, batches[0]) for name, make in makers.items()}
        steps[PRODUCT] = product(args, d_sae, batches[0])
        clocks = {"": time.perf_counter} | ({"cpu ": time.process_time} if torch.get_num_threads() == 1 else {})
        times: dict[str, list[list[float]]] = {name: [] for name in steps}
        for i in range(args.steps + 3):
            for name, step in steps.items():
                start = [now() for now in clocks.values()]
                step(batches[i % 3])
                if i >= 3:
                    times[name].append([now() - then for now, then in zip(clocks.values(), start)])
        row: dict[str, Any] = {"d_sae": d_sae, "d_in": args.d_in, "k": args.k, "batch_size": args.batch_size}
        row |= {f"{name} ms": 1e3 * statistics.median(t for t, *_ in found) for name, found in times.items()}
        steps.pop(PRODUCT)
        pairs = {"step/product": ("steersman", PRODUCT), "ratio": (PEER, "steersman")}
        for j, clock in enumerate(clocks):
            for label, (above, below) in pairs.items():
                if above in times:
                    row[clock + label] = statistics.median(a[j] / b[j] for a, b in zip(times[above], times[below]))
        if args.memory:
            row |= {f"{name} peak MB": peak_mb(args, d_sae, name) for name in steps}
        rows.append(row | {"threads": torch.get_num_threads(), "torch": torch.__version__})
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in rows[-1].items()
            )
        )
    if args.out is not None:
        args.out.write_text(json.dumps({"args": asdict(args) | {"out": None}, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
