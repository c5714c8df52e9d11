"""Kill ranks at random moments, again and again, and compare what comes out with uninterrupted runs, byte for byte.

A job of `--ranks` processes caches activations of the bundled model and then trains on them, started by `torchrun`. In
each round one random rank gets SIGKILL after a random time, which falls into caching, training or the writing of a
checkpoint; the same command then resumes. When a job has ended, its store and SAE must have the bytes of an
uninterrupted one, and the next job begins. With `--model-ranks` the job trains straight from the model instead, which
so many of the ranks run.

    python scripts/soak/kill.py --kills 50 --ranks 2
    python scripts/soak/kill.py --kills 50 --ranks 3 --model-ranks 1
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]


@dataclass(frozen=True, kw_only=True)
class Config:
    kills: int = 50
    """Kills in all."""
    ranks: int = 2
    """Processes of a job."""
    model_ranks: int = 0
    """How many of them run the model; with any, the job trains straight from it."""
    seed: int = 0
    """Seed of who is killed, and when."""
    folder: Path = Path("soak")
    """Where the jobs write; emptied first."""
    job: str = ""
    """Used by the processes that this one starts."""


def texts() -> list[str]:
    rng = random.Random(0)
    words = ("once", "upon", "a", "time", "there", "was", "little", "dog", "cat", "girl", "boy", "who", "went", "home")
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(1500)]


def job(out: str, model_ranks: int) -> None:
    """What every rank runs."""
    import torch

    from steersman import LanguageModel, TrainConfig, cache_activations, train_sae
    from steersman.demo import MODEL_PATH
    from steersman.train import ActivationStream

    torch.set_num_threads(1)
    hook = "blocks.1.hook_resid_post"
    config = TrainConfig(
        d_sae=512, k=8, batch_size=256, tokens=60_000, device="cpu", checkpoint_every=10, timeout_seconds=20.0,
        model_ranks=model_ranks,
    )  # fmt: skip

    def model() -> LanguageModel:
        return LanguageModel.load(str(MODEL_PATH), device="cpu")

    def stream() -> ActivationStream:
        return ActivationStream(model(), texts(), hook=hook, buffer_rows=4096, batch_size=4)

    if model_ranks:
        train_sae(stream, config, f"{out}/run")
        return
    store = cache_activations(
        model(), texts(), hook=hook, out=f"{out}/acts", tokens=30_000, shard_rows=1500, batch_size=4,
        timeout_seconds=20.0,
    )  # fmt: skip
    train_sae(store, config, f"{out}/run")


def start(out: Path, ranks: int, model_ranks: int) -> subprocess.Popen:
    environment = {**os.environ, "STEERSMAN_PROGRESS": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", __file__, "--job", str(out)]
    command += ["--model-ranks", str(model_ranks)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def workers(parent: int) -> list[int]:
    """The processes that torchrun started."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found]


def digests(out: Path) -> dict[str, str]:
    files = [*sorted((out / "acts").rglob("*")), out / "run" / "sae_weights.safetensors"]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def main(args: Config) -> None:
    if args.job:
        job(args.job, args.model_ranks)
        return
    rng, folder = random.Random(args.seed), args.folder
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    assert start(folder / "whole", args.ranks, args.model_ranks).wait() == 0
    whole, length = digests(folder / "whole"), time.monotonic() - began
    print(f"an uninterrupted job takes {length:.1f} s")
    kills, finished, longest = 0, 0, 0.0
    first = "loading" if args.model_ranks else "caching"
    phases = {first: 0, "training": 0, "a checkpoint": 0}
    while kills < args.kills:
        out = folder / "killed"
        process = start(out, args.ranks, args.model_ranks)
        time.sleep(rng.uniform(0.3 * length, 0.9 * length))
        if process.poll() is None and (pids := workers(process.pid)):
            os.kill(rng.choice(pids), signal.SIGKILL)
            since = time.monotonic()
            writing = any((out / "run" / "checkpoints").glob(".writing*")) if (out / "run").exists() else False
            phase = "a checkpoint" if writing else "training" if (out / "run").exists() else first
            if process.wait(timeout=90) != 0:  # else the rank had just ended by itself
                kills, longest = kills + 1, max(longest, time.monotonic() - since)
                phases[phase] += 1
        if process.wait() == 0:
            assert digests(out) == whole, "the result differs from the uninterrupted one"
            finished += 1
            shutil.rmtree(out)
    while (code := start(folder / "killed", args.ranks, args.model_ranks).wait()) != 0:
        raise SystemExit(f"a job that nobody disturbed ended with {code}")
    assert digests(folder / "killed") == whole, "the result differs from the uninterrupted one"
    print(f"{kills} kills ({phases}), {finished + 1} jobs ended, all with the same bytes; longest end {longest:.1f} s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
