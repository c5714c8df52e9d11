"""What a language model is asked about a feature: for a label, and whether a label fits texts that it has not seen."""

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

OPEN, CLOSE = "<<", ">>"
LONGEST = 200
"""Characters of a label, at most: Neuronpedia takes 512."""
_STRENGTHS = 8


class LabelExample(NamedTuple):
    """A stretch of text and the feature's activation on each of its tokens."""

    tokens: tuple[str, ...]
    """Its tokens as text; together they are the text."""
    activations: tuple[float, ...]
    """One for each token; 0 where the feature is not active."""

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self.tokens)


_LABEL = f"""You name what single units of a language model respond to. You are shown short texts. Tokens on which the \
unit is active stand between {OPEN} and {CLOSE}; behind each text its strongest tokens are listed with their strength \
from 1 to 10. Where it is known, the tokens that the unit makes likelier to come next are listed too.

Say in one short phrase what the unit responds to, as specific as the texts allow: the marked words, what they have in \
common, or what comes before them. If what it makes likelier is something else, name both. Do not mention the marks, \
the texts or the unit. Answer with one line: LABEL: the phrase"""

_DETECTION = """A unit of a language model responds to certain text. You are given a description of what it responds \
to, and numbered texts. Decide for each text whether it holds what the description says. Answer with a JSON list of \
one number for each text in order, 1 for yes and 0 for no, and nothing else."""

_FUZZING = f"""A unit of a language model responds to certain tokens. You are given a description of what it responds \
to, and numbered texts in which some tokens stand between {OPEN} and {CLOSE}. Some texts are marked in wrong places. \
Decide for each text whether the description fits all of the marked tokens. Answer with a JSON list of one number for \
each text in order, 1 for yes and 0 for no, and nothing else."""


def label_prompt(examples: Sequence[LabelExample], raised: Sequence[str], threshold: float) -> list[dict[str, str]]:
    """The question for a label: examples with their tokens of at least `threshold` times the strongest marked, and the
    tokens that the feature raises."""
    largest = max(max(one.activations) for one in examples)
    lines = []
    for number, one in enumerate(examples, 1):
        lines.append(f"{number}. {marked(one, lambda i, one=one: strong(one, i, threshold))}")
        shown = [i for i in range(len(one.tokens)) if strong(one, i, threshold)][:_STRENGTHS]
        strengths = ", ".join(f"{_quoted(one.tokens[i])} {_tenths(one.activations[i], largest)}" for i in shown)
        lines.append(f"   strengths: {strengths}")
    if raised:
        lines += ["", "likelier next: " + ", ".join(map(_quoted, raised))]
    return _conversation(_LABEL, "\n".join(lines))


def judging_prompt(kind: str, label: str, texts: Sequence[str]) -> list[dict[str, str]]:
    """The question whether a label fits each of some texts, for `kind` detection or fuzzing."""
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return _conversation(_DETECTION if kind == "detection" else _FUZZING, f"Description: {label}\n\n{numbered}")


def _conversation(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def strong(example: LabelExample, i: int, threshold: float) -> bool:
    """Whether token i of an example is active at `threshold` times its strongest or more."""
    return example.activations[i] > 0 and example.activations[i] >= threshold * max(example.activations)


def marked(example: LabelExample, chosen: Callable[[int], bool]) -> str:
    """The text with each stretch of chosen tokens between marks.

    >>> marked(LabelExample((" a", " b", " c", " d"), (0.0, 1.0, 1.0, 0.0)), lambda i: i in (1, 2))
    ' a<< b c>> d'
    """
    parts, inside = [], False
    for i, token in enumerate(example.tokens):
        if chosen(i) != inside:
            parts.append(CLOSE if inside else OPEN)
            inside = not inside
        parts.append(token)
    return "".join(parts) + CLOSE * inside


def _quoted(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


def _tenths(activation: float, largest: float) -> int:
    return max(1, min(10, -int(-10 * activation // largest)))


def read_label(answer: str) -> str | None:
    """The label in an answer: what follows the last `LABEL:`, or the answer itself where it is one short line. None for
    an answer that holds none.

    >>> read_label("Let me see.\\nLABEL: words for weather."), read_label("weather words"), read_label("a\\nb")
    ('words for weather', 'weather words', None)
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"\W*label\W*:", line, flags=re.IGNORECASE)]
    if named:
        lines = [re.sub(r"^\W*label\W*:", "", named[-1], flags=re.IGNORECASE)]
    if len(lines) != 1:
        return None
    label = " ".join(lines[0].split()).strip(" *\"'`").removesuffix(".")
    return label if any(character.isalnum() for character in label) and len(label) <= LONGEST else None


def read_verdicts(answer: str, n: int) -> list[bool] | None:
    """The verdicts in an answer, a list of `n` numbers 0 or 1; None for anything else.

    >>> read_verdicts("Sure: [1, 0, 1]", 3), read_verdicts("[1, 0]", 3), read_verdicts("[1, 2]", 2)
    ([True, False, True], None, None)
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL)
    for found in reversed(re.findall(r"\[[^\[\]]*\]", text)):
        try:
            values = json.loads(found.lower())
        except ValueError:
            continue
        if len(values) == n and all(value in (0, 1) for value in values):
            return [bool(value) for value in values]
    return None
