"""Documents from wherever they are, numbered, so that reading can start again at any of them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import filterfalse, islice
from pathlib import Path
from typing import Any, Protocol, cast, get_args, runtime_checkable

from steersman.conversations import ChatOptions, Document, is_blank, is_conversation
from steersman.errors import SteersmanError, near_names
from steersman.reading import check_regular
from steersman.text_mixture import Measure, MixedText, Mixture
from steersman.text_sources import (
    SUFFIXES,
    FileText,
    How,
    HubText,
    ListedText,
    MadeText,
    OnBadText,
    TxtDocuments,
    Write,
    only_text,
)

__all__ = ["Mixture", "TextSource", "open_text", "read_documents", "read_texts"]


@runtime_checkable
class TextSource(Protocol):
    """Numbered documents. The same source gives the same documents every time."""

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        ...

    def identity(self) -> str:
        """A line that changes when the documents do, as far as can be known without reading all of them."""
        ...

    def documents(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on. An empty one is an empty string, so that numbers stay."""
        ...

    def n_characters(self) -> int | None:
        """About how long all documents are together, or None when unknown or endless."""
        ...


def open_text(
    source: Any,
    *,
    text_column: str = "text",
    streaming: bool = True,
    txt_documents: TxtDocuments = "line",
    on_bad_text: OnBadText = "error",
    write: Write | None = None,
    label_column: str | None = None,
    measure: Measure | None = None,
) -> TextSource:
    """Text from any of these, as a `TextSource`:

    - a sequence of strings or conversations (a list, a column of a dataset): one document each;
    - a .txt file: a document is a line, a paragraph (ended by a blank line) or the whole file, as `txt_documents` says;
    - a .jsonl or .parquet file: the string in `text_column` of each line or row, or the conversation (a list of
      messages) there or in `messages`;
    - a folder: all such files in it and below, in the order of their names;
    - a Hugging Face dataset, as "id", "id:config" or "id:config:split" (an empty config is the default one, the split
      is "train" unless named), streamed rather than downloaded if `streaming`;
    - a function of the document's number: endless text, made on demand;
    - a `Mixture` of any of these by weight, or a mapping of their names to weights;
    - a `TextSource`, returned as it is.

    A conversation is what `write` makes of it, which is given all documents; without it one is no document.

    Weights are shares of what `measure` says that documents are long; without it, of characters.

    With a `label_column`, documents are `LabelledText`s where their record has that column: lines of .jsonl, rows of
    .parquet and of datasets, and in a list mappings with the text and the label.

    A document that is none (a line that is not JSON or not UTF-8, a number in place of text, half of a surrogate pair)
    is an error that names its place, or with `on_bad_text` "skip" an empty document.

    Raises `SteersmanError` when there is no such file, a file is of another kind, or the source is empty.

    >>> text = open_text(["One fish.", "Two fish."])
    >>> list(text.documents(start=1))
    ['Two fish.']
    """
    if txt_documents not in get_args(TxtDocuments):
        raise SteersmanError(f"txt_documents {txt_documents!r} is none of {', '.join(get_args(TxtDocuments))}")
    if on_bad_text not in get_args(OnBadText):
        raise SteersmanError(f"on_bad_text {on_bad_text!r} is none of {', '.join(get_args(OnBadText))}")
    if isinstance(source, TextSource):
        return source
    if isinstance(source, Mixture | Mapping):
        open_one = partial(
            open_text, text_column=text_column, streaming=streaming, txt_documents=txt_documents,
            on_bad_text=on_bad_text, write=write, label_column=label_column, measure=measure,
        )  # fmt: skip
        mixture = source if isinstance(source, Mixture) else Mixture.of_weights(source)
        return MixedText.open(mixture, open_one, measure)
    how = How(on_bad_text, write or only_text, text_column, label_column)
    if isinstance(source, str | os.PathLike):
        return _open_named(str(source), text_column, streaming, txt_documents, how)
    if callable(source):
        return MadeText(cast(Callable[[int], str], source), how)
    if isinstance(source, Sequence) or (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        if not len(source):
            raise SteersmanError("the list of texts is empty; give at least one document")
        return ListedText([source] if is_conversation(source) else source, how)
    raise SteersmanError(
        "text must be a list of strings, a path, a dataset id, a mixture of those or a function of a number, not "
        f"{type(source).__name__}"
    )


def read_texts(source: Any, limit: int | None = None, **options: Any) -> list[str]:
    """The documents that are not blank of whatever `open_text` takes, with its `options`; the first `limit` of them.

    Raises SteersmanError when there are none.

    >>> read_texts(["One fish.", " ", "Two fish."])
    ['One fish.', 'Two fish.']
    """
    return cast(list[str], _read(open_text(source, **options), limit))


def read_documents(
    source: Any, limit: int | None = None, chat: ChatOptions | None = None, **options: Any
) -> list[Document]:
    """`read_texts`, with conversations as they are and texts as `chat` makes them.

    >>> read_documents(["Hello"], chat=ChatOptions(chat=True))
    [[{'role': 'user', 'content': 'Hello'}]]
    """

    return _read(open_text(source, write=_keeping(chat), **options), limit)


def iter_documents(source: Any, chat: ChatOptions | None = None, **options: Any) -> Iterator[Document]:
    """`read_documents` one by one, from a source of any length."""
    return filterfalse(is_blank, open_text(source, write=_keeping(chat), **options).documents())


def _keeping(chat: ChatOptions | None) -> Write:
    def keep(document: Document, where: str) -> Any:
        if is_blank(document) or chat is None:
            return document
        try:
            return chat.apply_to(document)
        except SteersmanError as error:
            raise SteersmanError(f"{where}: {error}") from error

    return keep


def _read(text: TextSource, limit: int | None) -> list[Document]:
    found: list[Document] = list(islice(filterfalse(is_blank, text.documents()), limit))
    if not found:
        raise SteersmanError(f"{text.name} holds no text; give one with at least one document that is not blank")
    return found


def _open_named(source: str, text_column: str, streaming: bool, txt_documents: TxtDocuments, how: How) -> TextSource:
    if not source.strip():
        raise SteersmanError("no text given: name a file, a folder or a dataset, or pass a list of strings")
    path = Path(source).expanduser()
    try:
        found = path.exists()
    except OSError:  # a whole text is too long for a file name
        found = False
    if found:
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
        if not files:
            raise SteersmanError(f"{path}: this folder holds no {', '.join(SUFFIXES)} file")
        if path.suffix not in SUFFIXES and not path.is_dir():
            raise SteersmanError(f"{path}: text is read from {', '.join(SUFFIXES)} files, not {path.suffix or 'this'}")
        if not sum(map(check_regular, files)):
            raise SteersmanError(f"{path}: empty; give a file with text in it")
        if how.label_column is not None and (plain := [file for file in files if file.suffix == ".txt"]):
            raise SteersmanError(
                f"{plain[0]}: a .txt file has no labels; give .jsonl or .parquet with {how.label_column!r}"
            )
        return FileText(path, tuple(files), text_column, txt_documents, how)
    if path.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        near = near_names(path.name, [p.name for p in path.parent.glob("*")][:1000], 3) if path.parent.is_dir() else ""
        raise SteersmanError(f"{path}: no such file or folder{f'; near it: {near}' if near else ''}")
    if any(mark in source for mark in " \n\t"):
        raise SteersmanError(
            "the text is one string, which names a file or dataset; to use it as a document, pass [text]"
        )
    return HubText(source, text_column, streaming, how)
