"""Time what a cluster does against what one process does, and training with checkpoints against training without, each
in turn.

    python scripts/bench/cluster.py --rounds 3

`caching` runs `cache_activations` in one process and in two started by `torchrun`, a thread each; timed is the call
alone, from text to finished store, as rank 0 sees it. `streaming` trains straight from a random Llama in one
process, in two ranks that both run it and train, and in two of which one runs it and one trains, a thread each; timed
are the steps after the first quarter, as metrics.jsonl has them. `checkpoints` trains the same SAE with a checkpoint
every 100 steps and with none, in one process, from a store to the saved folder.
"""

import json
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
import transformers
import tyro

from steersman import ActivationStore, LanguageModel, TrainConfig, cache_activations, train_sae
from steersman.demo import MODEL_PATH, texts
from steersman.parallel import rank_and_world_size
from steersman.train import ActivationStream


@dataclass(frozen=True, kw_only=True)
class Config:
    parts: tuple[str, ...] = ("caching", "streaming", "checkpoints")
    """What to measure: caching, streaming, checkpoints."""
    rounds: int = 3
    """Timed rounds, after one that is not."""
    tokens: int = 262_144
    """Rows cached or streamed."""
    shard_rows: int = 32_768
    """Rows of a shard, which is what ranks share out: a real store has tens of shards."""
    d_in: int = 384
    """Width of the SAEs that are trained, and of the streamed model."""
    d_sae: int = 4096
    """Its features."""
    steps: int = 400
    """Its steps, of 4096 rows each."""
    stream_features: int = 12288
    """Features of the SAE that is trained on a stream; with so many, training takes about as long as the model."""
    child: str = ""
    """Used by the script itself: which part to run as a rank of a job, and print the seconds of."""
    out: Path = Path()
    """Used by the script itself: where to."""
    model_ranks: int = 0
    """Used by the script itself."""


def rank_of_job(args: Config) -> None:
    """What a rank runs."""
    torch.set_num_threads(1)
    lm = LanguageModel.load(str(MODEL_PATH), device="cpu")
    stories, hook = texts(args.tokens // 55 + 400, seed=0), "blocks.2.hook_resid_post"
    lm.logits(torch.zeros(1, 8, dtype=torch.long))
    if args.child == "caching":
        start = time.perf_counter()
        cache_activations(lm, stories, hook=hook, out=str(args.out), tokens=args.tokens, shard_rows=args.shard_rows)
        seconds = time.perf_counter() - start
    else:
        config = TrainConfig(
            d_sae=args.stream_features, k=32, batch_size=2048, device="cpu", tokens=args.tokens, log_every=4,
            statistics_tokens=2048, model_ranks=args.model_ranks,
        )  # fmt: skip
        wide = random_model(lm, args.d_in)
        train_sae(lambda: ActivationStream(wide, stories, hook=hook, buffer_rows=16_384), config, args.out)
        lines = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
        timed = [line for line in lines if line["step"] > lines[-1]["step"] / 4]
        seconds = args.tokens * statistics.mean(1 / line["tokens_per_second"] for line in timed)
    if rank_and_world_size()[0] == 0:
        print(seconds)


def random_model(lm: LanguageModel, width: int) -> LanguageModel:
    """A Llama of four layers with the tokenizer of `lm`."""
    config = transformers.LlamaConfig(
        vocab_size=lm.config.vocab_size, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=4,
        num_attention_heads=max(width // 64, 1), max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return LanguageModel(transformers.LlamaForCausalLM(config).eval(), lm.tokenizer, name=f"random-{width}")


def seconds_of_job(args: Config, part: str, ranks: int, model_ranks: int = 0) -> float:
    """How long a job of so many ranks takes, as its rank 0 sees it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
        flags = {
            "child": part, "out": f"{scratch}/out", "model-ranks": model_ranks, "tokens": args.tokens,
            "shard-rows": args.shard_rows, "stream-features": args.stream_features, "d-in": args.d_in,
        }  # fmt: skip
        command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.split()[-1])


def compare_jobs(args: Config, part: str, jobs: dict[str, tuple[int, int]]) -> None:
    """Time jobs of (ranks, model ranks) in turn, and each against the first."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(args.rounds + 1):
        for name, (ranks, model_ranks) in jobs.items():
            seconds = seconds_of_job(args, part, ranks, model_ranks)
            if number:
                times[name].append(seconds)
    first = next(iter(times.values()))
    print(f"{part}, {args.tokens} rows, a thread a rank:")
    for name, found in times.items():
        ratios = [one / many for one, many in zip(first, found)]
        print(
            f"  {name}: {args.tokens / statistics.median(found):.0f} tokens/s, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def caching(args: Config) -> None:
    compare_jobs(args, "caching", {"1 rank": (1, 0), "2 ranks": (2, 0)})


def streaming(args: Config) -> None:
    ways = {"1 rank": (1, 0), "2 ranks together": (2, 0), "1 runs the model, 1 trains": (2, 1)}
    compare_jobs(args, "streaming", ways)


def checkpoints(args: Config) -> None:
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


def main(args: Config) -> None:
    """Run the parts asked for and print their figures."""
    if args.child:
        rank_of_job(args)
        return
    known = {"caching": caching, "streaming": streaming, "checkpoints": checkpoints}
    for part in args.parts:
        if part not in known:
            raise SystemExit(f"no part {part!r}: use {', '.join(known)}")
        known[part](args)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
