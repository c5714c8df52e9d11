"""Particles against rejection sampling and best-of-n, at equal cost.

Constraints: a sentence that must match a regular expression. Eight particles, with multinomial resampling and without
replacement, against plain samples of which those that match are kept, at as many rows of forward passes (a plain
sample costs what it wrote until it matched or could not match any more). Both have the same target, so what differs is
how many matching texts there are, and the likeliest of them.

Rewards: Feynman-Kac particles (arXiv 2501.06848) on an autoregressive model, where the partial reward is that of the
prefix, against best-of-n with as many reward calls and with as many rows. The second measure is the texts' mean
log-probability per token under the model.

    python scripts/bench/particles.py --model PATH --out particles.json
"""

import json
import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from steersman import LanguageModel
from steersman.demo import MODEL_PATH
from steersman.steer import ParticleSet, Reward, best_of_n, particles
from steersman.steer.decoding import RegexMask, Resampler, WithoutReplacement

CONSTRAINTS = {
    "colours": ("My favourite colour is", r" [a-z]+(, because| and) [a-z ,']+\."),
    "a word": ("The weather today is", r" [a-z ,']* (rain|snow|wind)[a-z]* [a-z ,']*\."),
    "a list": ("Shopping list:", r"(\n- [a-z ]{3,20}){3}\n"),
    "a date": ("The battle took place on", r" (the )?[0-9]{1,2}(st|nd|rd|th)? (of )?[A-Z][a-z]+,? 1[0-9]{3}[.,]"),
}
REWARDED = ("Last summer we went to the", "The old house on the hill")
WORDS = ("rain", "storm", "cloud", "snow", "wind", "cold", "sea", "river", "water", "mountain")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str = str(MODEL_PATH)
    """A model's folder or hub id."""
    out: Path | None = None
    """Also write every figure to this JSON file."""
    n: int = 8
    """Particles of a prompt."""
    runs: int = 5
    """Runs of each, with seeds of their own."""
    new_tokens: int = 24
    """Tokens of a text."""
    lam: float = 2.0
    """Strength of the reward."""
    every: int = 6
    """Tokens between two looks at the reward."""


def plain_matches(lm: LanguageModel, prompt: str, mask: RegexMask, rows: int, config: Config, seed: int) -> list[float]:
    """Log-probabilities of the matching texts among plain samples, of which the last one ends at `rows` rows."""
    found: list[float] = []
    while rows > 0:
        [batch] = particles(
            lm, prompt, n=32, max_new_tokens=config.new_tokens, resampler="never", seed=seed, bos=config_bos(lm)
        )
        seed += 1
        for text in batch.tokens:
            ends = (i for i in range(1, len(text) + 1) if mask.state(text[:i]) < 0 or mask.closed(text[:i]))
            end = next(ends, len(text))
            if rows <= 0:
                break
            rows -= end
            if mask.complete(text[:end]):
                found.append(log_probability(lm, prompt, text[:end]))
    return found


def config_bos(lm: LanguageModel) -> bool:
    """No BOS where the tokenizer's own BOS opens a turn of a chat."""
    return "im_start" not in str(lm.tokenizer.bos_token)


def log_probability(lm: LanguageModel, prompt: str, text: tuple[int, ...]) -> float:
    """Of a continuation, under the model alone."""
    start = lm.token_ids(prompt, bos=config_bos(lm))
    ids = torch.tensor([[*start, *text]])
    log_p = lm.logits(ids).double().log_softmax(-1)[0, len(start) - 1 : -1]
    return float(log_p.gather(1, ids[0, len(start) :, None].to(log_p.device)).sum())


def constrained(lm: LanguageModel, config: Config) -> list[dict[str, Any]]:
    """One line for each constraint and resampler."""
    lines = []
    resamplers: dict[str, str | Resampler] = {"multinomial": "multinomial", "without": WithoutReplacement(3)}
    for name, (prompt, pattern) in CONSTRAINTS.items():
        mask = RegexMask(lm, pattern, needs_end=False)
        others: list[list[float]] = []  # of as many rows as the first resampler's
        for label, resampler in resamplers.items():
            sets, seconds = [], 0.0
            for seed in range(config.runs):
                since = time.perf_counter()
                [found] = particles(
                    lm,
                    prompt,
                    mask=mask,
                    n=config.n,
                    max_new_tokens=config.new_tokens,
                    resampler=resampler,
                    seed=seed,
                    bos=config_bos(lm),
                )
                seconds += time.perf_counter() - since
                sets.append(found)
                if len(others) < config.runs:
                    others.append(plain_matches(lm, prompt, mask, found.cost.rows, config, 1000 * (seed + 1)))
            lines.append({"constraint": name, "resampler": label, "seconds": seconds, **figures(sets, others, pattern)})
            print(line(lines[-1]), flush=True)
    return lines


def figures(sets: list[ParticleSet], others: list[list[float]], pattern: str) -> dict[str, Any]:
    """What the runs of one constraint come to."""
    best = [float(found.log_prior.max()) for found in sets]
    return {
        "texts": sum(len(found) for found in sets),
        "broken": sum(not re.fullmatch(pattern, text) for found in sets for text in found.completions),
        "different": statistics.mean(len(set(found.completions)) for found in sets),
        "log_z": statistics.mean(found.log_z or 0.0 for found in sets),
        "rows": statistics.mean(found.cost.rows for found in sets),
        "rejection_matches": statistics.mean(map(len, others)),
        "best_log_p": statistics.mean(best),
        "rejection_best": [max(found, default=None) for found in others],
        "ahead": sum(b > max(found, default=-math.inf) for b, found in zip(best, others)),
        "example": sets[0].completions[sets[0].best("prior")],
    }


def line(found: dict[str, Any]) -> str:
    """A line of the table."""
    theirs = [b for b in found["rejection_best"] if b is not None]
    return (
        f"{found['constraint']:9} {found['resampler']:12} broken {found['broken']}/{found['texts']}, "
        f"{found['different']:.1f} different, log Z {found['log_z']:.1f}, {found['rows']:.0f} rows, "
        f"best log p {found['best_log_p']:.1f}; rejection: {found['rejection_matches']:.1f} matches, best "
        f"{statistics.mean(theirs) if theirs else math.nan:.1f} in {len(theirs)} runs; ahead in {found['ahead']}, "
        f"{found['seconds']:.0f} s; {found['example']!r}"
    )


def words_of(texts: list[str]) -> list[float]:
    """The reward: different words of the list, up to four."""
    return [float(min(4, sum(word in text for word in WORDS))) for text in texts]


def rewarded(lm: LanguageModel, config: Config) -> list[dict[str, Any]]:
    """One line for each way to a high reward."""
    T, bos = config.new_tokens, config_bos(lm)
    sums: dict[str, list[list[float]]] = {}
    for seed in range(config.runs):
        seeds = 100 * seed
        for prompt in REWARDED:
            [fk] = particles(
                lm,
                prompt,
                potential=Reward(words_of, config.lam),
                every=config.every,
                n=config.n,
                max_new_tokens=T,
                seed=seeds,
                bos=bos,
            )
            calls, rows = fk.cost.reward_calls, max(1, fk.cost.rows // T)
            plain = {
                f"best of {name}": best_of_n(lm, prompt, words_of, n, max_new_tokens=T, seed=seeds + 1, bos=bos)[0]
                for name, n in (("as many rows", rows), ("as many reward calls", calls))
            }
            mean = float(plain["best of as many reward calls"].log_potential.mean())
            note(sums, "the model", mean, 0.0, 1, plain["best of as many reward calls"])
            note(sums, "particles, weighted mean", fk.mean(words_of(fk.completions)), calls, rows, fk)
            for name, found in {"particles, best": fk, **plain}.items():
                best = found.best()
                score = words_of([found.completions[best]])[0]
                note(sums, name, score, found.cost.reward_calls, found.cost.rows // T, found, best)
    out = []
    for name, values in sums.items():
        reward, asked, texts, nll = (statistics.mean(column) for column in zip(*values))
        out.append({"way": name, "reward": reward, "reward_calls": asked, "texts": texts, "log_p_token": nll})
        print(f"{name:30} reward {reward:.2f}, {asked:.0f} calls, rows of {texts:.0f} texts, log p {nll:.2f} a token")
    return out


def note(
    sums: dict[str, list[list[float]]], name: str, reward: float, calls: float, texts: float, found: Any, i: int = -1
) -> None:
    """Keep the figures of one way in one run: of particle i, or the mean over all."""
    each = found.log_prior / torch.tensor([len(text) for text in found.tokens])
    value = float(each[i]) if i >= 0 else found.mean(each)
    sums.setdefault(name, []).append([reward, calls, texts, value])


def main(config: Config) -> None:
    lm = LanguageModel.load(config.model)
    torch.set_grad_enabled(False)
    found = {"model": lm.name, "constraints": constrained(lm, config), "rewards": rewarded(lm, config)}
    if config.out is not None:
        config.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
