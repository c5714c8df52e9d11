"""Heads, affine maps and baked weights on a real model: what is found, what it does, and how fast it generates.

1. A function vector (arXiv 2310.15213): heads ranked by their indirect effect on pairs of opposites in context, with
   the null of the profile; then the probability of the opposite behind a bare word, with the vector of the best heads,
   with that of heads drawn at random, and with neither, on pairs that the ranking never saw.
2. `bake`: how far the logits of the folder are from those of the steered model, for a vector and for a direction
   taken out.
3. Tokens per second of greedy generation, as a share of plain generation: affine maps of full rank and of rank 8, an
   edit of heads, a baked model. Ways are timed in turn and the best of each is kept; on the CPU it is the processor's
   time that counts, so that other work on the machine weighs little.

    python scripts/bench/heads.py --model HuggingFaceTB/SmolLM2-135M-Instruct --work bench-heads
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from steersman import LanguageModel, Steerer, SteeringVector
from steersman.steer import (
    AffineEdit,
    HeadEdit,
    ablate,
    answer_probability,
    bake,
    bootstrap,
    function_vector,
    mean_heads,
    patch_heads,
)

OPPOSITES = """hot cold, big small, up down, left right, day night, happy sad, fast slow, high low, old new, rich poor,
    open closed, early late, hard soft, light dark, long short, wet dry, full empty, clean dirty, good bad, strong weak,
    thick thin, wide narrow, deep shallow, loud quiet, love hate, win lose, begin end, buy sell, push pull, give take,
    true false, right wrong, inside outside, above below, front back, first last, more less, many few, young old,
    safe dangerous, easy difficult, cheap expensive, sweet bitter, smooth rough, alive dead, same different"""


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """Folder or hub id of the model."""
    work: Path = Path("bench-heads")
    """Folder for the figures and, meanwhile, for baked models."""
    shown: int = 100
    """In-context prompts that the heads' means are taken over."""
    trials: int = 25
    """Prompts with shuffled answers that heads are patched into."""
    shots: int = 10
    """Examples in a prompt."""
    heads: int = 10
    """Heads that are summed."""
    tokens: int = 48
    """Tokens generated in a timing."""
    repeats: int = 5
    """Timings of each way."""
    seed: int = 0
    """Seed of the prompts and of the random heads."""


def in_context(pairs: list[tuple[str, str]], query: str) -> str:
    return "".join(f"Q: {a}\nA: {b}\n\n" for a, b in pairs) + f"Q: {query}\nA:"


def opposites(lm: LanguageModel, config: Config) -> dict[str, Any]:
    draw = random.Random(config.seed)
    pairs: list[tuple[str, str]] = [(a, b) for a, b in (pair.split() for pair in OPPOSITES.split(","))]
    draw.shuffle(pairs)
    known, unseen = pairs[: len(pairs) * 2 // 3], pairs[len(pairs) * 2 // 3 :]
    shown, hidden, answers = [], [], []
    for _ in range(config.shown):
        *examples, (query, _) = draw.sample(known, config.shots + 1)
        shown.append(in_context(examples, query))
    for _ in range(config.trials):
        *examples, (query, answer) = draw.sample(known, config.shots + 1)
        wrong = [b for _, b in examples]
        draw.shuffle(wrong)
        hidden.append(in_context([(a, b) for (a, _), b in zip(examples, wrong)], query))
        answers.append(f" {answer}")
    means = mean_heads(lm, shown)
    profile = patch_heads(lm, means, hidden, answers)
    print(profile.to_text(config.heads))
    print(f"{len(profile.significant())} of {profile.effect.numel()} heads above the null", flush=True)
    zero_shot, wanted = [in_context([], a) for a, _ in unseen], [f" {b}" for _, b in unseen]
    score = answer_probability(lm, zero_shot, wanted)
    contexts: dict[str, AbstractContextManager[Any]] = {"no vector": nullcontext()}
    st, hook = Steerer(lm), f"blocks.{lm.n_layers // 3}.hook_resid_post"
    best = profile.top(config.heads)
    anywhere = draw.sample(profile.ranked()[config.heads :], config.heads)
    v, w = (function_vector(lm, shown, heads, hook=hook, means=means) for heads in (best, anywhere))
    contexts["best heads"] = st.vector(v, scope="last_prompt")
    contexts["random heads"] = st.vector(w, scope="last_prompt")
    contexts["random heads at equal norm"] = st.vector(w * (v.norm() / w.norm()), scope="last_prompt")
    found: dict[str, Any] = {"significant": len(profile.significant()), "null": profile.null, "hook": hook}
    found["best"] = [[*head, *profile.of(head)] for head in best]
    for name, context in contexts.items():
        with context:
            p = score()
        mean = bootstrap(p.tolist())
        assert mean is not None
        found[f"p(opposite), {name}"] = [mean.mean, mean.low, mean.high]
        print(f"p(opposite) of {len(unseen)} unseen words, {name}: {mean}", flush=True)
    return found


def baked(lm: LanguageModel, config: Config) -> dict[str, Any]:
    v = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(config.seed))
    ids = lm.encode(["The old man walked down to the sea and looked at his boat."]).input_ids
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_post"
    norm = float(lm.capture(ids, hooks=hook)[hook][0, 1:].norm(dim=-1).median())
    vector = SteeringVector.of(v / v.norm() * norm / 2, hook_name=hook, model_name=lm.name)
    found = {}
    for name, edits in (("vector", vector), ("direction taken out", ablate(lm, v))):
        folder = config.work / name.replace(" ", "_")
        if folder.exists():
            shutil.rmtree(folder)
        done = bake(lm, edits, folder, include_bos=True)
        found[name] = {"difference": done.difference, "effect": done.effect, "changed": len(done.changed)}
        print(f"{name}: {done}", flush=True)
    return found


def speed(lm: LanguageModel, config: Config) -> dict[str, float]:
    D, st = lm.d_model, Steerer(lm)
    g = torch.Generator().manual_seed(config.seed)
    hook, z = f"blocks.{lm.n_layers // 2}.hook_resid_post", f"blocks.{lm.n_layers // 2}.attn.hook_z"
    H = int(lm.config.num_attention_heads)
    small = torch.randn(D, 8, generator=g) / D
    opened = LanguageModel.load(config.work / "vector", device=lm.device, dtype=lm.dtype)
    ways: dict[str, tuple[LanguageModel, Callable[[], AbstractContextManager[Any]]]] = {
        "plain": (lm, nullcontext),
        "affine, full rank": (lm, lambda: st.edit(hook, AffineEdit(write=torch.randn(D, D, generator=g) / D**2))),
        "affine, rank 8": (lm, lambda: st.edit(hook, AffineEdit(write=small, read=small))),
        "heads": (lm, lambda: st.edit(z, HeadEdit(torch.ones(H, lm.hook_width(z) // H) / D))),
        "baked vector": (opened, nullcontext),
    }
    best, clock = dict.fromkeys(ways, 0.0), time.process_time if lm.device.type == "cpu" else time.perf_counter
    for turn in range(config.repeats + 1):
        for name, (model, context) in ways.items():
            with context():
                since = clock()
                model.generate("Once upon a time", max_new_tokens=config.tokens, min_new_tokens=config.tokens)
            if turn:  # the first turn warms up
                best[name] = max(best[name], config.tokens / (clock() - since))
    for name, rate in best.items():
        print(f"{name}: {rate:.1f} tokens/s, {rate / best['plain']:.3f} of plain", flush=True)
    return {name: rate / best["plain"] for name, rate in best.items()}


def main(config: Config) -> None:
    config.work.mkdir(parents=True, exist_ok=True)
    lm = LanguageModel.load(config.model)
    found = {"opposites": opposites(lm, config), "baked": baked(lm, config), "speed": speed(lm, config)}
    (config.work / "heads.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config))
