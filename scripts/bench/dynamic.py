"""KL-controlled strength against a constant one, on the bundled model and the grammar's exact concepts.

For each concept two ways to push it: its words' logits, and the direction of the last hidden states that writes them.
Each is used at the constant strength 2, at lower constant strengths, and at strength by need (Dynamic Activation
Composition, arXiv 2406.17563), whose largest is 2. The same prompts are continued with the same seed. `rise` is the
share of texts that come to hold a word of the concept, above that of the unsteered model; `KL` is KL(steered ||
unsteered) per generated token, of the text that was written.

Then, for each, the KL that a constant strength needs for 90 % of the control's rise (between the measured strengths).

    python scripts/bench/dynamic.py --concepts pets snow --prompts 64
"""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor

from steersman import Edit, LanguageModel
from steersman.demo import CONCEPTS, MODEL_PATH, texts
from steersman.lm import Generation
from steersman.steer import KLControl, LogitsEdit, Schedule, Steerer, VectorEdit, generated_tokens, token_kl

SCOPE = "last_prompt+generation"


@dataclass(frozen=True, kw_only=True)
class Config:
    concepts: tuple[str, ...] = ("pets", "snow", "treasure")
    """Concepts to write about."""
    prompts: int = 32
    """Prompts continued each time."""
    new_tokens: int = 32
    """Tokens of each."""
    logits: float = 6.0
    """Nats that strength 1 adds to the words' logits."""
    direction: float = 0.25
    """Length of strength 1 of the direction, in median norms of the states."""
    top_p: float = 0.9
    """The nucleus of the control."""
    out: Path | None = None
    """Also write every figure to this JSON file."""


def pushes(lm: LanguageModel, words: tuple[str, ...], args: Config, norm: float) -> dict[str, dict[str, Edit]]:
    """Name -> {hook point: edit} of strength 1."""
    ids = sorted({lm.token_ids(f" {word}")[0] for word in words})
    W_U = lm.unembed()[0]
    v = W_U[:, ids].mean(1) - W_U.mean(1)
    hook = f"blocks.{lm.n_layers - 1}.hook_resid_post"
    return {
        "logits": {"logits": LogitsEdit(dict.fromkeys(ids, args.logits))},
        "direction": {hook: VectorEdit(args.direction * norm * v / v.norm())},
    }


def share(text: Generation, words: tuple[str, ...]) -> float:
    """Part of the completions that hold one of the words."""
    return sum(any(word in words for word in re.findall(r"\w+", one)) for one in text.completions) / len(text.texts)


def main(args: Config) -> None:
    """Measure and print the table."""
    lm = LanguageModel.load(str(MODEL_PATH), device="cpu")
    st = Steerer(lm)
    prompts = [" ".join(text.split()[:6]) for text in texts(args.prompts, seed=7)]
    settings: dict[str, Any] = {"max_new_tokens": args.new_tokens, "do_sample": True, "seed": 1}
    batch, last = lm.encode(prompts), f"blocks.{lm.n_layers - 1}.hook_resid_post"
    states = lm.capture(batch.input_ids, batch.attention_mask, hooks=last)[last]
    norm = float(states[batch.attention_mask.bool()].norm(dim=-1).median())
    plain = lm.generate(prompts, **settings)

    def steered(edits: dict[str, Edit], strength: float | Tensor) -> AbstractContextManager[Any]:
        [(hook, edit)] = edits.items()
        if isinstance(strength, Tensor):
            return st.edit(hook, edit, scope=SCOPE, schedule=Schedule(strength))
        return st.edit(hook, edit.scaled(strength), scope=SCOPE)

    def kl(text: Generation, open_: Callable[[], AbstractContextManager[Any]]) -> float:
        given = text.batch
        base = lm.logits(given.input_ids, given.attention_mask)
        with open_():
            found = lm.logits(given.input_ids, given.attention_mask, prompt_length=text.prompt_length)
        return float(token_kl(found[:, :-1], base[:, :-1])[generated_tokens(text)].mean())

    rows = []
    print(
        f"{'concept':<12} {'push':<10} {'rise at 2':>9} {'KL':>7} {'rise by need':>12} {'KL':>7} {'strength':>8}",
        end="",
    )
    print(f" {'of rise':>8} {'of KL':>6} {'KL of a constant for 90 % of it':>32}")
    for name in args.concepts:
        words = CONCEPTS[name].words
        base = share(plain, words)
        for push, edits in pushes(lm, words, args, norm).items():
            curve = [(0.0, 0.0)]
            for strength in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0):
                with steered(edits, strength):
                    text = lm.generate(prompts, **settings)
                curve.append((share(text, words) - base, kl(text, lambda edits=edits, s=strength: steered(edits, s))))
            control = KLControl(properties=[edits], top_p=args.top_p).generate(lm, prompts, **settings)
            table = control.strengths[..., 0]
            rise = share(control.generation, words) - base
            cost = kl(control.generation, lambda edits=edits, table=table: steered(edits, table))
            needed = constant_cost(curve, 0.9 * rise)
            rows.append({"concept": name, "push": push, "curve": curve, "rise": rise, "kl": cost, "needed": needed})
            top = curve[-1]
            print(
                f"{name:<12} {push:<10} {top[0]:>9.2f} {top[1]:>7.3f} {rise:>12.2f} {cost:>7.3f} "
                f"{float(control.mean_strength):>8.2f} {rise / top[0] if top[0] else 0:>8.2f} {cost / top[1]:>6.2f} "
                f"{needed:>32.3f}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


def constant_cost(curve: list[tuple[float, float]], rise: float) -> float:
    """The least KL at which the constant strengths (rise, KL), joined by lines, reach a rise; infinite where none."""
    for (low, cost), (high, more) in pairwise(curve):
        if high >= rise:
            return cost + (more - cost) * (rise - low) / max(high - low, 1e-9) if rise > low else cost
    return float("inf")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
