"""Ways of steering side by side at equal KL, on the bundled model and the grammar's exact concepts.

For every concept: a feature's direction, SAE-TS for that feature, the difference of
the means of stories with the concept and with another of its group (diffmean), the paired difference at its words (CAA)
and a random direction. Each is calibrated to the same KL(steered || base) per token on held-out stories; then fresh
prompts are continued and the concept's words counted. The feature is chosen among the one that tells the concept best
when read and those whose decoder rows promote its words most, on other stories, at the same KL, for its direction and
for SAE-TS apart; diffmean and CAA have no such choice.

    python scripts/bench/steering.py --work bench-steering --out results.json
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro

from steersman import (
    SAE,
    EffectMap,
    LanguageModel,
    Steerer,
    SteeringVector,
    SteersmanError,
    TrainConfig,
    cache_activations,
    collect_effects,
    train_sae,
)
from steersman.demo import CONCEPTS, MODEL_PATH, stories, texts, word_rate
from steersman.demo.concept_features import match_concepts, writing_features
from steersman.steer import Estimate, bootstrap, calibrate, generated_tokens, token_kl, token_nll

HOOK = "blocks.2.hook_resid_post"
READ, SCREEN, BUDGET, PROMPTS = 3, 5, 6, 7  # seeds of stories that neither the model nor the SAE was trained on


@dataclass(frozen=True, kw_only=True)
class Config:
    work: Path = Path("bench-steering")
    """Folder for the store, the SAE and the effects."""
    out: Path | None = None
    """Also write every figure to this JSON file."""
    concepts: int = 16
    """Concepts to steer to, at most two of a group."""
    budget: tuple[float, ...] = (0.1, 0.3, 1.0)
    """KL in nats per token."""
    prompts: int = 24
    """Prompts continued for each vector and budget."""
    examples: int = 64
    """Stories per side for diffmean and CAA."""
    tokens: int = 400_000
    """Tokens to train the SAE on."""
    effects: str = "{}"
    """JSON arguments of `collect_effects`."""
    min_signal: float = 1.5
    """Weakest effect, in units of its noise, to use."""
    seed: int = 0
    """Seed of the sampling and of the random directions."""


def trained_sae(lm: LanguageModel, work: Path, tokens: int) -> SAE:
    """An SAE on the bundled model; made once, then read from the folder."""
    store = cache_activations(lm, texts(tokens // 60 + 50, seed=0), hook=HOOK, out=str(work / "acts"), tokens=tokens)
    return train_sae(store, TrainConfig(d_sae=512, k=16), work / "sae")


def concept_vectors(lm: LanguageModel, name: str, n: int) -> dict[str, SteeringVector]:
    """diffmean and CAA of a concept against the other concepts of its group."""
    group, with_it, without, pairs = CONCEPTS[name].group, [], [], ([], [])
    others = [c for c in CONCEPTS.values() if c.group == group and c.name != name]
    for story in islice(stories(READ), 6000):
        spans = [span for span in story.spans if CONCEPTS[span[2]].group == group]
        if spans and spans[0][2] == name and len(with_it) < n:
            with_it.append(story.text)
            start, end, _ = spans[0]
            prompt = story.text[:start].rstrip()
            if prompt:
                other = others[len(pairs[0]) % len(others)]
                pairs[0].append((prompt, " " + story.text[start:end]))
                pairs[1].append((prompt, " " + other.words[len(pairs[1]) % len(other.words)]))
        elif spans and spans[0][2] != name and len(without) < n:
            without.append(story.text)
        if len(with_it) == len(without) == n:
            break
    options: dict[str, Any] = {"hook": HOOK, "batch_size": 64, "diagnostics": False}
    return {
        "diffmean": SteeringVector.contrast(lm, with_it, without, method="diffmean", **options),
        "CAA": SteeringVector.contrast(lm, *pairs, method="caa", **options),
    }


@torch.no_grad()
def word_probability(lm: LanguageModel, v: SteeringVector, words: tuple[str, ...], batch: Any) -> float:
    """Mean probability of a word of `words` as the next token while steering, over the tokens of a batch."""
    wanted = torch.tensor(sorted({lm.token_ids(f" {word}")[0] for word in words}))
    with Steerer(lm).vector(v):
        p = lm.logits(batch.input_ids, batch.attention_mask).float().softmax(-1)
    return float(p[batch.attention_mask.bool()][:, wanted].sum(-1).mean())


def best_vector(
    lm: LanguageModel,
    candidates: list[int],
    make: Callable[[int], SteeringVector],
    words: tuple[str, ...],
    budget: float,
    screen: list[str],
) -> tuple[int, SteeringVector] | None:
    """The candidate feature whose vector raises the words most at the budget on the screening stories, and the vector.

    Features that the vector cannot be made for (an effect too weak to tell from noise) or whose budget is out of reach
    are passed over.
    """
    best, batch, found = -1.0, lm.encode(screen), None
    for feature in candidates:
        try:
            v = make(feature)
        except SteersmanError:
            continue
        scaled = calibrate(v, lm, texts=screen, target_kl=budget)
        if scaled.search.converged and (rise := word_probability(lm, scaled.vector, words, batch)) > best:
            best, found = rise, (feature, v)
    return found


def effect_map(lm: LanguageModel, sae: SAE, work: Path, arguments: dict[str, Any]) -> EffectMap:
    """The effect map for SAE-TS, from the SAE's own decoder rows; measured once, then read from the folder."""
    openings = tuple(" ".join(text.split()[:4]) for text in texts(14, seed=SCREEN))
    settings = {"vectors": "decoder", "out": str(work / "effects"), "prompts": openings, **arguments}
    return collect_effects(lm, sae, texts(16, seed=BUDGET), **settings).fit()


@torch.no_grad()
def measure(
    lm: LanguageModel, v: SteeringVector | None, prompts: list[str], words: tuple[str, ...], seed: int
) -> list[dict[str, float]]:
    """Per prompt: the concept's words per 100, NLL under the unsteered model and KL per generated token."""
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "seed": seed}
    if v is None:
        made = lm.generate(prompts, **settings)
        steered = base = lm.logits(made.tokens, made.attention_mask)
    else:
        with Steerer(lm).vector(v):
            made = lm.generate(prompts, **settings)
            steered = lm.logits(made.tokens, made.attention_mask, prompt_length=made.prompt_length)
        base = lm.logits(made.tokens, made.attention_mask)
    chosen, nll = generated_tokens(made), token_nll(base, made.tokens)
    kl = token_kl(steered, base)[:, :-1]
    return [
        {
            "words per 100": word_rate([made.completions[i]], words),
            "NLL": float(nll[i][chosen[i]].mean()),
            "KL generated": float(kl[i][chosen[i]].mean()),
        }
        for i in range(len(prompts))
    ]


def main(args: Config) -> None:
    """Measure and print the table."""
    start, work = time.monotonic(), args.work
    lm = LanguageModel.load(str(MODEL_PATH), device="cpu")
    sae = trained_sae(lm, work, args.tokens)
    effects = effect_map(lm, sae, work, json.loads(args.effects))
    matches, seen, chosen = match_concepts(lm, sae, list(islice(stories(READ), 400))), Counter(), []
    for match in matches:
        group = CONCEPTS[match.concept].group
        seen[group] += 1
        if group != "name" and seen[group] <= 2 and len(chosen) < args.concepts:
            chosen.append(match)
    screen, held = texts(16, seed=SCREEN), texts(32, seed=BUDGET)
    prompts = [" ".join(text.split()[:8]) for text in texts(args.prompts, seed=PROMPTS)]
    rows: list[dict[str, Any]] = []
    searches: list[dict[str, Any]] = []
    for match in chosen:
        words = CONCEPTS[match.concept].words
        vectors = concept_vectors(lm, match.concept, args.examples)
        candidates = list(dict.fromkeys((match.feature, *writing_features(lm, sae, words))))
        middle = args.budget[len(args.budget) // 2]
        makers = {
            "feature": lambda feature: SteeringVector.of_feature(sae, feature),
            "SAE-TS": lambda feature: effects.solve({feature: 1.0}, min_signal=args.min_signal),
        }
        features: dict[str, int] = {}
        for method, make in makers.items():
            found = best_vector(lm, candidates, make, words, middle, screen)
            if found is None:
                print(f"{match.concept}: no {method} vector, each candidate is too weak or out of the budget's reach")
            else:
                features[method], vectors[method] = found
        vectors["random"] = vectors["diffmean"].random_like(args.seed + len(searches))
        plain = measure(lm, None, prompts, words, args.seed)
        rows += [
            {"concept": match.concept, "method": "unsteered", "budget": 0.0, "prompt": i, **m}
            for i, m in enumerate(plain)
        ]
        for method, v in vectors.items():
            for budget in args.budget:
                found = calibrate(v, lm, texts=held, target_kl=budget)
                record = {"concept": match.concept, "method": method, "budget": budget}
                record["feature"] = features.get(method)
                searches.append(record | asdict(found.search))
                if found.search.converged:
                    measured = measure(lm, found.vector, prompts, words, args.seed)
                    rows += [{**record, "prompt": i, **m} for i, m in enumerate(measured)]
        seconds = time.monotonic() - start
        print(f"{match.concept} (AUROC {match.auroc:.3f}): features {features}, {seconds:.0f} s", flush=True)
    report(rows, searches, args)
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "searches": searches}, indent=1) + "\n")


def report(rows: list[dict[str, Any]], searches: list[dict[str, Any]], args: Config) -> None:
    """Means over concepts of the means over prompts, with intervals over concepts, and over prompts within them."""

    def cells(method: str, budget: float, name: str, less: bool) -> tuple[Estimate | None, Estimate | None]:
        by_concept: dict[str, list[float]] = {}
        base = {(r["concept"], r["prompt"]): r[name] for r in rows if r["method"] == "unsteered"}
        for r in rows:
            if r["method"] == method and r["budget"] == budget:
                value = r[name] - (base[r["concept"], r["prompt"]] if less else 0.0)
                by_concept.setdefault(r["concept"], []).append(value)
        prompts = list(zip(*by_concept.values()))
        over_prompts = bootstrap([statistics.fmean(p) for p in prompts]) if prompts else None
        return bootstrap([statistics.fmean(v) for v in by_concept.values()]), over_prompts

    head = ("KL", "method", "n", "rise in words per 100", "(over prompts)", "NLL", "KL generated")
    print("\n{:>5} {:<10} {:>3}  {:<26} {:<18} {:<22} {}".format(*head))
    for method, budget in [("unsteered", 0.0), *((m, b) for b in args.budget for m in _methods(rows))]:
        rise, prompts = cells(method, budget, "words per 100", less=True)
        nll, kl = cells(method, budget, "NLL", less=False)[0], cells(method, budget, "KL generated", less=False)[0]
        if rise is None or prompts is None or nll is None or kl is None:
            print(f"{budget:>5g} {method:<10} {0:>3}  no vector met the budget")
            continue
        over = f"[{prompts.low:.2f}, {prompts.high:.2f}]"
        print(f"{budget:>5g} {method:<10} {rise.n:>3}  {rise!s:<26} {over:<18} {nll!s:<22} {kl.mean:.3g}")
    for budget in args.budget:
        for name in ("SAE-TS", "diffmean", "CAA", "random"):
            pair = [_means(rows, method, budget) for method in (name, "feature")]
            both = sorted(pair[0].keys() & pair[1].keys())
            found = bootstrap([pair[0][c] - pair[1][c] for c in both]) if both else None
            if found is not None:
                print(f"KL {budget:g}: {name} less feature, words per 100, same concepts: {found} (n {found.n})")
    counts = Counter(len(s["evaluations"]) for s in searches if s["converged"])
    missed = [s for s in searches if not s["converged"]]
    print(f"calibrations: {sum(counts.values())} converged, evaluations {dict(sorted(counts.items()))}")
    for s in missed:
        what = f"{s['concept']} {s['method']} KL {s['budget']:g}"
        print(f"  not converged ({s['reason']}): {what}, reached {s['value']:.3g}")


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    order = ["feature", "SAE-TS", "diffmean", "CAA", "random"]
    return [m for m in order if any(r["method"] == m for r in rows)]


def _means(rows: list[dict[str, Any]], method: str, budget: float) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for r in rows:
        if r["method"] == method and r["budget"] == budget:
            found.setdefault(r["concept"], []).append(r["words per 100"])
    return {concept: statistics.fmean(values) for concept, values in found.items()}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
