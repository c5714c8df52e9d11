"""What the study reads: texts, concepts, goals and traits, from the papers' data or the bundled grammar.

The folder of the papers' data holds `wikitext2.jsonl` and `tinystories_1000.jsonl` (`text`), `axbench_concept10/` (the
parquet and metadata files of stanfordnlp/axbench), `sae_ts_goals.json` (the contrast prompts of slavachalnev/SAE-TS)
and `behaviours/` (persona and corrigibility statements of anthropics/evals).
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from steersman import SteersmanError
from steersman.demo import CONCEPTS, stories, texts
from steersman.train import Mixture

HELD_OUT = 12
"""Of so many documents the last is held out: no activation is cached of it."""
TRAITS = ("agreeableness", "conscientiousness", "extraversion", "neuroticism", "openness")
CORRIGIBLE = "corrigible-neutral-HHH"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text, and what it answers."""

    prompt: str
    """May be empty."""
    text: str

    @property
    def pair(self) -> tuple[str, str]:
        """(prompt, text) as vectors are made from."""
        return self.prompt, self.text


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A concept with texts to make vectors from, and others to measure on."""

    name: str
    group: str
    """The set that it comes from: its negatives are those of the group."""
    positive: list[Example]
    negative: list[Example]
    eval_positive: list[Example]
    eval_negative: list[Example]
    eval_hard: list[Example] = field(default_factory=list)
    """Texts that use the words in another sense."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal of the SAE-TS paper: prompts that show it, and prompts that do not."""

    name: str
    positive: list[str]
    negative: list[str]


@dataclass(frozen=True, kw_only=True)
class Trait:
    """Questions with the answer that shows a trait, and the one that does not."""

    name: str
    questions: list[tuple[str, str, str]]
    """(question, answer that matches, answer that does not)."""

    def balanced(self, seed: int = 0) -> list[tuple[str, str, str]]:
        """The questions shuffled, in turn one for each matching answer, so that a push to one answer is no effect."""
        shuffled = list(self.questions)
        random.Random(seed).shuffle(shuffled)
        answers = sorted({matching for _, matching, _ in shuffled})
        return [q for group in zip(*([q for q in shuffled if q[1] == a] for a in answers)) for q in group]


@dataclass(frozen=True, kw_only=True)
class Material:
    """All of it."""

    name: str
    mixture: Mixture
    """What activations are cached of."""
    shares: dict[str, float]
    """Of the tokens of the mixture, by source."""
    context_length: int
    held_out: list[str]
    """Texts that are not in the mixture, in turn of each source."""
    openings: list[str]
    """Neutral beginnings to go on from."""
    instructions: list[str]
    """Neutral requests, for models with a chat template; else beginnings again."""
    concepts: list[Concept]
    goals: list[Goal]
    traits: list[Trait]

    def others(self, topic: Concept | Goal) -> Sequence[Concept | Goal]:
        """The topics of the same kind but for this one."""
        kind: Sequence[Concept | Goal] = self.goals if isinstance(topic, Goal) else self.concepts
        return [one for one in kind if one.name != topic.name]


OPENINGS = (
    "I think", "The weather today is", "My favourite place is", "Yesterday I went to", "In the morning we",
    "The most important thing about my day is", "Let me tell you about", "When I was young", "Last week the neighbours",
    "The report says that", "People often ask me", "On the table there was", "After dinner they", "Once upon a time",
    "This product is", "The best way to learn is", "It was late when", "There are many reasons to", "Our team decided",
    "At the end of the street",
)  # fmt: skip
"""Beginnings for open-ended generation, of the kind that the SAE-TS paper uses."""
INSTRUCTIONS = (
    "Tell me about your day.", "How do I make good coffee?", "Write a short note to a friend.",
    "What should I read next?", "Describe a walk in the park.", "Give me advice on learning the piano.",
    "What makes a good leader?", "Explain how rain forms.", "Suggest a plan for the weekend.",
    "Write the first lines of a story.", "How can I sleep better?", "What is a good gift for a colleague?",
    "Describe your favourite room.", "Why do people travel?", "Summarise what a library is for.",
    "How do bicycles stay upright?",
)  # fmt: skip


def check_papers(folder: Path) -> None:
    """Raise SteersmanError where a folder lacks some of the papers' data."""
    for needed in ("wikitext2.jsonl", "tinystories_1000.jsonl", "axbench_concept10", "sae_ts_goals.json", "behaviours"):
        if not (folder / needed).exists():
            raise SteersmanError(f"{folder} lacks {needed}: docs/results/index.md says where the data are from")


def papers(folder: Path, small: bool = False, *, template: bool = True) -> Material:
    """The papers' data. `small`: two goals, four concepts and two traits. Without a chat `template` conversations are
    texts, a line a turn."""
    check_papers(folder)
    shares = {"wiki": 0.45, "stories": 0.2, "chat": 0.35}
    chats = list(_chats(folder / "axbench_concept10"))
    wiki, tales = (_lines(folder / name) for name in ("wikitext2.jsonl", "tinystories_1000.jsonl"))
    sources: dict[str, list[Any]] = {
        "wiki": [row["text"] for row in wiki],
        "stories": [row["text"] for row in tales],
        "chat": chats if template else ["\n".join(turn["content"] for turn in chat) for chat in chats],
    }
    kept = {name: [d for i, d in enumerate(found) if i % HELD_OUT != HELD_OUT - 1] for name, found in sources.items()}
    aside = [sources[name][HELD_OUT - 1 :: HELD_OUT] for name in ("wiki", "stories")]
    concepts = list(_axbench(folder / "axbench_concept10"))
    goals = [
        Goal(name=name.replace("_", " "), positive=found["act_steer"]["pos"], negative=found["act_steer"]["neg"])
        for name, found in json.loads((folder / "sae_ts_goals.json").read_text()).items()
    ]
    traits = [
        Trait(
            name=name.removesuffix("-neutral-HHH"),
            questions=[
                (row["question"], row["answer_matching_behavior"], row["answer_not_matching_behavior"])
                for row in _lines(folder / "behaviours" / f"{name}.jsonl")
            ],
        )
        for name in (*TRAITS, CORRIGIBLE)
    ]
    return Material(
        name="papers", mixture=Mixture([(kept[name], share) for name, share in shares.items()]), shares=shares,
        context_length=256, held_out=[text for pair in zip(*aside) for text in pair], openings=list(OPENINGS),
        instructions=list(INSTRUCTIONS), concepts=concepts[:4] if small else concepts,
        goals=goals[:2] if small else goals, traits=traits[-2:] if small else traits,
    )  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _chats(folder: Path) -> Iterator[list[dict[str, str]]]:
    """AxBench's training texts as conversations, in an order that mixes the concepts. None of its evaluation texts."""
    rows = [row for path in sorted(folder.glob("*_train_data.parquet")) for row in parquet.read_table(path).to_pylist()]
    seen: set[tuple[str, str]] = set()
    random.Random(0).shuffle(rows)
    for row in rows:
        turn = (row["input"], row["output"])
        if turn not in seen:
            seen.add(turn)
            yield [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]


def _axbench(folder: Path) -> Iterator[Concept]:
    """The concepts of each set, in turn of the sets, so that the first ones are of all."""
    found: list[list[Concept]] = []
    for path in sorted(folder.glob("*_metadata.jsonl")):
        name = path.name.removesuffix("_metadata.jsonl")
        train = parquet.read_table(folder / f"{name}_train_data.parquet").to_pylist()
        latent = parquet.read_table(folder / f"{name}_latent_eval_data.parquet").to_pylist()

        def of(rows: Sequence[dict[str, Any]], concept: int, category: str) -> list[Example]:
            return [
                Example(prompt=row["input"], text=row["output"])
                for row in rows
                if row["concept_id"] == concept and row["category"] == category
            ]

        found.append(
            [
                Concept(
                    name=told["concept"], group=name, positive=of(train, told["concept_id"], "positive"),
                    negative=of(train, -1, "negative"), eval_positive=of(latent, told["concept_id"], "positive"),
                    eval_negative=of(latent, told["concept_id"], "negative"),
                    eval_hard=of(latent, told["concept_id"], "hard negative"),
                )
                for told in _lines(path)
            ]
        )  # fmt: skip
    yield from (concept for turn in zip(*found) for concept in turn)


@cache
def bundled(small: bool = False) -> Material:
    """The story grammar of the bundled model, which labels every concept exactly."""
    names = [name for name, concept in CONCEPTS.items() if concept.group != "name"][:: 12 if small else 4]
    concepts = [_grammar_concept(name) for name in names]
    openings = [" ".join(text.split()[:6]) for text in texts(20, seed=8)]
    traits = [
        Trait(
            name=concept.name,
            questions=[
                (_before(example.text, concept.name), f" {word}", f" {other}")
                for example, word, other in zip(concept.positive, _words(concept.name), _words(_sibling(concept.name)))
            ],
        )
        for concept in concepts[:2]
    ]
    return Material(
        name="bundled", mixture=Mixture([(texts(1_500 if small else 12_000, seed=0), 1.0)]), shares={"stories": 1.0},
        context_length=128,
        held_out=texts(60, seed=6), openings=openings, instructions=openings, concepts=concepts,
        goals=[
            Goal(name=c.name, positive=[e.text for e in c.positive[:10]], negative=[e.text for e in c.negative[:10]])
            for c in concepts[:2]
        ],
        traits=traits,
    )  # fmt: skip


def _grammar_concept(name: str, n: int = 24) -> Concept:
    """Stories with the concept, and with another of its group; hard negatives are the group's in the same place."""
    group = CONCEPTS[name].group
    with_it: list[Example] = []
    without: list[Example] = []
    for story in islice(stories(3), 4000):
        spans = [span for span in story.spans if CONCEPTS[span[2]].group == group]
        if not spans or spans[0][0] < 8:
            continue
        side = with_it if spans[0][2] == name else without
        if len(side) < 2 * n:
            start = story.text.rfind(" ", 0, spans[0][0])
            side.append(Example(prompt=story.text[:start], text=story.text[start:][:160]))
        if len(with_it) == len(without) == 2 * n:
            break
    if min(len(with_it), len(without)) < 8:
        raise SteersmanError(f"the grammar has too few stories with {name}")
    middle, other = len(with_it) // 2, len(without) // 2
    return Concept(
        name=name, group=group, positive=with_it[:middle], negative=without[:other], eval_positive=with_it[middle:],
        eval_negative=without[other:], eval_hard=without[other:][:5],
    )  # fmt: skip


def _sibling(name: str) -> str:
    group = CONCEPTS[name].group
    return next(other for other, concept in CONCEPTS.items() if concept.group == group and other != name)


def _words(name: str) -> list[str]:
    return list(CONCEPTS[name].words) * 12


def _before(text: str, name: str) -> str:
    """A story as far as its first word of the concept."""
    places = [text.find(word) for word in CONCEPTS[name].words if word in text]
    return (text[: min(places)].rstrip() if places else "") or "One day"
