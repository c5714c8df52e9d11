"""Time caching against the bare forward pass to the same layer, in turn, and measure its memory on a 10x larger store.

    python scripts/bench/caching.py --models demo,2 384x6,4 --rounds 5

A round runs the model over the same text twice, in turn: once for nothing but the hidden states at the hook point,
from token ids that are ready in memory, and once as `cache_activations` does it, from text to the finished store, with
tokenizing, statistics, checksums, writing and syncing. The ratio is the median over rounds. Peak memory is that of a
fresh process that caches `--tokens` rows, and of one that caches ten times as many.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["STEERSMAN_PROGRESS"] = "0"

import torch
import transformers
import tyro

from steersman import LanguageModel, cache_activations
from steersman.demo import MODEL_PATH, texts


@dataclass(frozen=True, kw_only=True)
class Config:
    models: tuple[str, ...] = ("demo,2", "384x6,3")
    """Model and layer: demo, a path or hub id, or WIDTHxLAYERS for a random Llama with the demo's tokenizer."""
    tokens: int = 200_000
    """Rows cached in a round."""
    context_length: int = 256
    """Tokens of a context, or the model's limit."""
    batch_size: int = 32
    """Contexts of a forward pass."""
    rounds: int = 5
    """Timed rounds, after one that is not."""
    threads: int = 0
    """Threads of PyTorch; 0 leaves its default."""
    memory: bool = True
    """Also measure peak memory, of the first model."""
    out: Path | None = None
    """Also write the rows to this JSON file."""
    child: Path | None = None
    """Used by the script itself: cache once into this folder and report the peak memory."""


def load(name: str) -> LanguageModel:
    if name == "demo":
        return LanguageModel.load(str(MODEL_PATH))
    width, _, layers = name.partition("x")
    if not (width.isdecimal() and layers.isdecimal()):
        return LanguageModel.load(name)
    demo = LanguageModel.load(str(MODEL_PATH))
    config = transformers.LlamaConfig(
        vocab_size=demo.config.vocab_size,
        hidden_size=int(width),
        intermediate_size=int(width) * 8 // 3,
        num_hidden_layers=int(layers),
        num_attention_heads=max(int(width) // 64, 1),
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LanguageModel(transformers.LlamaForCausalLM(config).eval(), demo.tokenizer, name=name)


def some_texts(tokens: int) -> list[str]:
    """Stories of at least so many tokens: a few, over and over, so that they cost no memory."""
    return texts(2000) * (1 + tokens // 100_000)


def ready_batches(lm: LanguageModel, stories: list[str], args: Config, length: int) -> tuple[list[torch.Tensor], int]:
    """Full batches [B, S] of at least `args.tokens` tokens beside BOS, and how many such tokens they hold.

    Full, because caching runs full ones too: a last batch cut short would make the bare pass do less.
    """
    bos = [] if lm.bos_token_id is None else [lm.bos_token_id]
    ids = [token for text in stories for token in lm.token_ids(text) if token not in bos]
    room = length - len(bos)
    rows = -(-args.tokens // (room * args.batch_size)) * args.batch_size
    contexts = torch.tensor([bos + ids[row * room : (row + 1) * room] for row in range(rows)])
    return list(contexts.split(args.batch_size)), rows * room


def measure(name: str, args: Config) -> dict[str, object]:
    model, _, layer = name.partition(",")
    lm = load(model)
    hook = f"blocks.{layer}.hook_resid_post"
    length = min(args.context_length, lm.context_length or args.context_length)
    stories = some_texts(args.tokens)
    batches, rows = ready_batches(lm, stories, args, length)
    bare, caching = [], []
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            for input_ids in batches:
                lm.capture(input_ids, hooks=[hook])
        middle = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            again = time.perf_counter()
            cache_activations(
                lm,
                stories,
                hook=hook,
                out=f"{folder}/acts",
                tokens=rows,
                context_length=length,
                batch_size=args.batch_size,
            )
            end = time.perf_counter()
        if number:
            bare.append(rows / (middle - start))
            caching.append(rows / (end - again))
    row: dict[str, object] = {
        "model": model,
        "hook": hook,
        "width": lm.hook_width(hook),
        "tokens": rows,
        "bare_tokens_per_s": statistics.median(bare),
        "caching_tokens_per_s": statistics.median(caching),
        "ratio": statistics.median(c / b for c, b in zip(caching, bare)),
        "ratios": [c / b for c, b in zip(caching, bare)],
    }
    if args.memory:
        row |= {f"peak_mb_x{times}": peak_memory(name, args, times) for times in (1, 10)}
    return row


def peak_memory(name: str, args: Config, times: int) -> float:
    """Peak memory in MB of a process that caches `times` as many tokens."""
    folder = Path(tempfile.mkdtemp())
    try:
        command = [sys.executable, __file__, "--models", name, "--tokens", str(args.tokens * times)]
        command += ["--context-length", str(args.context_length), "--batch-size", str(args.batch_size)]
        command += ["--threads", str(args.threads), "--child", str(folder / "acts")]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    finally:
        shutil.rmtree(folder)


def main(args: Config) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        model, _, layer = args.models[0].partition(",")
        cache_activations(
            load(model),
            some_texts(args.tokens),
            hook=f"blocks.{layer}.hook_resid_post",
            out=str(args.child),
            tokens=args.tokens,
            context_length=args.context_length,
            batch_size=args.batch_size,
        )
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds")
    print(
        f"{'model':>10} {'layer':>24} {'bare tok/s':>11} {'caching tok/s':>13} {'ratio':>6} {'MB x1':>6} {'MB x10':>6}"
    )
    rows = []
    for name in args.models:
        row = measure(name, args if name == args.models[0] else replace(args, memory=False))
        rows.append(row)
        memory = " ".join(f"{row.get(f'peak_mb_x{times}', float('nan')):6.0f}" for times in (1, 10))
        print(
            f"{row['model']:>10} {row['hook']:>24} {row['bare_tokens_per_s']:11.0f} "
            f"{row['caching_tokens_per_s']:13.0f} {row['ratio']:6.3f} {memory}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
