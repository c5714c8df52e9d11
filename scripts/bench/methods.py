"""Published systems side by side at equal KL: what each preset does to held-out text, and what it costs.

Two tasks. Persona: statements of a trait (anthropics/evals), the answer that matches it against the one that does not.
AxBench: texts with a concept (stanfordnlp/axbench concept10) against texts without. Each preset is built from one part
of the data, scaled to the same KL(steered || base) per token on other texts, and measured on a third part: the rise of
the margin between the two sides, in nats per token, with its interval over items. Beside it stand a constant vector
(the difference of the means at the same layer), a random one of its norm, and an instruction before the prompt, whose
KL is what it is. Every way steers every token here, also where its authors steer fewer, so that one cost is like
another. No judge is asked. Rows are written as they are made, and the same command goes on after them.

    python scripts/bench/methods.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data DIR --sae SAE --out methods.json
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
import tyro

from steersman import SAE, LanguageModel, SteeringVector, SteersmanError
from steersman.steer import (
    CostMeter,
    EditSet,
    bootstrap,
    calibrate,
    contrast,
    find_condition,
    percentile_limits,
    preset,
    score_features,
    steered,
    token_kl,
)
from steersman.steer.evaluation import Continuations, likelihoods
from steersman.steer.scores import labelled_sides

PERSONA, AXBENCH = "persona: {}", "AxBench: {}"


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    """Folder or hub id of the model."""
    data: Path
    """Folder with `behaviours/` (persona statements) and `axbench_concept10/`."""
    out: Path = Path("bench-methods.json")
    """File of every figure; rows that are in it are not measured again."""
    sae: str | None = None
    """SAE of the model's residual stream, for the presets that steer by features."""
    only: tuple[str, ...] = ()
    """Rows to measure; by default all."""
    trait: str = "extraversion"
    """Persona trait."""
    concept: int = 1
    """AxBench concept."""
    layer: float = 0.41
    """Where vectors are read and added, as a fraction of the depth; the SAE's own layer for features."""
    budget: float = 0.2
    """KL in nats per token."""
    examples: int = 24
    """Examples of each side to build from."""
    items: int = 24
    """Held-out items."""
    texts: int = 5
    """Texts to measure the KL on."""
    words: int = 20
    """AxBench texts are cut to this many words."""
    evaluations: int = 7
    """Scales to try for each row."""
    summary: Path | None = None
    """Also write means, intervals and costs here, without the single items."""
    seed: int = 0
    """Seed of the choice of texts and of the random vector."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Texts to build from, items to measure, texts for the budget."""

    name: str
    positive: list[tuple[str, str]]
    negative: list[tuple[str, str]]
    items: list[Continuations]
    texts: list[str]
    other: list[str]
    """Prompts of another kind, for conditions."""
    instruction: str
    hook: str
    group: int = 1
    """Neighbouring items whose mean is one unit of the interval: a statement to agree with and one to reject, so that
    a push towards " Yes" is no effect."""
    config: Config = field(repr=False)

    @property
    def pairs(self) -> tuple[list[Any], list[Any]]:
        """(positive, negative) as presets take them."""
        return self.positive, self.negative


def persona(args: Config, hook: str, other: list[str]) -> Task:
    rows = [json.loads(line) for line in (args.data / "behaviours" / f"{args.trait}.jsonl").read_text().splitlines()]
    found = [
        (f"Question: {r['question']}\nAnswer:", r["answer_matching_behavior"], r["answer_not_matching_behavior"])
        for r in rows
    ]
    random.Random(args.seed).shuffle(found)
    sides = [[f for f in found if f[1] == answer] for answer in (" Yes", " No")]
    mixed = [side for pair in zip(*sides) for side in pair]  # as many to agree with as to reject
    made, rest = mixed[: args.examples], mixed[args.examples :]
    return Task(
        name=PERSONA.format(args.trait),
        positive=[(p, a) for p, a, _ in made], negative=[(p, b) for p, _, b in made],
        items=[Continuations(prompt=p, positive=a, negative=b) for p, a, b in rest[: args.items]],
        texts=[p for p, _, _ in rest[args.items : args.items + args.texts]], other=other,
        instruction=f"Answer as somebody who is very high in {args.trait}. ", hook=hook, group=2, config=args,
    )  # fmt: skip


def axbench(args: Config, hook: str) -> Task:
    folder = args.data / "axbench_concept10"
    rows = parquet.read_table(folder / "prod_2b_l20_v1_train_data.parquet").to_pylist()
    concepts = [json.loads(line) for line in (folder / "prod_2b_l20_v1_metadata.jsonl").read_text().splitlines()]

    def cut(text: str) -> str:
        return " ".join(text.split()[: args.words])

    with_it = [(r["input"] + "\n", cut(r["output"])) for r in rows if r["concept_id"] == args.concept]
    without = [(r["input"] + "\n", cut(r["output"])) for r in rows if r["concept_id"] == -1]
    random.Random(args.seed).shuffle(with_it)
    random.Random(args.seed).shuffle(without)
    n, m = args.examples, args.items
    return Task(
        name=AXBENCH.format(concepts[args.concept]["concept"]),
        positive=with_it[:n], negative=without[:n],
        items=[
            Continuations(prompt="", positive=a, negative=b)
            for (_, a), (_, b) in zip(with_it[n : n + m], without[n : n + m])
        ],
        texts=[p + a for p, a in without[n + m : n + m + args.texts]], other=[],
        instruction=f"Write with {concepts[args.concept]['concept']}. ", hook=hook, config=args,
    )  # fmt: skip


def constant(lm: LanguageModel, task: Task) -> SteeringVector:
    """The difference of the means over the answers' tokens."""
    return contrast(
        lm, task.positive, task.negative, hook=task.hook, method="diffmean", positions="answer", diagnostics=False
    )


def selected(lm: LanguageModel, task: Task, sae: SAE, score: str, n: int) -> list[int]:
    """The n features that a score puts first."""
    table = score_features(lm, sae, score, positive=task.positive, negative=task.negative)
    return [found.feature for found in table.top(score, n)]


Build = Callable[[LanguageModel, Task, SAE | None], Any]


def rows() -> dict[str, Build]:
    """How each row is built from a task; a preset that needs what the tasks lack has none."""

    def of(name: str, **settings: Any) -> Build:
        return lambda lm, task, sae: preset(name).build(lm, examples=task.pairs, **settings)

    def at(name: str, **settings: Any) -> Build:
        return lambda lm, task, sae: preset(name).build(lm, examples=task.pairs, layer=task.config.layer, **settings)

    def with_sae(build: Build) -> Build:
        def made(lm: LanguageModel, task: Task, sae: SAE | None) -> Any:
            if sae is None:
                raise SteersmanError("no SAE was given")
            return build(lm, task, sae)

        return made

    def cast(lm: LanguageModel, task: Task, sae: SAE | None) -> Any:
        prompts = [prompt for prompt, _ in task.positive]
        others = task.other or [answer for _, answer in task.negative]
        hooks = [f"blocks.{i}.hook_resid_pre" for i in range(2, lm.n_layers // 2, 3)]
        condition = find_condition(lm, prompts, others[: len(prompts)], hooks=hooks)
        return preset("cast").build(lm, condition=condition, vector=constant(lm, task))

    def capping(lm: LanguageModel, task: Task, sae: SAE | None) -> Any:
        axis = constant(lm, task)
        limits = percentile_limits(lm, [p + a for p, a in task.positive], axis, 75)
        return preset("capping").build(lm, axis=axis, limits=limits)

    def features(name: str, **settings: Any) -> Build:
        return with_sae(lambda lm, task, sae: preset(name).build(lm, sae=sae, examples=task.pairs, **settings))

    def personality(lm: LanguageModel, task: Task, sae: Any) -> Any:
        chosen = selected(lm, task, sae, "contrast", 3)
        return preset("personality").build(lm, sae=sae, features=chosen, strength=1.0, units="max_act")

    def output_score(lm: LanguageModel, task: Task, sae: Any) -> Any:
        candidates = selected(lm, task, sae, "contrast", 8)
        return preset("output_score").build(lm, sae=sae, candidates=candidates, strength=1.0)

    def corrsteer(lm: LanguageModel, task: Task, sae: Any) -> Any:
        rewarded = labelled_sides(lm, task.positive, task.negative)
        return preset("corrsteer").build(lm, saes=sae, rewarded=rewarded)

    def style(lm: LanguageModel, task: Task, sae: SAE | None) -> Any:
        styles = {"with": [p + a for p, a in task.positive], "without": [p + a for p, a in task.negative]}
        return preset("style_vectors").build(lm, styles=styles, style="with")

    def psr(lm: LanguageModel, task: Task, sae: SAE | None) -> Any:
        prompts = [prompt for prompt, _ in task.positive[:16]]
        return preset("psr").build(
            lm, prompts=prompts, instruction=task.instruction, layer=task.config.layer, max_new_tokens=12, epochs=4
        )

    def unsafe(lm: LanguageModel, task: Task, sae: SAE | None) -> Any:
        return preset("safety_vector").build(lm, examples=task.pairs[::-1])  # moved away from the other side

    return {
        "constant vector": lambda lm, task, sae: constant(lm, task),
        "random vector": lambda lm, task, sae: constant(lm, task).random_like(task.config.seed),
        "cast": cast,
        "capping": capping,
        "icv": of("icv"),
        "sttp": at("sttp", positions="answer"),
        "stmp": at("stmp", positions="answer"),
        "mimic": at("mimic", positions="answer"),
        "leace": at("leace", positions="answer"),
        "iti": of("iti"),
        "lf_steering": features("lf_steering"),
        "corrsteer": with_sae(corrsteer),
        "output_score": with_sae(output_score),
        "sae_ssv": features("sae_ssv"),
        "reft_r1": at("reft_r1"),
        "ssv": at("ssv"),
        "psr": psr,
        "personality": with_sae(personality),
        "style_vectors": style,
        "vti_text": of("vti_text"),
        "safety_vector": unsafe,
        "mean_matching": at("mean_matching", positions="answer"),
        "swfc": at("swfc", positions="answer"),
        "bipo": at("bipo", epochs=2),
        "latent_steering": at("latent_steering", steps=30),
    }


@torch.no_grad()
def prompted(lm: LanguageModel, task: Task) -> dict[str, Any]:
    """The instruction before each prompt: margins, and its KL on the texts that follow it."""
    items = [
        Continuations(prompt=f"{task.instruction}{i.prompt}", positive=i.positive, negative=i.negative)
        for i in task.items
    ]
    costs, n = 0.0, 0
    for text in task.texts:
        base, shown = (lm.encode([prefix + text]) for prefix in ("", task.instruction))
        length = base.input_ids.shape[1] - 1  # the tokens behind the BOS, which both end in
        p, q = (lm.logits(batch.input_ids)[:, -length:] for batch in (shown, base))
        costs, n = costs + float(token_kl(p, q)[:, :-1].double().sum()), n + length - 1
    return {"margins": margins(lm, items, None).tolist(), "kl": costs / n}


def margins(lm: LanguageModel, items: list[Continuations], what: Any) -> np.ndarray:
    """Log-likelihood per token of the positive less that of the negative continuation of each item."""

    def arm(_rows: int) -> Any:
        return torch.no_grad() if what is None else steered(what, lm)

    logp, n = likelihoods(lm, items, arm, 12)
    return (logp / np.maximum(n, 1)) @ np.array([1.0, -1.0])


def main(args: Config) -> None:
    """Measure what is not yet in the file, and print the table."""
    lm = LanguageModel.load(args.model, device="cpu")
    sae = None if args.sae is None else SAE.load(args.sae)
    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    hook = f"blocks.{round(args.layer * (lm.n_layers - 1))}.hook_resid_post"
    second = axbench(args, hook)
    tasks = [persona(args, hook, [prompt for prompt, _ in second.negative]), second]
    meters: dict[str, CostMeter] = {}

    def save() -> None:
        args.out.write_text(json.dumps(known, indent=1) + "\n")

    for task in tasks:
        mine = known.setdefault(task.name, {"rows": {}, "group": task.group})
        if "base" not in mine:
            mine["base"] = margins(lm, task.items, None).tolist()
        if "prompt" not in mine["rows"]:
            shown = prompted(lm, task)
            effects = np.array(shown["margins"]) - np.array(mine["base"])
            mine["rows"]["prompt"] = {"effects": effects.tolist(), "kl": shown["kl"]}
            save()
    for name, build in rows().items():
        for task in tasks:
            mine = known[task.name]
            if name in mine["rows"] or (args.only and name not in args.only):
                continue
            start = time.monotonic()
            try:
                made = build(lm, task, sae)
                made = dict(made) if isinstance(made, EditSet) else made
                if task.name not in meters:
                    meters[task.name] = CostMeter(lm, task.texts, max_length=64)
                meter = meters[task.name]
                found = calibrate(
                    made, lm, texts=meter, target_kl=args.budget, tolerance=0.12, max_evaluations=args.evaluations
                )
                effects = margins(lm, task.items, found.vector) - np.array(mine["base"])
                row: dict[str, Any] = {
                    "effects": effects.tolist(), "kl": found.search.value, "scale": found.search.scale,
                    "reason": found.search.reason,
                    "loss": meter.cost("loss", lambda what=found.vector: steered(what, lm)),
                    "seconds": time.monotonic() - start,
                }  # fmt: skip
            except SteersmanError as error:
                row = {"error": str(error)}
            mine["rows"][name] = row
            save()
            print(f"{task.name} / {name}: {told(row, task.group)} ({time.monotonic() - start:.0f} s)", flush=True)
    if args.summary is not None:
        args.summary.write_text(json.dumps(summary(known, args, lm.name), indent=1) + "\n")
    for task_name, task in known.items():
        for name, row in task["rows"].items():
            print(f"{task_name} / {name}: {told(row, task['group'])}")


def told(row: dict[str, Any], group: int) -> str:
    return row.get("error") or f"effect {bootstrap(units(row, group))}, KL {row['kl']:.3g}"


def units(row: dict[str, Any], group: int) -> np.ndarray:
    """The effects, the mean of each group of neighbours."""
    return np.array(row["effects"]).reshape(-1, group).mean(1)


def summary(known: dict[str, Any], args: Config, model: str) -> dict[str, Any]:
    """Means, intervals and costs, in the order of the rows."""
    order = ["constant vector", "random vector", "prompt", *rows()]
    tasks = {}
    for name, task in known.items():
        mine = {}
        for row in dict.fromkeys(order):
            if "effects" not in (found := task["rows"].get(row, {})) or found["kl"] == 0:
                continue  # it was not made, or acts on none of the texts of the budget
            effect = bootstrap(units(found, task["group"]))
            assert effect is not None
            mine[row] = {"effect": round(effect.mean, 4), "low": round(effect.low, 4), "high": round(effect.high, 4)}
            mine[row] |= {"kl": round(found["kl"], 4), "n": effect.n, "reason": found.get("reason", "as it is")}
            if "loss" in found:
                mine[row]["loss"] = round(found["loss"], 4)
        tasks[name] = mine
    return {"model": model, "budget": args.budget, "examples": args.examples, "items": args.items, "tasks": tasks}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
