"""Texts and what is said of them: one label for a text, one for each token, or labels of spans.

In a JSONL file each line is one of

    {"text": "The soup was cold.", "label": "negative"}         one: a word, a whole number, true or false
    {"text": "The soup was cold.", "label": [0, 1, 0, 0, null]}           each token's but the BOS's; null: not known
    {"text": "A kitten slept.", "label": [[2, 8, "pets"], [2, 8, "animal"]]}       spans of characters, half-open

Spans may overlap, so that a token can have a concept and one above it; tokens outside all spans have none. A
conversation may stand in the place of a text that has one label; its last answer is what counts then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.lm.offsets import text_offsets
from steersman.reading import shown
from steersman.steer.methods.examples import as_examples, jsonl_records
from steersman.steer.scores.reading import Counted, counted

Name = str | int | bool
"""A label."""
Span = tuple[int, int, str]
"""(start, end, label), in characters, half-open."""
Labelling = Name | Sequence[Name | None] | Sequence[Span]
"""What is said of one text."""
Kind = Literal["text", "tokens", "spans"]


class Said(NamedTuple):
    """What is said of one text, checked."""

    kind: Kind
    names: tuple[str | None, ...]
    """The labels: one, one for each token, or one for each span."""
    ranges: tuple[tuple[int, int], ...] = ()
    """The characters of each span."""


@dataclass(frozen=True, kw_only=True)
class LabelledTokens:
    """One text as tokens, and which labels its samples have. S tokens that count, C labels."""

    text: Counted
    """The tokens."""
    has: Tensor
    """[S, C] bool, or [1, C] where the text is one sample."""
    known: Tensor
    """[S] or [1] bool: samples of which anything is known."""


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts with labels, ready to be read."""

    texts: list[LabelledTokens]
    """The texts."""
    classes: list[str]
    """The labels that are probed for, each against the rest."""
    level: Literal["text", "token"]
    """What a sample is."""


def read_labelled(
    path: str | Path, *, label_column: str = "label", text_column: str = "text"
) -> tuple[list[Any], list[Any]]:
    """The texts of a JSONL file and what is said of them.

    Raises SteersmanError that names the file and the line.
    """
    texts, labels = [], []
    for line, record in jsonl_records(Path(path)):
        where = f"{path}: line {line}"
        column = "messages" if text_column == "text" and "text" not in record else text_column
        for name in (column, label_column):
            if name not in record:
                raise SteersmanError(
                    f"{where} has no {name!r}; it has {', '.join(sorted(record))}: choose one with "
                    f"{'label' if name == label_column else 'text'}_column"
                )
        said_of(record[label_column], where)
        texts.append(record[column])
        labels.append(record[label_column])
    if not texts:
        raise SteersmanError(f"{path} holds no records; give lines of text and {label_column}")
    return texts, labels


def said_of(value: Any, where: str) -> Said:
    """A label of any kind. Raises SteersmanError for what is none."""
    if not isinstance(value, list | tuple):
        return Said("text", (_name(value, where),))
    if value and all(isinstance(entry, list | tuple) for entry in value):
        ranges, names = [], []
        for entry in value:
            start, end, name = entry if len(entry) == 3 else (None, None, None)
            if not (type(start) is int and type(end) is int and 0 <= start < end):
                raise SteersmanError(f"{where}: {shown(entry)} is no span: give [start, end, label], in characters")
            ranges.append((start, end))
            names.append(_name(name, where))
        return Said("spans", tuple(names), tuple(ranges))
    if not value:
        return Said("spans", ())
    return Said("tokens", tuple(None if entry is None else _name(entry, where) for entry in value))


def _name(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value
    raise SteersmanError(f"{where}: the label is {shown(value)}; it must be a word, a whole number, or true or false")


def labelled_texts(
    lm: LanguageModel, texts: Sequence[Any], labels: Sequence[Any], level: Literal["auto", "text", "token"]
) -> LabelledTexts:
    """Texts and labels as samples; of two labels of texts or tokens, the one that sorts last is probed for.

    Raises SteersmanError for labels that do not fit the texts: another number of them, of tokens, spans outside the
    text, several kinds, fewer than two labels.
    """
    if len(texts) != len(labels):
        raise SteersmanError(f"there are {len(texts)} texts and {len(labels)} labels: give one for each")
    said = [said_of(label, f"text {i}") for i, label in enumerate(labels)]
    kinds = sorted({one.kind for one in said if one.names})
    if len(kinds) > 1:
        raise SteersmanError(f"labels are of several kinds ({' and '.join(kinds)}): give one kind for all texts")
    kind = kinds[0] if kinds else "spans"
    if kind != "spans" and level not in ("auto", "token" if kind == "tokens" else "text"):
        raise SteersmanError(f"level {level} needs labels of spans, and these are labels of {kind}")
    names = sorted({name for one in said for name in one.names if name is not None})
    if len(names) < (1 if kind == "spans" else 2):
        only = f"only the label {names[0]!r}" if names else "no label"
        raise SteersmanError(f"the texts have {only}: there is nothing to tell apart")
    classes = names[1:] if kind != "spans" and len(names) == 2 else names
    level = "text" if kind == "text" or level == "text" else "token"
    column = {name: at for at, name in enumerate(classes)}
    found = []
    for i, (given, one) in enumerate(zip(texts, said)):
        (example,) = as_examples([given], f"text {i},")
        text = counted(lm, example, f"text {i}")
        if one.kind == "spans":
            _check_spans(one, example.text, f"text {i}")
        if level == "token":
            has, known = _of_tokens(lm, example.text, one, text, column, f"text {i}")
        else:
            has, known = torch.zeros(1, len(classes), dtype=torch.bool), torch.ones(1, dtype=torch.bool)
            has[0, [column[name] for name in one.names if name is not None and name in column]] = True
        found.append(LabelledTokens(text=text, has=has, known=known))
    return LabelledTexts(texts=found, classes=classes, level=level)


def _check_spans(said: Said, document: Any, where: str) -> None:
    if not isinstance(document, str):
        raise SteersmanError(f"{where} is a conversation: spans are found in texts")
    for start, end in said.ranges:
        if end > len(document):
            raise SteersmanError(f"{where} has {len(document)} characters, and a span goes from {start} to {end}")


def _of_tokens(
    lm: LanguageModel, document: Any, said: Said, text: Counted, column: Mapping[str, int], where: str
) -> tuple[Tensor, Tensor]:
    n = len(text.tokens) - text.first
    has, known = torch.zeros(n, len(column), dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    if said.kind == "tokens":
        if len(said.names) != n:
            raise SteersmanError(f"{where} has {n} tokens (without the BOS) and {len(said.names)} labels of tokens")
        for at, name in enumerate(said.names):
            known[at] = name is not None
            if name is not None and name in column:
                has[at, column[name]] = True
        return has, known
    offsets = text_offsets(lm, document)
    for (start, end), name in zip(said.ranges, said.names):
        for at, (left, right) in enumerate(offsets.characters[text.first :]):
            if max(left, start) < min(right, end):
                has[at, column[str(name)]] = True
    return has, known
