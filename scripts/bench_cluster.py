"""Time caching by two ranks against one, and training with checkpoints against training without, each pair in turn.

    python scripts/bench_cluster.py --rounds 3

`caching` runs `cache_activations` in one process and in two started by `torchrun`, a thread each; timed is the call
alone, from text to finished store, as the first rank sees it. `checkpoints` trains the same SAE with a checkpoint
every 100 steps and with none, in one process, from a store to the saved folder.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["STEERSMAN_PROGRESS"] = "0"

import torch
import tyro

from steersman import ActivationStore, LanguageModel, TrainConfig, cache_activations, train_sae
from steersman.demo import MODEL_PATH, texts
from steersman.train.parallel import launched


@dataclass(frozen=True, kw_only=True)
class Args:
    parts: tuple[str, ...] = ("caching", "checkpoints")
    """What to measure."""
    rounds: int = 3
    """Timed rounds, after one that is not."""
    tokens: int = 262_144
    """Rows cached."""
    shard_rows: int = 32_768
    """Rows of a shard, which is what ranks share out: a real store has tens of shards."""
    d_in: int = 384
    """Width of the SAE that is trained."""
    d_sae: int = 4096
    """Its features."""
    steps: int = 400
    """Its steps, of 4096 rows each."""
    child: Path | None = None
    """Used by the script itself: cache into this folder and print the seconds."""


def cache(args: Args, out: Path) -> None:
    """What a rank runs."""
    torch.set_num_threads(1)
    lm = LanguageModel.load(str(MODEL_PATH), device="cpu")
    stories = texts(args.tokens // 60 + 50, seed=0)
    lm.logits(torch.zeros(1, 8, dtype=torch.long))
    start = time.perf_counter()
    cache_activations(
        lm, stories, hook="blocks.2.hook_resid_post", out=str(out), tokens=args.tokens, shard_rows=args.shard_rows
    )
    if launched()[0] == 0:
        print(time.perf_counter() - start)


def caching(args: Args) -> None:
    times: dict[int, list[float]] = {1: [], 2: []}
    for number in range(args.rounds + 1):
        for ranks, found in times.items():
            folder = Path(tempfile.mkdtemp())
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += [
                __file__,
                "--tokens",
                str(args.tokens),
                "--shard-rows",
                str(args.shard_rows),
                "--child",
                str(folder / "acts"),
            ]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            shutil.rmtree(folder)
            if number:
                found.append(float(done.stdout.split()[-1]))
    ratios = [one / two for one, two in zip(times[1], times[2])]
    one, two = (args.tokens / statistics.median(found) for found in times.values())
    print(
        f"caching {args.tokens} rows, a thread a rank: 1 rank {one:.0f} tokens/s, 2 ranks {two:.0f} tokens/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def checkpoints(args: Args) -> None:
    times: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as scratch:
        x = torch.randn(16_384, args.d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
        store = ActivationStore.from_tensors((x for _ in range(10)), f"{scratch}/acts", "blocks.0.hook_resid_post")
        for number in range(args.rounds + 1):
            for name, every in (("without", 10**9), ("with", 100)):
                config = TrainConfig(
                    d_sae=args.d_sae, k=32, batch_size=4096, tokens=4096 * args.steps, device="cpu",
                    checkpoint_every=every, statistics_tokens=4096,
                )  # fmt: skip
                start = time.perf_counter()
                train_sae(store, config, f"{scratch}/run")
                if number:
                    times[name].append(time.perf_counter() - start)
                shutil.rmtree(f"{scratch}/run")
    overhead = [b / a - 1 for a, b in zip(times["without"], times["with"])]
    print(
        f"{args.steps} steps at d_in {args.d_in}, d_sae {args.d_sae}: {statistics.median(times['without']):.1f} s "
        f"without checkpoints, {statistics.median(times['with']):.1f} s with one every 100 steps; overhead "
        f"{statistics.median(overhead):+.1%} ({min(overhead):+.1%} to {max(overhead):+.1%})"
    )


def main() -> None:
    """Run the parts asked for and print their figures."""
    args = tyro.cli(Args, description=__doc__)
    if args.child is not None:
        cache(args, args.child)
        return
    known = {"caching": caching, "checkpoints": checkpoints}
    for part in args.parts:
        if part not in known:
            raise SystemExit(f"no part {part!r}: use caching or checkpoints")
        known[part](args)


if __name__ == "__main__":
    main()
