"""A seeded probabilistic grammar of very short stories, with the concept of every word known.

A story is an opening, perhaps a sentence that dwells on it, three beats (a group brought in, then perhaps a sentence
that only its concept can bring), one or two sentences that come back to a beat, and an ending: 6 to 10 sentences. The
first mention of a group binds it to one concept for the rest of the story, so that early words decide later ones; which
word of the concept is said is mostly free, so that what carries over is the concept. Nothing is drawn that does not
show in the text, and no sentence can be read in two ways, so a text has one derivation: the probability of its choices
IS its probability, a recognizer can recompute it from the text alone (`parse`), and the mean of -log p per token is the
least loss a language model of these stories can reach on average.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count

import numpy as np

from steersman.demo.concepts import CONCEPT_OF_WORD, CONCEPTS, GROUPS, LIKELIER, Concept
from steersman.demo.frames import ASIDES, ENDINGS, INTRODUCTIONS, OPENINGS, PRONOUNS, RECALLS

BEATS = 3
"""Groups that a story brings in after its opening."""
FOLLOW_UP = 0.7
"""Probability that the opening, and each beat, is followed by a sentence that only its concept can bring."""
SECOND_RECALL = 0.5
"""Probability that a second sentence comes back to an earlier beat, in a story that did not dwell on its opening."""
AFFINITY = 0.5
"""Probability that a group takes the concept that `LIKELIER` names, rather than any concept of the group."""


@dataclass(frozen=True)
class Story:
    """One story and everything there is to know about it."""

    text: str
    """The sentences, joined by single spaces."""
    spans: tuple[tuple[int, int, str], ...]
    """(start, end, concept) for every concept word, in characters of `text`, in order."""
    log_probability: float
    """Natural log of the probability of this text under the grammar."""
    sentences: tuple[str, ...]
    """The sentences of `text`."""


@dataclass(frozen=True)
class _Plan:
    """Where in a story we are: which sentences can come next depends on this and on the bound concepts."""

    stage: str = "opening"  # opening | opened | introduced | beats | recalled | end
    asides: tuple[str, ...] = ()  # groups of the opening that the next sentence can dwell on
    dwelt: bool = False  # whether it did
    used: tuple[str, ...] = ()  # groups brought in so far
    recalled: tuple[str, ...] = ()  # groups come back to so far


@dataclass(frozen=True)
class _Option:
    """One sentence frame that can come next, its probability, and the plan after it."""

    probability: float
    frame: str
    plan: _Plan


@dataclass
class _State:
    """What the story has said so far."""

    plan: _Plan = field(default_factory=_Plan)
    bound: dict[str, Concept] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)

    def copy(self) -> "_State":
        return _State(self.plan, dict(self.bound), dict(self.last))

    def bind(self, concept: Concept) -> float:
        """Give a group its concept; the log-probability of that choice (0 when it was bound already)."""
        if concept.group in self.bound:
            return 0.0 if self.bound[concept.group] is concept else -math.inf
        probability = dict(self.choices(concept.group))[concept]
        self.bound[concept.group] = concept
        return math.log(probability)

    def choices(self, group: str) -> list[tuple[Concept, float]]:
        """The concepts that an unbound group can take, with their probabilities."""
        concepts = GROUPS[group]
        source, wanted = LIKELIER.get(group, ("", {}))
        likely = wanted.get(self.bound[source].name) if source in self.bound else None
        rest = (1.0 if likely is None else 1.0 - AFFINITY) / len(concepts)
        return [(concept, rest + (AFFINITY if concept.name == likely else 0.0)) for concept in concepts]

    def fixed(self, kind: str, value: str) -> str:
        """The text of a frame part that leaves no choice."""
        if kind == "pronoun":
            return PRONOUNS[value][0 if self.bound["name"].name == "girl_names" else 1]
        return value if kind == "text" else self.last.get(value, "")


@cache
def _parts(frame: str) -> tuple[tuple[str, str], ...]:
    """A frame as (kind, value) parts: `text`, `word` (fresh word of a group), `again` (repeated word), `pronoun`."""
    parts: list[tuple[str, str]] = []
    for text, slot, again in re.findall(r"([^{}]+)|\{(\w+)(!?)\}", frame):
        if text:
            parts.append(("text", text))
        else:
            parts.append(("pronoun" if slot in PRONOUNS else "again" if again else "word", slot))
    return tuple(parts)


def _options(state: _State) -> list[_Option]:
    """Every sentence frame that can come next; the probabilities sum to 1. Empty at the end of a story."""
    plan = state.plan
    if plan.stage == "opening":
        return [_Option(1 / len(OPENINGS), frame, _Plan("opened", _asides(frame))) for frame in OPENINGS]
    if plan.stage == "opened":
        dwelt = replace(plan, stage="beats", dwelt=True)
        share = FOLLOW_UP / len(plan.asides)
        stays = [option for group in plan.asides for option in _spread(share, state.bound[group].frames, dwelt)]
        return stays + _next_beat(plan, 1.0 - FOLLOW_UP)
    if plan.stage == "introduced":
        stays = _spread(FOLLOW_UP, state.bound[plan.used[-1]].frames, replace(plan, stage="beats"))
        return stays + _next_beat(plan, 1.0 - FOLLOW_UP)
    if plan.stage == "beats":
        return _next_beat(plan, 1.0)
    if plan.stage == "recalled":
        # A story that dwelt on its opening comes back to one beat only, which keeps it to ten sentences.
        second = SECOND_RECALL if len(plan.recalled) == 1 and not plan.dwelt else 0.0
        return (_recalls(plan, second) if second else []) + _spread(1.0 - second, ENDINGS, replace(plan, stage="end"))
    return []


@cache
def _asides(frame: str) -> tuple[str, ...]:
    return tuple(group for group in ASIDES if f"{{{group}}}" in frame)


def _next_beat(plan: _Plan, mass: float) -> list[_Option]:
    if len(plan.used) == BEATS:
        return _recalls(plan, mass)
    groups = [group for group in INTRODUCTIONS if group not in plan.used]
    return [
        option
        for group in groups
        for option in _spread(
            mass / len(groups), INTRODUCTIONS[group], replace(plan, stage="introduced", used=(*plan.used, group))
        )
    ]


def _recalls(plan: _Plan, mass: float) -> list[_Option]:
    groups = [group for group in plan.used if group not in plan.recalled]
    return [
        option
        for group in groups
        for option in _spread(
            mass / len(groups), RECALLS[group], replace(plan, stage="recalled", recalled=(*plan.recalled, group))
        )
    ]


def _spread(mass: float, frames: Sequence[str], plan: _Plan) -> list[_Option]:
    return [_Option(mass / len(frames), frame, plan) for frame in frames]


def _pick(rng: random.Random, weights: Sequence[float]) -> int:
    # random() is the one method whose stream Python promises to keep for a seed, so every choice is made with it.
    target = rng.random() * math.fsum(weights)
    for index, weight in enumerate(weights):
        target -= weight
        if target < 0:
            return index
    return len(weights) - 1


def story(seed: int, index: int = 0) -> Story:
    """Story number `index` of the endless sequence `seed`; the same on every machine.

    >>> story(0, 3) == story(0, 3), story(0, 3) == story(0, 4)
    (True, False)
    """
    rng = random.Random(f"{seed}:{index}")
    state, sentences, spans, log_p, at = _State(), [], [], 0.0, 0
    while options := _options(state):
        option = options[_pick(rng, [o.probability for o in options])]
        log_p += math.log(option.probability)
        pieces: list[str] = []
        length = 0
        said: set[str] = set()
        for kind, value in _parts(option.frame):
            if kind == "pronoun" or kind == "word":
                group = "name" if kind == "pronoun" else value
                if group not in state.bound:
                    concepts = state.choices(group)
                    log_p += state.bind(concepts[_pick(rng, [p for _, p in concepts])][0])
            if kind == "word":
                words = [word for word in state.bound[value].words if word not in said]
                piece = words[_pick(rng, [1.0] * len(words))]
                log_p -= math.log(len(words))
                state.last[value] = piece
            else:
                piece = state.fixed(kind, value)
            if kind in ("word", "again"):
                said.add(piece)
                start = at + length
                spans.append((start, start + len(piece), state.bound[value].name))
            pieces.append(piece)
            length += len(piece)
        sentences.append("".join(pieces))
        at += length + 1
        state.plan = option.plan
    return Story(" ".join(sentences), tuple(spans), log_p, tuple(sentences))


def stories(seed: int = 0, start: int = 0) -> Iterator[Story]:
    """The endless sequence of stories of a seed, from number `start` on.

    >>> from itertools import islice
    >>> [s.text for s in islice(stories(1, start=2), 2)] == [story(1, 2).text, story(1, 3).text]
    True
    """
    return (story(seed, index) for index in count(start))


def texts(n: int, seed: int = 0, start: int = 0) -> list[str]:
    """The texts of `n` stories.

    >>> len(texts(5))
    5
    """
    return [story(seed, index).text for index in range(start, start + n)]


def _match(
    frame: str, text: str, at: int, state: _State, spans: list[tuple[int, int, str]]
) -> tuple[int, float] | None:
    """Read one sentence of `frame` from `text[at:]`: its end and the log-probability of its words, or None."""
    log_p, said = 0.0, set[str]()
    for kind, value in _parts(frame):
        if kind == "pronoun" and "name" not in state.bound:
            girl, boy = PRONOUNS[value]
            names = GROUPS["name"]
            chosen = names[0] if text.startswith(girl, at) else names[1] if text.startswith(boy, at) else None
            if chosen is None:
                return None
            log_p += state.bind(chosen)
        if kind == "word":
            found = re.compile(r"[A-Za-z]+").match(text, at)
            concept = CONCEPT_OF_WORD.get(found.group()) if found else None
            if found is None or concept is None or concept.group != value or found.group() in said:
                return None
            bound = state.bind(concept)
            if bound == -math.inf:
                return None
            piece = found.group()
            log_p += bound - math.log(len(concept.words) - sum(word in said for word in concept.words))
            state.last[value] = piece
        else:
            piece = state.fixed(kind, value)
        if not piece or not text.startswith(piece, at):
            return None
        if kind in ("word", "again"):
            said.add(piece)
            spans.append((at, at + len(piece), state.bound[value].name))
        at += len(piece)
    return at, log_p


@dataclass(frozen=True)
class Reading:
    """What the recognizer made of a text."""

    log_probability: float
    """Natural log of the text's probability under the grammar; -inf when it is no story of the grammar."""
    sentences: int
    """Sentences read before the first that the grammar does not allow there."""
    rest: str
    """What is left of the text from the first such sentence on; empty for a story, and for a beginning of one."""
    complete: bool
    """Whether the text is a whole story, from opening to ending."""
    spans: tuple[tuple[int, int, str], ...]
    """The concept words read, as in `Story.spans`."""


def parse(text: str) -> Reading:
    """Read a text as a story of the grammar, from its opening on.

    >>> s = story(0)
    >>> parse(s.text).complete, abs(parse(s.text).log_probability - s.log_probability) < 1e-9
    (True, True)
    >>> parse("Once upon a time there was a model.").sentences
    0
    """
    state, at, read, log_p = _State(), 0, 0, 0.0
    spans: list[tuple[int, int, str]] = []
    while options := _options(state):
        for option in options:
            attempt, found = state.copy(), list[tuple[int, int, str]]()
            matched = _match(option.frame, text, at, attempt, found)
            if matched is not None and text[matched[0] : matched[0] + 1] in ("", " "):
                break
        else:
            return Reading(-math.inf, read, text[at:], False, tuple(spans))
        log_p += math.log(option.probability) + matched[1]
        state, read = attempt, read + 1
        state.plan = option.plan
        spans += found
        at = min(matched[0] + 1, len(text))
    if text[at:]:
        return Reading(-math.inf, read, text[at:], False, tuple(spans))
    return Reading(log_p, read, "", True, tuple(spans))


def concept_labels(spans: Sequence[tuple[int, int, str]], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which concepts' words each token belongs to: bool [tokens, concepts], columns in the order of `CONCEPTS`.

    Args:
        spans: `Story.spans` (or `Reading.spans`) of the text that was tokenized.
        offsets: (start, end) of each token in characters, as fast tokenizers return it; a token that shares a
            character with a word carries the word's concept, and an empty one (BOS, padding) carries none.

    >>> s = story(0)
    >>> start, end, concept = s.spans[0]
    >>> labels = concept_labels(s.spans, [(0, 0), (start, end)])
    >>> labels.shape == (2, len(CONCEPTS)), labels.sum(axis=1).tolist()
    (True, [0, 1])
    """
    columns = {name: column for column, name in enumerate(CONCEPTS)}
    labels = np.zeros((len(offsets), len(CONCEPTS)), dtype=bool)
    for start, end, concept in spans:
        for token, (left, right) in enumerate(offsets):
            if max(left, start) < min(right, end):
                labels[token, columns[concept]] = True
    return labels


def skeleton(sentence: str) -> str:
    """A sentence with every concept word replaced by its group: what the frame of a sentence looks like.

    >>> skeleton("Suddenly the snow began.")
    'Suddenly the <weather> began.'
    """
    return re.sub(
        r"[A-Za-z]+", lambda m: f"<{CONCEPT_OF_WORD[m[0]].group}>" if m[0] in CONCEPT_OF_WORD else m[0], sentence
    )


@cache
def skeletons() -> frozenset[str]:
    """The skeletons of all sentences that the grammar can say anywhere in a story."""
    frames = [*OPENINGS, *ENDINGS]
    for group in (*INTRODUCTIONS.values(), *RECALLS.values(), *(c.frames for c in CONCEPTS.values())):
        frames += group
    found = set()
    for frame in frames:
        for gender in (0, 1):
            said = (v if k == "text" else PRONOUNS[v][gender] if k == "pronoun" else f"<{v}>" for k, v in _parts(frame))
            found.add("".join(said))
    return frozenset(found)


def is_sentence(sentence: str) -> bool:
    """Whether the grammar can say this sentence somewhere, whatever the story around it.

    >>> is_sentence("Suddenly the snow began."), is_sentence("Suddenly the fox began.")
    (True, False)
    """
    return skeleton(sentence) in skeletons()
