"""Where documents come from: sequences, functions, files, folders, datasets. Each is a `steersman.text.TextSource`."""

import hashlib
import json
import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from steersman.conversations import Conversation, Document, is_conversation
from steersman.errors import SteersmanError
from steersman.labels import Label, LabelledText, parse_label

log = logging.getLogger(__name__)

TxtDocuments = Literal["line", "paragraph", "file"]
OnBadText = Literal["error", "skip"]
SUFFIXES = (".txt", ".jsonl", ".parquet")
MESSAGES = "messages"
"""Field of records that holds a conversation, read where there is no text."""
Write = Callable[[Document, str], str]
"""(document, where it is) -> its text: what becomes of conversations."""
_LINE_BYTES = 256 << 20
"""Longest line of a file that is read."""
_SHOWN = 5
"""Documents that are passed over and named; further ones are counted."""


def only_text(document: Document, where: str) -> str:
    """The document, if it is a text. Raises SteersmanError for a conversation."""
    if isinstance(document, str):
        return document
    raise SteersmanError(f"{where} is a conversation, and only a model with a chat template can write one out")


class How(NamedTuple):
    """What becomes of documents that are none, and of all others, and where their labels are."""

    on_bad_text: OnBadText
    write: Write
    text_column: str = "text"
    """Of records in memory."""
    label_column: str | None = None


class _Found(NamedTuple):
    """A document, where it is, and its label where it has one."""

    document: Document
    where: str
    label: Label | None = None


def _checked(text: Any, where: str) -> _Found:
    """`text`, if it is a conversation or text that can be encoded; SteersmanError saying `where` it is otherwise."""
    if is_conversation(text):
        return _Found(_without_blanks(text), where)
    if not isinstance(text, str):
        raise SteersmanError(f"{where} is {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            if 0xDC80 <= code <= 0xDCFF:  # how a byte that could not be decoded is kept
                raise SteersmanError(
                    f"{where} is not UTF-8 text (character {error.start}); convert the file first"
                ) from None
            raise SteersmanError(
                f"{where} holds half of a surrogate pair (\\u{code:04x}, character {error.start}), which is no text"
            ) from None
    return _Found(text, where)


def _without_blanks(messages: Conversation) -> Conversation:
    """The messages without the fields of others: a table has all of them in each."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _length(document: Any) -> int:
    if is_conversation(document):
        return sum(len(str(message.get("content", ""))) for message in document)
    return len(document) if isinstance(document, str) else 0


def _column_of(names: Container[str], column: str) -> str:
    """The field that is read: that of conversations where there is no text and no other was chosen."""
    return MESSAGES if column == "text" and column not in names and MESSAGES in names else column


class _Guard:
    """What becomes of documents that are none."""

    def __init__(self, name: str, how: How) -> None:
        self._name, self._skip, self._n = name, how.on_bad_text == "skip", 0
        self._write = how.write

    def __call__(self, make: Callable[..., _Found], *args: Any) -> str:
        """What `make(*args)` found as text, or nothing where that is an error and such documents are passed over."""
        try:
            found = make(*args)
            text = self._write(found.document, found.where)
            return text if found.label is None else LabelledText(text, found.label)
        except SteersmanError as error:
            if not self._skip:
                raise SteersmanError(f"{error} (on_bad_text='skip' passes such documents over)") from error
            self._n += 1
            if self._n <= _SHOWN:
                log.warning("passed over: %s", error)
            elif self._n == _SHOWN + 1:
                log.warning("%s: further documents that are passed over are not named", self._name)
            return ""


@dataclass(frozen=True)
class ListedText:
    """Strings in memory, or any sequence of them; with labels, mappings of text and label may be among them."""

    texts: Sequence[Any]
    how: How

    @property
    def name(self) -> str:
        return f"the list of {len(self.texts)} texts"

    def identity(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            encoded = str(text).encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return f"list of {len(self.texts)}, sha256 {digest.hexdigest()[:16]}"

    def documents(self, start: int = 0) -> Iterator[str]:
        guard = _Guard(self.name, self.how)
        for number in range(start, len(self.texts)):
            yield guard(self._document, self.texts[number], f"{self.name}: document {number}")

    def _document(self, given: Any, where: str) -> _Found:
        if self.how.label_column is None or not isinstance(given, Mapping):
            return _checked(given, where)
        return _column_text(given, self.how.text_column, where, self.how.label_column)

    def n_characters(self) -> int | None:
        return sum(
            _length(text.get(self.how.text_column) if isinstance(text, Mapping) else text) for text in self.texts
        )


@dataclass(frozen=True)
class MadeText:
    """A function of the document's number."""

    make: Callable[[int], str]
    how: How
    endless: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"the text of {getattr(self.make, '__qualname__', type(self.make).__name__)}"

    def identity(self) -> str:
        sample = "\0".join(islice(self.documents(), 16))
        return f"function, first documents sha256 {hashlib.sha256(sample.encode()).hexdigest()[:16]}"

    def documents(self, start: int = 0) -> Iterator[str]:
        guard = _Guard(self.name, self.how)
        for number in count(start):
            yield guard(_checked, self.make(number), f"{self.name}: document {number}")

    def n_characters(self) -> int | None:
        return None


@dataclass(frozen=True)
class FileText:
    """One local file, or those of a folder one after another."""

    path: Path
    files: tuple[Path, ...]
    text_column: str
    txt_documents: TxtDocuments
    how: How

    @property
    def name(self) -> str:
        return str(self.path)

    def identity(self) -> str:
        sizes = [(str(file.relative_to(self.path)), file.stat().st_size) for file in self.files]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
        how = {self.txt_documents for file in self.files if file.suffix == ".txt"}
        how |= {self.text_column for file in self.files if file.suffix != ".txt"}
        labels = "" if self.how.label_column is None else f", labels {self.how.label_column}"
        return f"{self.path.name}, names and sizes sha256 {digest}, by {' and '.join(sorted(how))}{labels}"

    def documents(self, start: int = 0) -> Iterator[str]:
        units = chain.from_iterable(map(self._units, self.files))
        guard = _Guard(self.name, self.how)
        for file, number, raw in islice(units, start, None):
            yield guard(self._document, file, number, raw)

    def _document(self, file: Path, number: int, raw: Any) -> _Found:
        if file.suffix == ".parquet":
            return _column_text(raw, self.text_column, f"{file}: row {number}", self.how.label_column)
        if file.suffix == ".jsonl":
            return _json_text(file, number, raw, self.text_column, self.how.label_column)
        return _checked(raw, str(file) if self.txt_documents == "file" else f"{file}: {self.txt_documents} {number}")

    def _units(self, file: Path) -> Iterator[tuple[Path, int, Any]]:
        """(file, number of the line or row from 1, raw content): JSON is parsed only for documents that are read."""
        values: Iterator[Any]
        if file.suffix == ".parquet":
            values = _parquet_records(file, self.text_column, self.how.label_column)
        elif file.suffix == ".txt" and self.txt_documents == "file":
            values = iter([_decoded(file.read_bytes())])
        elif file.suffix == ".txt" and self.txt_documents == "paragraph":
            values = _paragraphs(file)
        else:
            values = _lines(file)
        for number, value in enumerate(values, 1):
            if file.suffix == ".parquet" or value.strip():
                yield file, number, value

    def n_characters(self) -> int | None:
        if any(file.suffix == ".parquet" for file in self.files):
            return None  # compressed
        return sum(file.stat().st_size for file in self.files)


def _decoded(content: bytes) -> str:
    """The text, with every byte that is not UTF-8 as a lone surrogate, which `_checked` finds."""
    return content.decode("utf-8-sig", "surrogateescape")


def _lines(file: Path) -> Iterator[str]:
    with open(file, "rb") as content:
        while line := content.readline(_LINE_BYTES + 1):
            if len(line) > _LINE_BYTES:
                raise SteersmanError(f"{file}: a line of more than {_LINE_BYTES:,} bytes; divide it into documents")
            yield _decoded(line).rstrip("\r\n")


def _paragraphs(file: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(file):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    yield "\n".join(lines)


def _json_text(file: Path, number: int, line: str, column: str, label_column: str | None) -> _Found:
    where = f"{file}: line {number}"
    try:
        record = json.loads(line)
    except RecursionError:
        raise SteersmanError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise SteersmanError(f"{where} is not JSON ({error})") from error
    return _column_text(record, column, where, label_column)


def _column_text(record: Any, column: str, where: str, label_column: str | None) -> _Found:
    column = _column_of(record, column) if isinstance(record, Mapping) else column
    if not isinstance(record, Mapping) or column not in record:
        known = sorted(record) if isinstance(record, Mapping) else type(record).__name__
        raise SteersmanError(f"{where} has no {column!r}; it has {known}: choose one with text_column")
    text = record[column]
    if text is None:
        return _Found("", where)
    if not isinstance(text, str) and not is_conversation(text):
        raise SteersmanError(f"{where}: {column!r} is {type(text).__name__}, not text; choose another text_column")
    label = parse_label(record[label_column], where) if label_column in record and label_column is not None else None
    return _checked(text, f"{where}: {column!r}")._replace(label=label)


def _parquet_records(file: Path, column: str, label_column: str | None) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
        column = _column_of(table.schema_arrow.names, column)
        if column not in table.schema_arrow.names:
            raise SteersmanError(
                f"{file}: has no column {column!r}; it has {table.schema_arrow.names}: choose one with text_column"
            )
        columns = [name for name in (column, label_column) if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise SteersmanError(f"{file}: not a readable parquet file ({error})") from error


@dataclass(frozen=True)
class HubText:
    """A dataset that the `datasets` library loads."""

    source: str
    text_column: str
    streaming: bool
    how: How
    remote: ClassVar[bool] = True
    """Whether reading the documents again costs more than working on them."""

    @property
    def name(self) -> str:
        return f"dataset {self.source}"

    def identity(self) -> str:
        labels = "" if self.how.label_column is None else f", labels {self.how.label_column}"
        return f"dataset {self.source}, by {self.text_column}{labels}"

    def documents(self, start: int = 0) -> Iterator[str]:
        import datasets

        path, config, split = [*self.source.split(":", 2), "", ""][:3]
        try:
            data = datasets.load_dataset(path, config or None, split=split or "train", streaming=self.streaming)
            rows = iter(data.skip(start) if start else data)  # pyright: ignore[reportAttributeAccessIssue]
            first = next(rows, None)
        except Exception as error:  # the library raises many types, from several libraries below it
            reason = str(error).strip().split("\n")[0]
            raise SteersmanError(
                f"{self.source!r} is neither a file or folder here nor a dataset that can be loaded: {reason}"
            ) from error
        if first is not None:
            guard = _Guard(self.name, self.how)
            for number, record in enumerate(chain([first], rows), start):
                if (
                    isinstance(record, dict) and _column_of(record, self.text_column) not in record
                ):  # of no use in any row
                    _column_text(record, self.text_column, f"{self.name}: row {number}", None)
                place = f"{self.name}: row {number}"
                yield guard(_column_text, record, self.text_column, place, self.how.label_column)

    def n_characters(self) -> int | None:
        return None
