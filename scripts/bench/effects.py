"""Time the measuring of effects, all vectors together against one at a time, and the closed-form fit of an effect map.

    python scripts/bench/effects.py --parts collect single fit
    torchrun --nproc-per-node 2 scripts/bench/effects.py --parts collect --folder effects

`collect` is `collect_effects` as it is used: a scale for each vector by the loss on held-out stories, then rollouts.
`single` measures a few vectors with and without that machinery, in turn: `together` is `collect_effects` with scales
given, `generate` the same rollouts as a loop over vectors would do them with `LanguageModel.generate`, a
second pass of the unsteered model over the texts, and the SAE. `fit` is ridge regression from vectors to effects at
the size of a large model, and the memory it takes.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["STEERSMAN_PROGRESS"] = "0"

import torch
import tyro

from steersman import SAE, LanguageModel, SAEConfig, Steerer, collect_effects
from steersman.demo import MODEL_PATH, texts
from steersman.parallel import rank_and_world_size
from steersman.steer import EffectsConfig, ridge_fit


@dataclass(frozen=True, kw_only=True)
class Config:
    parts: tuple[str, ...] = ("collect", "single", "fit")
    """Which parts to run: collect, single, fit."""
    model: str = str(MODEL_PATH)
    """Model folder or hub id."""
    sae: str | None = None
    """SAE folder; without it a random one of --d-sae and --k at the middle block."""
    d_sae: int = 512
    """Features of the random SAE."""
    k: int = 16
    """Its active features a token."""
    vectors: int = 1024
    """Vectors of `collect`."""
    rollouts: int = 128
    """Rollouts of each vector."""
    new_tokens: int = 24
    """Tokens of each rollout."""
    batch_rows: int = 1024
    """Rollouts in one batch."""
    folder: str | None = None
    """Keep the effects of `collect` in this folder; needed under torchrun."""
    few: int = 32
    """Vectors of a round of `single`; an eighth of them alone."""
    rounds: int = 3
    """Rounds of `single`."""
    fit_vectors: int = 4096
    """Vectors of `fit`."""
    fit_d_in: int = 2304
    """Width of `fit`."""
    fit_d_sae: int = 16384
    """Features of `fit`."""
    device: str = "auto"
    """Device of the model."""
    threads: int = 0
    """Threads of PyTorch; 0 leaves its default."""
    out: Path | None = None
    """Also write the figures to this JSON file."""


def load(args: Config) -> tuple[LanguageModel, SAE]:
    """The model and the SAE."""
    lm = LanguageModel.load(args.model, device=args.device)
    if args.sae is not None:
        return lm, SAE.load(args.sae, lm.device)
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_post"
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=lm.d_model, d_sae=args.d_sae, k=args.k, hook_name=hook, model_name=lm.name), g)
    return lm, sae.to(lm.device)


def settings(args: Config, n: int, **changes: Any) -> EffectsConfig:
    """What is measured."""
    return EffectsConfig(
        vectors="random",
        n_vectors=n,
        rollouts=args.rollouts,
        new_tokens=args.new_tokens,
        batch_rows=args.batch_rows,
        **changes,
    )


def collect(args: Config) -> dict[str, float]:
    """All of `collect_effects`, the unsteered rollouts and the search for scales included."""
    lm, sae = load(args)
    start = time.perf_counter()
    effects = collect_effects(lm, sae, texts(16, seed=3), settings(args, args.vectors, out=args.folder))
    seconds = time.perf_counter() - start
    reached = int(effects.column("reached").sum())
    rate = args.vectors * args.rollouts / seconds
    print(f"collect: {args.vectors} vectors x {args.rollouts} rollouts x {args.new_tokens} tokens in {seconds:.1f} s")
    print(f"  {rate:.0f} rollouts/s; {reached} of {args.vectors} scales reached")
    return {"vectors": args.vectors, "seconds": seconds, "rollouts_per_s": rate, "reached": reached}


def one_by_one(lm: LanguageModel, sae: SAE, vectors: torch.Tensor, scale: float, config: EffectsConfig) -> torch.Tensor:
    """The average activations [n, L] under each vector, as a plain loop measures them."""
    hook = lm.resolve_hook(sae.cfg.hook_name)
    prompts = [config.openings[i % len(config.openings)] for i in range(config.rollouts)]
    means = []
    for i, v in enumerate(vectors):
        sampling = {"do_sample": True, "top_k": config.top_k, "top_p": config.top_p, "seed": i}
        with Steerer(lm).vector(v, scale=scale, hook=hook):
            made = lm.generate(prompts, max_new_tokens=config.new_tokens, **sampling)  # pyright: ignore[reportArgumentType]
        h = lm.capture(made.tokens, made.attention_mask, hooks=[hook])[hook]
        means.append(sae.encode(h[:, made.prompt_columns :][made.new_mask.bool()]).mean(0))
    return torch.stack(means)


def single(args: Config) -> dict[str, float]:
    """Seconds a vector, together and one at a time, in turn."""
    lm, sae = load(args)
    n = args.few
    vectors = torch.nn.functional.normalize(torch.randn(n, lm.d_model), dim=1)
    base = {"scale_rule": "fixed", "scale_target": 15.0, "base_rollouts": 2}
    times: dict[str, list[float]] = {"together": [], "generate": []}
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        collect_effects(lm, sae, (), settings(args, n, **base), vectors=vectors)
        middle = time.perf_counter()
        one_by_one(lm, sae, vectors[: max(1, n // 8)], 15.0, settings(args, n, **base))
        end = time.perf_counter()
        if number:  # the first round warms up
            times["together"].append((middle - start) / n)
            times["generate"].append((end - middle) / max(1, n // 8))
    ratio = statistics.median(b / a for a, b in zip(times["together"], times["generate"]))
    found = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"single: {args.rollouts} rollouts of a vector take {found['together']:.3f} s together, "
        f"{found['generate']:.3f} s alone: {ratio:.1f} x"
    )
    return {**found, "ratio": ratio}


def fit(args: Config) -> dict[str, float]:
    """The closed-form fit, its effects streamed in blocks of 256 vectors."""
    D, L = args.fit_d_in, args.fit_d_sae
    M = torch.randn(D, L, generator=torch.Generator().manual_seed(0)) / D**0.5
    spent = 0.0

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal spent
        for start in range(0, args.fit_vectors, 256):
            begin = time.perf_counter()
            g = torch.Generator().manual_seed(start + 1)
            n = min(256, args.fit_vectors - start)
            x = torch.nn.functional.normalize(torch.randn(n, D, generator=g), dim=1)
            y = x @ M + 0.01 * torch.randn(n, L, generator=g)
            spent += time.perf_counter() - begin
            yield x, y

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    found = ridge_fit(blocks(), None, torch.float32)
    seconds = time.perf_counter() - start - spent
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    error = float((found.M - M).square().sum() / M.square().sum())
    print(f"fit: {args.fit_vectors} vectors, d_in {D}, d_sae {L} in {seconds:.1f} s (making the data not counted)")
    print(f"  peak memory {after:.2f} GiB, {before:.2f} before; squared error of M {error:.3f} of its size")
    return {"vectors": args.fit_vectors, "seconds": seconds, "peak_gib": after, "before_gib": before}


def main(args: Config) -> None:
    """Run the parts asked for and print their figures."""
    if rank_and_world_size()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    if args.threads:
        torch.set_num_threads(args.threads)
    known = {"collect": collect, "single": single, "fit": fit}
    for part in args.parts:
        if part not in known:
            raise SystemExit(f"no part {part!r}: use collect, single or fit")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.model}")
    figures = {part: known[part](args) for part in args.parts}
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
