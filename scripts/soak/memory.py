"""Cache and train in one process, over and over, and watch its memory: it must not grow.

    python scripts/soak/memory.py --minutes 30

A round caches activations of the bundled model into a new store and trains an SAE on it. Resident memory is sampled ten
times a second. Growth is the median of the samples of the last fifth of the time against that of the second fifth; the
first fifth warms up.
"""

import os
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["STEERSMAN_PROGRESS"] = "0"

import tyro

from steersman import LanguageModel, TrainConfig, cache_activations, train_sae
from steersman.demo import MODEL_PATH, texts


@dataclass(frozen=True, kw_only=True)
class Config:
    minutes: float = 30.0
    """How long."""
    tokens: int = 60_000
    """Rows cached in a round, and trained on."""
    allowed: float = 0.02
    """Growth above which the script fails."""


def resident() -> float:
    """MB that the process holds, without the pages of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def main(args: Config) -> None:
    """Run for the time asked for and print the figures."""
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            samples.append(resident())

    lm = LanguageModel.load(str(MODEL_PATH), device="cpu")
    stories = texts(args.tokens // 60 + 50, seed=0)
    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    end, rounds = time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < end:
        folder = tempfile.mkdtemp()
        store = cache_activations(
            lm, stories, hook="blocks.2.hook_resid_post", out=f"{folder}/acts", tokens=args.tokens, shard_rows=8192
        )
        train_sae(store, TrainConfig(d_sae=512, k=16, device="cpu", checkpoint_every=20), f"{folder}/run")
        shutil.rmtree(folder)
        rounds += 1
    done.set()
    watcher.join()
    fifth = len(samples) // 5
    fifths = [samples[i * fifth : (i + 1) * fifth] for i in range(5)]
    medians, peaks = [statistics.median(part) for part in fifths], [max(part) for part in fifths]
    growth, peak_growth = medians[4] / medians[1] - 1, peaks[4] / peaks[1] - 1
    print(f"{rounds} rounds in {args.minutes:g} minutes, {len(samples)} samples of resident memory in MB, by fifths:")
    print("  median " + " ".join(f"{m:.1f}" for m in medians) + "   peak " + " ".join(f"{p:.1f}" for p in peaks))
    print(f"  growth from the second fifth to the last: median {growth:+.2%}, peak {peak_growth:+.2%}")
    if growth > args.allowed:
        raise SystemExit(f"memory grew by {growth:.1%}, above {args.allowed:.0%}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
