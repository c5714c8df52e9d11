"""Labels in a language model's words, with their scores: what is asked of it, how much that is, and what came back.

Every answer is in the journal before the next step is made of it, so that a run which ends early, for whatever reason,
asks nothing twice.
"""

import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from steersman.config import check_types, merged, setting
from steersman.errors import SteersmanError
from steersman.progress import progress
from steersman.sae.feature_labels import FeatureLabel, FeatureLabels
from steersman.steer.labels.endpoint import AnswerMissing, Ask, EndpointRefused
from steersman.steer.labels.journal import LabelJournal, digest
from steersman.steer.labels.prompts import (
    LabelExample,
    judging_prompt,
    label_prompt,
    read_label,
    read_verdicts,
)
from steersman.steer.labels.scoring import KINDS, Judged, balanced_accuracy, judged_texts

log = logging.getLogger(__name__)

__all__ = ["DescribeConfig", "Described", "Estimate", "FeatureExamples", "describe_features", "labelling_cost"]

T = TypeVar("T")
_LETTERS_A_TOKEN = 4
_ANSWER_TOKENS = 20
_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """What is asked about each feature."""

    shown_examples: int = 20
    """Texts in which it fires that the model is shown for a label, from all levels of activation."""
    test_examples: int = 20
    """Other texts in which it fires that a label is judged by, and as many in which it does not."""
    per_request: int = 5
    """Texts judged in one request."""
    threshold: float = 0.3
    """Fraction of a text's strongest activation from which on a token is marked."""
    scores: tuple[str, ...] = ()
    """Scores of each label, detection or fuzzing; both if none is named, and none without test examples."""
    seed: int = 0
    """Seed of the order of the texts judged, and of the tokens marked at random."""
    concurrency: int = setting(4, identity=False)
    """Requests at once, at most."""
    give_up_after: int = setting(8, identity=False)
    """Questions without an answer, one after another, at which no more are asked."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("shown_examples", "per_request", "concurrency", "give_up_after"):
            if getattr(self, name) < 1:
                raise SteersmanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.test_examples < 0 or not 0 <= self.threshold <= 1:
            raise SteersmanError("test_examples must be at least 0, and threshold a fraction")
        for name in self.scores:
            if name not in KINDS:
                raise SteersmanError(f"unknown score {name!r}: there are {' and '.join(KINDS)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The scores that are asked for."""
        return (self.scores or KINDS) if self.test_examples else ()


@dataclass(frozen=True, kw_only=True)
class FeatureExamples:
    """What is shown of one feature."""

    active: Sequence[LabelExample]
    """Texts in which it fires, from all levels, strongest first; none overlaps another."""
    inactive: Sequence[LabelExample]
    """Texts in which it does not fire."""
    raised: Sequence[str] = ()
    """Tokens that it makes likelier, strongest first."""

    def split(self, config: DescribeConfig) -> tuple[list[LabelExample], list[LabelExample]]:
        """The texts to make a label of and those to judge it by: each gets every other one, so that both have all
        levels."""
        shown = list(self.active[::2] if config.kinds else self.active)
        return _spread(shown, config.shown_examples), _spread(list(self.active[1::2]), config.test_examples)


def _spread(examples: list[LabelExample], n: int) -> list[LabelExample]:
    """n of the examples, at even distances; all where there are fewer."""
    if n >= len(examples):
        return examples
    return [examples[i * len(examples) // n] for i in range(n)]


class Estimate(NamedTuple):
    """What labelling is going to ask, roughly."""

    features: int
    """Features to label."""
    requests: int
    """Requests that are not answered in the journal yet."""
    known: int
    """Requests that are."""
    prompt_tokens: int
    """Tokens of the former's prompts, at four letters each."""
    answer_tokens: int
    """Tokens of their answers."""

    def to_text(self) -> str:
        """One line."""
        features = f"{self.features:,} feature{'s' * (self.features != 1)}"
        known = f", {self.known:,} answered before" if self.known else ""
        tokens = f"about {self.prompt_tokens:,} tokens of prompts and {self.answer_tokens:,} of answers"
        return f"{features}: {self.requests:,} requests{known}, {tokens}"


@dataclass(frozen=True, kw_only=True)
class Described:
    """The result of `describe_features`."""

    labels: FeatureLabels
    """The labels that came, with the scores that came."""
    missing: Mapping[int, str]
    """Features without a label or a score because a question got no answer, and why: the next run asks again."""
    refused: str
    """Why no more was asked, where the endpoint answers nobody as it is asked; empty otherwise."""
    skipped: Mapping[int, str]
    """Features of which nothing, or nothing more, can be asked, and why: they fire nowhere, or in too few texts."""

    def to_text(self) -> str:
        """How many there are, and what is missing."""
        lines = [f"{len(self.labels)} features labelled"]
        if self.missing:
            without = [feature for feature in self.missing if feature not in self.labels]
            unscored = [feature for feature in self.missing if feature in self.labels]
            lines += [f"no label: {_listed(without)}"] if without else []
            lines += [f"no or fewer scores: {_listed(unscored)}"] if unscored else []
            lines += [f"{n} because: {why}" for why, n in Counter(self.missing.values()).most_common(5)]
        lines += [f"{n} left out: {why}" for why, n in Counter(self.skipped.values()).items()]
        return "\n".join(lines)


def _listed(features: list[int]) -> str:
    shown = ", ".join(map(str, features[:_LISTED]))
    return f"{len(features)} ({shown}{', ...' if len(features) > _LISTED else ''})"


class _Question(NamedTuple):
    kind: str
    texts: list[Judged]
    messages: list[dict[str, str]]


class _Questions:
    """The questions about features, each answered once: by the journal, or by whom it is put to."""

    def __init__(self, name: str, config: DescribeConfig, journal: LabelJournal | None) -> None:
        self.name, self.config, self.journal = name, config, journal

    def key(self, messages: list[dict[str, str]]) -> str:
        return digest("answer", self.name, messages)

    def known(self, messages: list[dict[str, str]]) -> str | None:
        return None if self.journal is None else self.journal.get(self.key(messages))

    def put(self, ask: Ask, messages: list[dict[str, str]], read: Callable[[str], T | None], wanted: str) -> T:
        """What `read` makes of the answer; an answer that it makes nothing of is asked for once more."""
        answer = self.known(messages)
        if answer is not None and (found := read(answer)) is not None:
            return found
        again = list(messages)
        for _ in range(2):
            try:
                answer = ask(again)
            except (AnswerMissing, EndpointRefused):
                raise
            except Exception as error:  # of a function of the user's
                raise AnswerMissing(f"{type(error).__name__}: {error}") from error
            found = read(answer) if isinstance(answer, str) else None
            if found is not None:
                if self.journal is not None:
                    self.journal.put(self.key(messages), answer)
                return found
            again = [
                *messages,
                {"role": "assistant", "content": str(answer)[:500]},
                {"role": "user", "content": f"That is not {wanted}. Answer with {wanted} and nothing else."},
            ]
        raise AnswerMissing(f"the answer is not {wanted}")

    def for_label(self, examples: FeatureExamples) -> list[dict[str, str]]:
        return label_prompt(examples.split(self.config)[0], examples.raised, self.config.threshold)

    def for_scores(self, label: str, examples: FeatureExamples) -> list[_Question]:
        """The questions for the scores of a label."""
        test = examples.split(self.config)[1]
        inactive = list(examples.inactive)[: self.config.test_examples]
        found = []
        for kind in self.config.kinds if test and inactive else ():
            shown = judged_texts(kind, test, inactive, self.config.threshold, self.config.seed)
            for start in range(0, len(shown), self.config.per_request):
                part = shown[start : start + self.config.per_request]
                found.append(_Question(kind, part, judging_prompt(kind, label, [one.text for one in part])))
        return found


def labelling_cost(
    examples: Mapping[int, FeatureExamples],
    *,
    name: str,
    journal: LabelJournal | None = None,
    config: DescribeConfig | None = None,
    **overrides: Any,
) -> Estimate:
    """What `describe_features` with the same arguments would ask now."""
    questions = _Questions(name, merged(DescribeConfig, config, overrides), journal)
    asked: list[list[dict[str, str]]] = []
    known = features = 0
    for one in examples.values():
        if not one.active:
            continue
        features += 1
        first = questions.for_label(one)
        label = read_label(questions.known(first) or "")
        for messages in [first, *(prompt for _, _, prompt in questions.for_scores(label or "x" * 60, one))]:
            if questions.known(messages) is not None:
                known += 1
            else:
                asked.append(messages)
    letters = sum(len(message["content"]) for messages in asked for message in messages)
    return Estimate(features, len(asked), known, letters // _LETTERS_A_TOKEN, len(asked) * _ANSWER_TOKENS)


def describe_features(
    ask: Ask,
    examples: Mapping[int, FeatureExamples],
    *,
    name: str,
    journal: LabelJournal | None = None,
    config: DescribeConfig | None = None,
    **overrides: Any,
) -> Described:
    """Ask a language model for a label of each feature in `examples`, and how well the label fits unseen texts.

    Args:
        ask: answers a conversation, a list of messages with `role` and `content`, with a text: a `LabelEndpoint` or any
            function, called from `concurrency` threads. What it raises leaves one question without an answer, but for
            `EndpointRefused`, which ends the asking.
        examples: what each feature fires on.
        name: of the model that answers: the labels' source, and part of what answers are known by in the journal.
        journal: where answers are kept, and found again by a later run.
        config: a `DescribeConfig`.
        overrides: fields of it, over those of `config`.

    Returns:
        The labels, and what is missing.
    """
    config = merged(DescribeConfig, config, overrides)
    questions = _Questions(name, config, journal)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, FeatureLabel | None, str]] = queue.SimpleQueue()
    skipped = {feature: "no text to show" for feature, one in examples.items() if not one.active}
    missing: dict[int, str] = {}
    wanted = [feature for feature in examples if feature not in skipped]
    for feature in wanted:
        todo.put(feature)
    state = _State(config.give_up_after)

    def work() -> None:
        while True:
            try:
                feature = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((feature, *_describe(questions, ask, examples[feature], state)))
            except Exception as error:  # whatever it is, the others go on, and who waits for this one hears of it
                done.put((feature, None, f"{type(error).__name__}: {error}"))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(config.concurrency, len(wanted)))]
    labels: dict[int, FeatureLabel] = {}
    try:
        for thread in threads:
            thread.start()
        with progress(desc="asking for labels", total=len(wanted), unit="feature") as bar:
            for _ in wanted:
                feature, label, reason = _next(done)
                if label is not None:
                    labels[feature] = label
                if reason:
                    missing[feature] = reason
                elif label is not None and len(label.scores) < len(config.kinds):
                    skipped[feature] = "too few texts to judge a label by"
                bar.update()
    finally:
        state.stop("the run was stopped")
    missing, skipped = (dict(sorted(part.items())) for part in (missing, skipped))
    return Described(labels=FeatureLabels(labels), missing=missing, skipped=skipped, refused=state.refused)


def _next(done: "queue.SimpleQueue[tuple[int, FeatureLabel | None, str]]") -> tuple[int, FeatureLabel | None, str]:
    while True:
        try:
            return done.get(timeout=0.5)  # a wait without an end would not hear Ctrl-C
        except queue.Empty:
            continue


class _State:
    """When to ask no more: the endpoint refused, or no question got an answer for a while."""

    def __init__(self, give_up_after: int) -> None:
        self.give_up_after, self.failed, self.reason, self.refused = give_up_after, 0, "", ""
        self._guard = threading.Lock()

    def stop(self, reason: str) -> None:
        with self._guard:
            self.reason = self.reason or reason

    def answered(self, question: Callable[[], T]) -> T:
        """What `question` gives; raises AnswerMissing where it gives nothing, or nothing is asked any more."""
        if self.reason:
            raise AnswerMissing(f"not asked: {self.reason}")
        try:
            found = question()
        except EndpointRefused as error:
            self.refused = self.refused or str(error)
            self.stop(str(error))
            raise AnswerMissing(str(error)) from error
        except AnswerMissing as error:
            with self._guard:
                self.failed += 1
                given_up = self.failed >= self.give_up_after
            if given_up:
                self.stop(f"{self.failed} questions in a row had no answer, the last: {error}")
            raise
        with self._guard:
            self.failed = 0
        return found


def _describe(
    questions: _Questions, ask: Ask, examples: FeatureExamples, state: _State
) -> tuple[FeatureLabel | None, str]:
    """The label of one feature, and what is missing of it."""
    try:
        first, wanted = questions.for_label(examples), "one line: LABEL: a short phrase"
        text = state.answered(lambda: questions.put(ask, first, read_label, wanted))
    except SteersmanError as error:
        return None, str(error)
    verdicts: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind in questions.config.kinds}
    texts: Counter[str] = Counter()
    reason = ""
    for kind, part, messages in questions.for_scores(text, examples):
        texts[kind] += len(part)
        try:
            read = partial(read_verdicts, n=len(part))
            put = partial(questions.put, ask, messages, read, f"a list of {len(part)} numbers 0 or 1")
            said = state.answered(put)
        except SteersmanError as error:
            reason = str(error)
            continue
        verdicts[kind] += [(one.active, verdict) for one, verdict in zip(part, said)]
    scores = {}
    for kind, judged in verdicts.items():
        score = balanced_accuracy(judged) if 2 * len(judged) >= texts[kind] else None
        if score is not None and math.isfinite(score):
            scores[kind] = score
    return FeatureLabel(text=text, source=questions.name, scores=scores), reason
