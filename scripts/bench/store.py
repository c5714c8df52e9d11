"""Time shuffled reading of a store against a plain sequential read of its files, in turn; measure reading's memory.

    python scripts/bench/store.py --widths 64 384 2304 --megabytes 1000

A round reads the same store in three ways: its activation files from start to end into one buffer of a batch's size,
used over and over (the fastest there is: nothing is kept); the same into new memory for every batch, as a reader must
that hands batches out; and `store.batches`, shuffled, with its default prefetch. `warm` rounds find the files in the
system's cache, where a sequential read is a plain memory copy; before each `cold` read they are dropped from it. The
ratios are medians over rounds. Peak memory is that of a fresh process that reads an epoch of a store, and of one that
reads a store ten times as large: all that is resident, and the part that is the process's own, without mapped files
(pages of the system's cache, which it takes back when others need them).
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["STEERSMAN_PROGRESS"] = "0"

import torch
import tyro

from steersman import ActivationStore, TrainConfig, train_sae


@dataclass(frozen=True, kw_only=True)
class Config:
    widths: tuple[int, ...] = (64, 384, 2304)
    """Widths of the activations."""
    megabytes: int = 1000
    """Size of each store."""
    batch_size: int = 4096
    """Rows of a batch."""
    rounds: int = 5
    """Timed rounds, after one that is not."""
    cold: bool = True
    """Also time reads from the disk."""
    memory_megabytes: int = 400
    """Size of the smaller store whose reading's memory is measured, at the first width; 0 leaves it out."""
    folder: Path = Path(tempfile.gettempdir())
    """Where to put the stores."""
    out: Path | None = None
    """Also write the rows to this JSON file."""
    train: bool = False
    """Measure the memory of training an SAE on one epoch of it too."""
    child: Path | None = None
    """Used by the script itself: read this store once (or train on it) and report the peak memory."""


def make_store(folder: Path, width: int, megabytes: int) -> ActivationStore:
    x = torch.randn(8192, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    n = max(1, megabytes * 1_000_000 // (x.numel() * 2))
    return ActivationStore.from_tensors((x for _ in range(n)), folder, "blocks.0.hook_resid_post")


def activation_files(store: ActivationStore) -> list[Path]:
    return sorted((store.path / store.hook_name).iterdir())


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def sequential(files: list[Path], n_bytes: int, fresh: bool) -> None:
    buffer = bytearray(n_bytes)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while True:
                read = file.readinto(buffer)
                if not read:
                    break
                if fresh:
                    buffer = bytearray(n_bytes)


def shuffled(path: Path, batch_size: int) -> None:
    # Opened anew: pages that are still mapped cannot be dropped from the cache.
    for _ in ActivationStore.open(path, verify=False).batches(batch_size, split="all"):
        pass


def rates(store: ActivationStore, args: Config, cold: bool) -> dict[str, list[float]]:
    files = activation_files(store)
    n_bytes = sum(file.stat().st_size for file in files)
    batch_bytes = args.batch_size * store.d_in * 2
    ways: dict[str, Callable[[], None]] = {
        "one_buffer": lambda: sequential(files, batch_bytes, fresh=False),
        "new_memory": lambda: sequential(files, batch_bytes, fresh=True),
        "shuffled": lambda: shuffled(store.path, args.batch_size),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, read in ways.items():
            if cold:
                drop_from_cache(files)
            start = time.perf_counter()
            read()
            if number:
                found[name].append(n_bytes / 1e9 / (time.perf_counter() - start))
    return found


def trained(path: Path, batch_size: int) -> None:
    """Train a small SAE on one epoch of a store."""
    config = TrainConfig(d_sae=256, k=8, batch_size=batch_size)
    train_sae(ActivationStore.open(path), config, out=path.with_name(path.name + "-run"))


def sample_own_memory(found: list[float]) -> None:
    """Add to `found`, for as long as the process lives, the MB that it holds without mapped files."""
    while True:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        found.append(int(fields["RssAnon"].split()[0]) / 1024)
        time.sleep(0.02)


def peak_memory(folder: Path, width: int, megabytes: int, train: bool) -> tuple[float, float]:
    """Peak memory in MB of a process that reads one shuffled epoch, or trains on it: resident, and its own."""
    make_store(folder, width, megabytes)
    command = [sys.executable, __file__, "--child", str(folder), "--train" if train else "--no-train"]
    try:
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return float(printed[-2]), float(printed[-1])
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_name(folder.name + "-run"), ignore_errors=True)


def main(args: Config) -> None:
    if args.child:
        own: list[float] = []
        threading.Thread(target=sample_own_memory, args=(own,), daemon=True).start()
        (trained if args.train else shuffled)(args.child, args.batch_size)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, max(own))
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    rows = []
    print(f"torch {torch.__version__}, stores of {args.megabytes} MB, medians of {args.rounds} rounds, GB/s")
    print(" width  files  one buffer  new memory  shuffled  ratio  ratio (new)")
    try:
        for width in args.widths:
            store = make_store(folder / f"width{width}", width, args.megabytes)
            for cold in (False, True) if args.cold else (False,):
                found = rates(store, args, cold)
                one, new = (
                    statistics.median(a / b for a, b in zip(found["shuffled"], found[name]))
                    for name in ("one_buffer", "new_memory")
                )
                speeds = {name: statistics.median(values) for name, values in found.items()}
                rows.append({"width": width, "cold": cold, "ratio": one, "ratio_new_memory": new, **speeds})
                print(
                    f"{width:6d} {'cold' if cold else 'warm':>6} {speeds['one_buffer']:11.2f} "
                    f"{speeds['new_memory']:11.2f} {speeds['shuffled']:9.2f} {one:6.2f} {new:11.2f}",
                    flush=True,
                )
            shutil.rmtree(store.path)
        for train in (False, True) if args.train else (False,):
            if not args.memory_megabytes:
                break
            size, width = args.memory_megabytes, args.widths[0]
            (all_1, own_1), (all_10, own_10) = (peak_memory(folder / "memory", width, size * n, train) for n in (1, 10))
            what = "training on" if train else "reading"
            figures = {"peak_mb_x1": all_1, "peak_mb_x10": all_10, "own_mb_x1": own_1, "own_mb_x10": own_10}
            rows.append({"width": width, "work": what, **figures})
            print(
                f"peak memory of {what} {size} MB: {all_1:.0f} MB, {own_1:.0f} of them its own; "
                f"10x as much: {all_10:.0f} MB, {own_10:.0f} its own",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
