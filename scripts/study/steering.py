"""Ways to steer side by side, at equal KL and at each one's best scale: the goals of the SAE-TS paper, and AxBench's
concepts.

Vectors are those of `study.vectors` and of the effects (`Study.targeted`), each made of a topic's training texts. Every
vector is scaled to the same KL(steered || unsteered) per token on the same neutral texts; then the same prompts are
continued under all of them at once, greedily, the last token of the prompt and all that follow steered.
`study.measures` defines what is measured. Half of the prompts chooses a scale for each topic and way, the other half is
reported.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steersman import LanguageModel, SteeringVector, SteersmanError
from steersman.steer import CostMeter, Effects, fgaa_targets, search_scale, steered, token_kl, token_nll
from steersman.steer.evaluation import Continuations, likelihoods
from study.common import MORE_TEXTS, Kept, Results, Study, StudyConfig, chosen, effects_name
from study.material import Concept, Goal
from study.measures import (
    Classifier,
    Embedder,
    characteristic_words,
    fluency,
    lexical_rate,
    overall,
)
from study.steering_page import GROUPS, TOLERANCE, page
from study.vectors import Sides, best_features, held_out, of_others, spread, training, vector
from study.ways import OwnTexts
from study.writer import Writer, Written

__all__ = ["Config", "main", "page"]

COLUMNS = (
    "budget", "kl", "size", "chosen_by", "overall", "concept", "fluency", "words", "nll", "repeated", "kl_written",
    "relevance", "likelihood", "each",
)  # fmt: skip
"""Of a way at a scale: the KL asked for and measured (nats per token), |vector| in median norms of the states, the
overall score on the half that chooses, and on the half that is reported: the scores, characteristic words in 100, NLL
and repetition, the KL on what is written, the cosine with the request, the likelihood's rise, and the overall score of
each prompt."""
EVALUATIONS = 6
"""KLs to measure for a scale at most."""
MAPS = {"targeted": 1, "more": MORE_TEXTS}
"""Groups of ways that need an effect map, and of how many times as many texts."""
START = 0.3
"""Size that the first search starts from, in median norms."""


@dataclass(frozen=True, kw_only=True)
class Config(StudyConfig):
    """Settings of the comparison."""

    budgets: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """KL of each scale, in nats per token, rising."""
    concepts: int = 1000
    """Concepts to take at most, in the material's order, after all goals."""
    goals: int = 1000
    """Goals to take at most."""
    prompts: int = 8
    """Prompts of a topic: half of them choose the scale, half are reported. Topics take them in turn."""
    new_tokens: int = 16
    """Tokens to write."""
    items: int = 8
    """Held-out texts of each side for the likelihood."""
    item_tokens: int = 20
    """Tokens of each."""
    neutral: int = 4
    """Neutral texts that the KL is measured on."""
    neutral_tokens: int = 20
    """Tokens of each."""


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What is steered to."""

    key: str
    """Its name in the results."""
    number: int
    """Among those of its kind."""
    subject: Concept | Goal

    @property
    def instruction(self) -> str:
        """What prompting puts before a text."""
        if isinstance(self.subject, Concept):
            return f"The answer is about this: {self.subject.name}. "
        return f"This text is about {self.subject.name}. "


def topics(study: Study, config: Config) -> list[Topic]:
    """The goals, then the concepts."""
    found: list[Topic] = []
    for kind, subjects in (
        ("goal", study.material.goals[: config.goals]), ("concept", study.material.concepts[: config.concepts]),
    ):  # fmt: skip
        found += [Topic(key=f"{kind} {i:02}", number=i, subject=subject) for i, subject in enumerate(subjects)]
    return found


class Way(NamedTuple):
    """A way to steer at a scale."""

    method: str
    budget: float | None
    """None for what has no scale."""
    direction: Tensor | None
    """[D], of length 1."""
    size: float
    """What it is multiplied by."""
    kl: float


class Bench:
    """What all topics share: the model's writing, the neutral texts, the embeddings."""

    def __init__(self, study: Study, config: Config) -> None:
        self.study, self.config, self.lm, self.hook = study, config, study.lm, study.hook()
        self.embed = Embedder()
        self.writer = Writer(study.lm, self.hook, config.new_tokens)
        self.kept = Kept(config.work / "steered", [study.lm.digest(), self.hook])
        texts = study.material.held_out[: config.neutral]
        self.neutral = [self.cut(text, config.neutral_tokens) for text in texts]
        self.meter = CostMeter(self.lm, self.neutral)
        self.norm = self.meter.norms([self.hook])[self.hook]
        self.natural = self._natural(texts)

    @property
    def nothing(self) -> Tensor:
        """[1, D]: no vector."""
        return torch.zeros(1, self.lm.hook_width(self.hook))

    @cached_property
    def own(self) -> OwnTexts:
        """The vectors of the best features of all topics from their own texts."""
        every = topics(self.study, self.config)
        return OwnTexts(self.study, [best_features(self.study, topic.subject)[0] for topic in every])

    def cut(self, text: str, tokens: int, start: int = 0) -> str:
        """So many of a text's tokens, as a text."""
        ids = self.lm.token_ids(text)[start : start + tokens]
        return str(self.lm.tokenizer.decode(ids))

    def _natural(self, texts: Sequence[str], tokens: int = 48, after: int = 16) -> float:
        """The NLL of neutral texts under the unsteered model, per token, after their first tokens."""
        batch = self.lm.encode([self.cut(text, tokens) for text in texts])
        each = token_nll(self.lm.logits(batch), batch.input_ids)[:, after:]
        real = batch.attention_mask[:, 1:][:, after:].bool()
        return float(each[real].double().mean())

    def requests(self, topic: Topic) -> tuple[list[int], list[str], bool]:
        """The topic's prompts by number and as texts, and whether the model gets them as a user's messages."""
        material = self.study.material
        chat = isinstance(topic.subject, Concept) and bool(getattr(self.lm.tokenizer, "chat_template", None))
        given = material.instructions if isinstance(topic.subject, Concept) else material.openings
        n = self.config.prompts
        asked = [(topic.number * n + i) % len(given) for i in range(n)]
        return asked, [given[i] for i in asked], chat


class Texts(NamedTuple):
    """Texts that measures are made from, or that they are judged on."""

    positive: list[str]
    """Those of a topic."""
    negative: list[str]
    """Those without it, of another kind."""
    others: list[str]
    """Those of other topics."""

    @property
    def all_negative(self) -> list[str]:
        """What is not of the topic."""
        return self.negative + self.others


class TopicBench:
    """What is measured of one topic."""

    def __init__(self, bench: Bench, topic: Topic) -> None:
        self.bench, self.topic, self.config = bench, topic, bench.config
        self.asked, self.requests, self.chat = bench.requests(topic)
        built, held = self.sides(training), self.sides(held_out)
        self.words = characteristic_words(built.positive, built.all_negative)
        self.classifier = Classifier.fit(
            bench.embed, *([self.pieces(text) for text in side] for side in (built.positive, built.all_negative))
        )
        short = [[bench.cut(text, self.config.new_tokens) for text in side] for side in held]
        self.auroc, self.auroc_others = (self.classifier.auroc(short[0], side) for side in short[1:])
        self.items = [
            Continuations(prompt="", positive=a, negative=b)
            for a, b in zip(*([bench.cut(text, self.config.item_tokens) for text in side[: self.config.items]]
                              for side in (held.positive, held.others)))
        ]  # fmt: skip
        self.base = self.likelihoods()

    def sides(self, of: Callable[[Concept | Goal], Sides]) -> Texts:
        """The topic's texts, as many without it, and as many of other topics."""
        sides = of(self.topic.subject)
        n = len(sides.positive)
        others = of_others(self.bench.study.material, self.topic.subject, of, n)
        every = (sides.positive, spread(sides.negative, n), others)
        return Texts(*([example.text for example in side] for side in every))

    def pieces(self, text: str) -> list[str]:
        """The first two pieces of a text that are as long as a completion."""
        n = self.config.new_tokens
        found = [self.bench.cut(text, n, start) for start in (0, n)]
        return [piece for piece in found if piece.strip()] or [text]

    def likelihoods(self, push: Tensor | None = None, instruction: str = "") -> np.ndarray:
        """[items, 2]: log p per token of the topic's texts and of others', a vector [D] added to their states."""
        lm, items = self.bench.lm, [replace(item, prompt=instruction) for item in self.items]
        v = None if push is None else SteeringVector.of(push, hook_name=self.bench.hook)

        def arm(_rows: int) -> AbstractContextManager[Any]:
            return nullcontext() if v is None else steered(v, lm)

        def make() -> list[list[float]]:
            logp, n = likelihoods(lm, items, arm, 2 * len(items))
            return (logp / np.maximum(n, 1)).tolist()

        told = [[item.prompt, item.positive, item.negative] for item in items]
        return np.array(self.bench.kept(["likelihood", told, "" if push is None else push], make))

    # Ways

    def direction(self, method: str) -> SteeringVector:
        """The vector of a method."""
        study, subject = self.bench.study, self.topic.subject
        if method == "own_texts":
            return self.bench.own.vector(best_features(study, subject)[0])
        if method in ("sae_ts", "rotation"):
            return study.targeted(best_features(study, subject)[0], method)
        if method == "sae_ts_more":
            return study.targeted(best_features(study, subject)[0], times=MORE_TEXTS)
        if method == "fgaa":
            return study.targeted(self.fgaa_targets)
        if method == "fgaa_rows":
            weights = self.fgaa_targets
            rows = study.sae().W_dec.detach().float()[list(weights)]
            return SteeringVector.of(torch.tensor(list(weights.values())) @ rows, hook_name=self.bench.hook)
        return vector(study, subject, method)

    @cached_property
    def fgaa_targets(self) -> dict[int, float]:
        """The features that tell the topic's texts from those without it, with their weights, as FGAA chooses them."""
        built = training(self.topic.subject)
        texts = [[self.bench.cut(e.text, 48) for e in side[:48]] for side in (built.positive, built.negative)]
        return fgaa_targets(self.bench.study.lm, self.bench.study.sae(), *texts)

    def ways(self, methods: Sequence[str]) -> tuple[dict[str, list[Way]], dict[str, str]]:
        """Each method's scales; and of those that have no vector the reason."""
        found: dict[str, list[Way]] = {}
        missing: dict[str, str] = {}
        sizes: list[float] = []
        for method in methods:
            try:
                v = self.direction(method)
            except SteersmanError as error:
                missing[method] = str(error)
                continue
            unit = v / v.norm()
            same = next((m for m, ways in found.items() if torch.equal(_direction(ways), unit.vector)), None)
            if same is not None:
                found[method] = [way._replace(method=method) for way in found[same]]
                continue
            found[method] = self.scales(method, unit, sizes)
            sizes = [way.size for way in found[method]]
        return found, missing

    def scales(self, method: str, unit: SteeringVector, like: Sequence[float]) -> list[Way]:
        """The vector at each budget. Searches start from the sizes of another vector, or by the square law."""
        bench, found = self.bench, list[Way]()
        known: dict[float, float] = {}

        def cost(size: float) -> float:
            if size not in known:
                known[size] = bench.meter.cost("kl", lambda: steered(unit, bench.lm, scale=size))
            return known[size]

        for i, budget in enumerate(self.config.budgets):
            if not found:
                start = like[0] if like else START * bench.norm
            else:
                grown = like[i] / like[i - 1] if like else math.sqrt(budget / found[-1].kl)
                start = found[-1].size * grown
            of = ["scale", bench.neutral, unit.vector, budget, start]
            size, kl = bench.kept(of, partial(self.search, cost, budget, start))
            found.append(Way(method, budget, unit.vector, size, kl))
        return found

    def search(self, cost: Callable[[float], float], budget: float, start: float) -> tuple[float, float]:
        """The size at which the cost is the budget, and the cost there."""
        norm = self.bench.norm
        found = search_scale(
            cost, budget, start=start, low=1e-3 * norm, high=16 * norm, max_evaluations=EVALUATIONS,
            tolerance=TOLERANCE,
        )  # fmt: skip
        return found.scale, found.value

    def write(self, deltas: Tensor, instead: Sequence[str] | None = None) -> Written:
        """What is written after the topic's prompts, see `Writer.write`."""
        of = ["written", self.requests, self.chat, instead, self.config.new_tokens, deltas]
        make = partial(self.bench.writer.write, self.requests, deltas, chat=self.chat, instead=instead)
        return Written(**self.bench.kept(of, lambda: make()._asdict()))

    # Measures

    def group(self, group: str) -> dict[str, Any]:
        """The row of a group of methods."""
        found, missing = self.ways(GROUPS[group])
        ways = [way for each in found.values() for way in each]
        distinct = list({(way.size, _key(way)): way for way in ways}.values())
        place = {(way.size, _key(way)): i for i, way in enumerate(distinct)}
        value: dict[str, Any] = {"methods": {}, "missing": missing}
        if not ways:
            return value
        deltas = torch.stack([way.size * _direction([way]) for way in distinct])
        wrote = self.write(deltas)
        points = [self.point(way, wrote, i, self.rise(deltas[i])) for i, way in enumerate(distinct)]
        for method, each in found.items():
            value["methods"][method] = [points[place[way.size, _key(way)]] for way in each]
        return value

    def rise(self, push: Tensor | None = None, instruction: str = "") -> float:
        """How much likelier the topic's texts become than others', in nats per token."""
        return float(((self.likelihoods(push, instruction) - self.base) @ np.array([1.0, -1.0])).mean())

    def prompting(self) -> list[Any]:
        """An instruction before each prompt, at the KL that it has."""
        bench, told = self.bench, self.topic.instruction
        wrote = self.write(bench.nothing, [told + request for request in self.requests])
        way = Way("prompting", None, None, 0.0, prompted_kl(bench.lm, bench.neutral, told))
        return self.point(way, wrote, 0, self.rise(instruction=told))

    def about(self) -> dict[str, Any]:
        """The row of the topic itself: what it is measured by, and what the model scores unsteered and prompted."""
        wrote = self.write(self.bench.nothing)
        return {
            "name": self.topic.subject.name, "words": self.words, "auroc": _short(self.auroc),
            "auroc_others": _short(self.auroc_others), "penalty": self.classifier.penalty, "asked": self.asked[1::2],
            "unsteered": self.point(Way("unsteered", None, None, 0.0, 0.0), wrote, 0, 0.0),
            "methods": {"prompting": [self.prompting()]},
        }  # fmt: skip

    def point(self, way: Way, wrote: Written, i: int, rise: float) -> list[Any]:
        """The figures of a way, in the order of `COLUMNS`."""
        texts, half = wrote.texts[i], slice(1, None, 2)
        nll, repeated, kl = (np.array(each[i]) for each in (wrote.nll, wrote.repeated, wrote.kl))
        written = np.array([bool(text.strip()) for text in texts])
        probability = np.where(written, self.classifier([text if text.strip() else "-" for text in texts]), 0.0)
        fluent = [
            fluency(of_one, self.bench.natural, again) * bool(w) for of_one, again, w in zip(nll, repeated, written)
        ]
        scores = np.array([overall(2 * p, f) for p, f in zip(probability, fluent)])
        near = (self.bench.embed([text or "-" for text in texts]) * self.bench.embed(self.requests)).sum(1)
        figures = {
            "budget": way.budget, "kl": way.kl, "size": way.size / self.bench.norm, "chosen_by": scores[0::2].mean(),
            "overall": scores[half].mean(), "concept": 2 * probability[half].mean(),
            "fluency": np.mean(fluent[half]), "words": np.mean([lexical_rate(t, self.words) for t in texts[half]]),
            "nll": nll[half].mean(), "repeated": repeated[half].mean(), "kl_written": kl[half].mean(),
            "relevance": near[half].mean(), "likelihood": rise,
            "each": [_short(score) for score in scores[half]],
        }  # fmt: skip
        return [figures[name] if name == "each" else _short(figures[name]) for name in COLUMNS]


def _direction(ways: Sequence[Way]) -> Tensor:
    direction = ways[0].direction
    assert direction is not None  # of every way that is a vector
    return direction


def _key(way: Way) -> tuple[float, ...]:
    return tuple(_direction([way])[:16].tolist())


def _short(value: float | None) -> float | None:
    """To four digits, so that files stay small."""
    return None if value is None else float(f"{float(value):.4g}")


@torch.no_grad()
def prompted_kl(lm: LanguageModel, texts: Sequence[str], instruction: str) -> float:
    """KL(prompted || unprompted) per token of texts, the instruction before each."""
    total, n = 0.0, 0
    for text in texts:
        own = lm.token_ids(text)
        told = lm.token_ids(instruction, bos=True)
        plain = lm.token_ids("", bos=True)
        if not plain:
            own, plain = own[1:], own[:1]
        p, q = (lm.logits(torch.tensor([before + own]))[:, -len(own) :] for before in (told, plain))
        total, n = total + float(token_kl(p, q)[:, :-1].double().sum()), n + len(own) - 1
    return total / n


def main(config: Config) -> None:
    """Measure the rows that are not there."""
    config = replace(
        config, **chosen(config, budgets=(0.1, 0.5), prompts=4, new_tokens=12, items=2, concepts=2, goals=1)
    )
    study = Study(config)
    results = Results(config, "steering")
    every = topics(study, config)
    results.planned([f"{topic.key} {group}".strip() for topic in every for group in GROUPS])
    bench = Bench(study, config)
    results.row("about", lambda: {
        "columns": COLUMNS, "embedding": bench.embed.name, "natural_nll": _short(bench.natural),
        "median_norm": _short(bench.norm), "neutral_tokens": bench.meter.n_tokens,
    })  # fmt: skip
    for last in (False, True):
        for topic in every:
            measure(bench, results, topic, last)


def measure(bench: Bench, results: Results, topic: Topic, last: bool) -> None:
    """The rows of a topic that are not there. Those of SAE-TS wait for the last round, unless its effects are measured
    already: they take longest."""
    missing = [group for group in GROUPS if f"{topic.key} {group}".strip() not in results]
    if not last:
        missing = [group for group in missing if group not in MAPS or has_effects(bench.study, MAPS[group])]
    if missing:
        mine = TopicBench(bench, topic)
        for group in missing:
            make = partial(mine.group, group) if group else mine.about
            results.row(f"{topic.key} {group}".strip(), make)


def has_effects(study: Study, times: int) -> bool:
    """Whether the effects that SAE-TS needs are all measured."""
    try:
        Effects.open(study.config.work / effects_name(times))
    except SteersmanError:
        return False
    return True
