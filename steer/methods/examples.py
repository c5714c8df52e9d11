"""What a vector is made from: positive and negative examples, from lists or JSONL, paired or not.

An example is a text, or a prompt and an answer, or a conversation whose last message, if it is the assistant's, is the
answer. In a JSONL file each line is one of

    {"positive": "I love it", "negative": "I hate it"}                     a pair of texts
    {"prompt": "Is it good?", "positive": " Yes", "negative": " No"}       a pair of answers to one prompt
    {"text": "I love it", "label": "positive"}                             a text by itself (or true / false)
    {"messages": [{"role": "user", ...}, ...], "label": "positive"}        a conversation by itself

a list of messages may stand in the place of each text and of each prompt. A line may say `weight`, a number that its
samples count with, and `group`, what it shares with other lines: the episode of an agent, the program or the paragraph
that it was made from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steersman.conversations import ChatOptions, Conversation, Document, answered, is_blank, is_conversation
from steersman.doors import number as as_number
from steersman.errors import SteersmanError
from steersman.reading import parse_json, read_bytes, shown

_LARGEST_FILE = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text to read the model on."""

    text: Document
    """The whole text or conversation, the answer included."""
    prompt: Document = ""
    """What comes before the answer; empty where there is none."""
    weight: float = 1.0
    """What its samples count with, for the methods that weigh: a number of either sign."""
    group: str = ""
    """What it shares with other examples, such as an episode or a program; empty when nothing is known."""

    @property
    def answer(self) -> str:
        """The answer; of a text without a prompt all of it."""
        if isinstance(self.text, str):
            return self.text[len(self.prompt) :]
        return str(self.text[-1]["content"])


ExampleLike = str | Example | Conversation | Sequence[Any] | Mapping[str, Any]
"""A text, a conversation, a (prompt, answer) pair, or a mapping with `text` or `messages`, or with `prompt` and
`answer`, and with `weight` and `group` where they matter."""
ExamplesLike = ExampleLike | Iterable[ExampleLike]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Both sides. Where a method compares pairs, entry i of one belongs to entry i of the other."""

    positive: list[Example]
    """What the vector points to."""
    negative: list[Example]
    """What it points away from; may be empty for the methods that need none."""

    @property
    def weighted(self) -> bool:
        """Whether any example counts with another weight than 1."""
        return any(example.weight != 1 for example in (*self.positive, *self.negative))

    def check_pairs(self, method: str) -> None:
        """Raise SteersmanError unless there is a negative for every positive."""
        if len(self.positive) != len(self.negative):
            raise SteersmanError(
                f"method {method!r} compares pairs: it needs as many negatives as positives, got "
                f"{len(self.positive)} positives and {len(self.negative)} negatives"
            )

    def check_answers(self, method: str) -> None:
        """Raise SteersmanError unless every example is a prompt and its answer."""
        for side, examples in (("positive", self.positive), ("negative", self.negative)):
            for number, example in enumerate(examples):
                if not example.prompt:
                    raise SteersmanError(
                        f"method {method!r} reads the answer to a prompt, and {side} example {number} is a text "
                        'without one: give (prompt, answer) examples, in JSONL {"prompt": ..., "positive": ..., '
                        "\"negative\": ...}, or choose positions 'last' or 'mean'"
                    )


def as_examples(given: ExamplesLike, side: str) -> list[Example]:
    """Examples from texts, (prompt, answer) pairs, mappings with `text` or `prompt` and `answer`, or `Example`s.

    Raises SteersmanError, naming the side and the number of the entry, for an empty text or one of another kind.

    >>> as_examples(["I love it", ("Is it good?", " Yes")], "positive")[1].text
    'Is it good? Yes'
    """
    if isinstance(given, str | Example | Mapping) or is_conversation(given):
        return [_example(given, f"{side} example 0")]
    if not isinstance(given, Iterable):
        raise SteersmanError(f"the {side} examples must be a list of texts, got {type(given).__name__}")
    return [_example(entry, f"{side} example {i}") for i, entry in enumerate(given)]


def _example(entry: Any, where: str) -> Example:
    if isinstance(entry, Mapping):
        example = _example_text({k: v for k, v in entry.items() if k not in ("weight", "group")}, where)
        return replace(example, **_marks(entry, where))
    return _example_text(entry, where)


def _marks(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Weight and group of an example, as far as a record has them."""
    marks: dict[str, Any] = {}
    if "weight" in record:
        marks["weight"] = as_number(record["weight"], f"the weight of {where.rstrip(':')}")
    if "group" in record:
        marks["group"] = str(record["group"])
    return marks


def _example_text(entry: Any, where: str) -> Example:
    if isinstance(entry, Mapping) and {"text", "messages"} & set(entry):
        entry = entry["text"] if "text" in entry else entry["messages"]
    elif isinstance(entry, Mapping) and {"prompt", "answer"} <= set(entry):
        entry = (entry["prompt"], entry["answer"])
    if isinstance(entry, str):
        entry = Example(text=entry)
    elif is_conversation(entry):
        entry = Example(text=entry, prompt=entry[:-1] if entry[-1]["role"] == "assistant" and len(entry) > 1 else "")
    elif isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[1], str) and _is_document(entry[0]):
        prompt, answer = entry
        if not answer.strip():
            raise SteersmanError(f"{where} has an empty answer")
        if is_conversation(prompt) and prompt[-1]["role"] == "assistant":
            raise SteersmanError(f"{where}: its prompt ends with the assistant's message: nothing to answer")
        entry = Example(text=answered(prompt, answer), prompt=prompt)
    if not isinstance(entry, Example):
        raise SteersmanError(
            f"{where} is neither a text nor a conversation nor a (prompt, answer) pair: {shown(entry)}"
        )
    if is_blank(entry.text):
        raise SteersmanError(f"{where} is empty")
    return entry


def _is_document(value: Any) -> bool:
    return isinstance(value, str) or is_conversation(value)


def as_chats(examples: Examples, chat: ChatOptions) -> Examples:
    """The examples with texts as user's messages and answers as the assistant's, as `chat` asks.

    >>> given = Examples(positive=as_examples([("Is it good?", "Yes")], "positive"), negative=[])
    >>> [message["role"] for message in as_chats(given, ChatOptions(chat=True)).positive[0].text]
    ['user', 'assistant']
    """

    def one(example: Example) -> Example:
        if not example.prompt:
            return replace(example, text=chat.apply_to(example.text))
        prompt = chat.apply_to(example.prompt)
        answer = example.answer if isinstance(prompt, str) else example.answer.strip()
        return replace(example, text=answered(prompt, answer), prompt=prompt)

    if not (chat.chat or chat.system is not None):
        return examples
    return Examples(positive=list(map(one, examples.positive)), negative=list(map(one, examples.negative)))


def read_examples(path: str | Path) -> Examples:
    """Examples from a JSONL file (see the module). Raises SteersmanError that names the file and the line."""
    sides: dict[str, list[Example]] = {"positive": [], "negative": []}
    for number, record in jsonl_records(Path(path)):
        where = f"{path}: line {number}"
        if {"positive", "negative"} <= set(record):
            prompt = record.get("prompt")
            for side, found in sides.items():
                value = record[side] if prompt is None else (prompt, record[side])
                found.append(replace(_example(value, f"{where}, {side}:"), **_marks(record, where)))
        elif {"text", "messages"} & set(record) and {"label", "weight"} & set(record):
            label = record.get("label", "positive")  # weights say it by their sign and size
            side = ("positive" if label else "negative") if isinstance(label, bool) else label
            if not isinstance(side, str) or side not in sides:
                raise SteersmanError(f"{where}: the label must be positive or negative, got {shown(label)}")
            sides[side].append(replace(_example(record, f"{where}:"), **_marks(record, where)))
        else:
            raise SteersmanError(
                f"{where} has {shown(sorted(record))}; it needs positive and negative (with or without prompt), or "
                "text (or messages) and label (or weight)"
            )
    return Examples(positive=sides["positive"], negative=sides["negative"])


def jsonl_records(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a JSONL file. Raises SteersmanError that names the file and the line."""
    content = read_bytes(path, limit=_LARGEST_FILE)
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SteersmanError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = parse_json(line, f"{path}: line {number}")
            if not isinstance(record, dict):
                raise SteersmanError(f"{path}: line {number} is {type(record).__name__}, not an object with fields")
            yield number, record
