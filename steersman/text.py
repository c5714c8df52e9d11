"""Documents from wherever they are, numbered, so that reading can start again at any of them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast, get_args, runtime_checkable

from steersman.errors import SteersmanError, near_names

__all__ = ["TextSource", "open_text", "read_texts"]

log = logging.getLogger(__name__)

TxtDocuments = Literal["line", "paragraph", "file"]
SUFFIXES = (".txt", ".jsonl", ".parquet")


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
) -> TextSource:
    """Text from any of these, as a `TextSource`:

    - a sequence of strings (a list, a column of a dataset): one document each;
    - a .txt file: a document is a line, a paragraph (ended by a blank line) or the whole file, as `txt_documents` says;
    - a .jsonl or .parquet file: the string in `text_column` of each line or row;
    - a folder: all such files in it and below, in the order of their names;
    - a Hugging Face dataset, as "id", "id:config" or "id:config:split" (an empty config is the default one, the split
      is "train" unless named), streamed rather than downloaded if `streaming`;
    - a function of the document's number: endless text, made on demand;
    - a `TextSource`, returned as it is.

    Raises `SteersmanError` when there is no such file, a file is of another kind, or the source is empty.

    >>> text = open_text(["One fish.", "Two fish."])
    >>> list(text.documents(start=1))
    ['Two fish.']
    """
    if txt_documents not in get_args(TxtDocuments):
        raise SteersmanError(f"txt_documents {txt_documents!r} is none of {', '.join(get_args(TxtDocuments))}")
    if isinstance(source, TextSource):
        return source
    if isinstance(source, str | os.PathLike):
        return _open_named(str(source), text_column, streaming, txt_documents)
    if callable(source):
        return _MadeText(cast(Callable[[int], str], source))
    if isinstance(source, Sequence) or (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        if not len(source):
            raise SteersmanError("the list of texts is empty; give at least one document")
        return _ListedText(source)
    raise SteersmanError(
        f"text must be a list of strings, a path, a dataset id or a function of a number, not {type(source).__name__}"
    )


def read_texts(source: Any, limit: int | None = None, **options: Any) -> list[str]:
    """The documents that are not blank of whatever `open_text` takes, with its `options`; the first `limit` of them.

    Raises SteersmanError when there are none.

    >>> read_texts(["One fish.", " ", "Two fish."])
    ['One fish.', 'Two fish.']
    """
    text = open_text(source, **options)
    texts = list(islice((document for document in text.documents() if document.strip()), limit))
    if not texts:
        raise SteersmanError(f"{text.name} holds no text; give one with at least one document that is not blank")
    return texts


def _open_named(source: str, text_column: str, streaming: bool, txt_documents: TxtDocuments) -> TextSource:
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
        if not any(file.stat().st_size for file in files):
            raise SteersmanError(f"{path}: empty; give a file with text in it")
        return _FileText(path, tuple(files), text_column, txt_documents)
    if path.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        near = near_names(path.name, [p.name for p in path.parent.glob("*")][:1000], 3) if path.parent.is_dir() else ""
        raise SteersmanError(f"{path}: no such file or folder{f'; near it: {near}' if near else ''}")
    if any(mark in source for mark in " \n\t"):
        raise SteersmanError(
            "the text is one string, which names a file or dataset; to use it as a document, pass [text]"
        )
    return _HubText(source, text_column, streaming)


def _checked(text: Any, name: str, number: int) -> str:
    if not isinstance(text, str):
        raise SteersmanError(f"{name}: document {number} is {type(text).__name__}, not text")
    return text


@dataclass(frozen=True)
class _ListedText:
    """Strings in memory, or any sequence of them."""

    texts: Sequence[str]

    @property
    def name(self) -> str:
        return f"the list of {len(self.texts)} texts"

    def identity(self) -> str:
        digest = hashlib.sha256()
        for text in self.documents():
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return f"list of {len(self.texts)}, sha256 {digest.hexdigest()[:16]}"

    def documents(self, start: int = 0) -> Iterator[str]:
        for number in range(start, len(self.texts)):
            yield _checked(self.texts[number], self.name, number)

    def n_characters(self) -> int | None:
        return sum(map(len, self.documents()))


@dataclass(frozen=True)
class _MadeText:
    """A function of the document's number."""

    make: Callable[[int], str]

    @property
    def name(self) -> str:
        return f"the text of {getattr(self.make, '__qualname__', type(self.make).__name__)}"

    def identity(self) -> str:
        sample = "\0".join(islice(self.documents(), 16))
        return f"function, first documents sha256 {hashlib.sha256(sample.encode()).hexdigest()[:16]}"

    def documents(self, start: int = 0) -> Iterator[str]:
        number = start
        while True:
            yield _checked(self.make(number), self.name, number)
            number += 1

    def n_characters(self) -> int | None:
        return None


@dataclass(frozen=True)
class _FileText:
    """One local file, or those of a folder one after another."""

    path: Path
    files: tuple[Path, ...]
    text_column: str
    txt_documents: TxtDocuments

    @property
    def name(self) -> str:
        return str(self.path)

    def identity(self) -> str:
        sizes = [(str(file.relative_to(self.path)), file.stat().st_size) for file in self.files]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
        how = {self.txt_documents for file in self.files if file.suffix == ".txt"}
        how |= {self.text_column for file in self.files if file.suffix != ".txt"}
        return f"{self.path.name}, names and sizes sha256 {digest}, by {' and '.join(sorted(how))}"

    def documents(self, start: int = 0) -> Iterator[str]:
        units = chain.from_iterable(map(self._units, self.files))
        for file, number, raw in islice(units, start, None):
            yield _json_text(file, number, raw, self.text_column) if file.suffix == ".jsonl" else raw

    def _units(self, file: Path) -> Iterator[tuple[Path, int, Any]]:
        """(file, number of the line or row from 1, raw content): JSON is parsed only for documents that are read."""
        if file.suffix == ".parquet":
            values = _parquet_texts(file, self.text_column)
        elif file.suffix == ".txt" and self.txt_documents == "file":
            values = iter([_decoded(file, file.read_bytes())])
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


def _decoded(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SteersmanError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error


def _lines(file: Path) -> Iterator[str]:
    with open(file, "rb") as content:
        for line in content:
            yield _decoded(file, line).rstrip("\r\n")


def _paragraphs(file: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(file):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    yield "\n".join(lines)


def _json_text(file: Path, number: int, line: str, column: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SteersmanError(f"{file}: line {number} is not JSON ({error})") from error
    return _column_text(record, column, f"{file}: line {number}")


def _column_text(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict) or column not in record:
        known = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise SteersmanError(f"{where} has no {column!r}; it has {known}: choose one with text_column")
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise SteersmanError(f"{where}: {column!r} is {type(text).__name__}, not text; choose another text_column")
    return text


def _parquet_texts(file: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise SteersmanError(
                f"{file}: has no column {column!r}; it has {table.schema_arrow.names}: choose one with text_column"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _column_text({column: value}, column, str(file))
    except (ArrowException, OSError) as error:
        raise SteersmanError(f"{file}: not a readable parquet file ({error})") from error


@dataclass(frozen=True)
class _HubText:
    """A dataset that the `datasets` library loads."""

    source: str
    text_column: str
    streaming: bool
    remote: ClassVar[bool] = True
    """Whether reading the documents again costs more than working on them."""

    @property
    def name(self) -> str:
        return f"dataset {self.source}"

    def identity(self) -> str:
        return f"dataset {self.source}, by {self.text_column}"

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
            for number, record in enumerate(chain([first], rows), start):
                yield _column_text(record, self.text_column, f"{self.name}: row {number}")

    def n_characters(self) -> int | None:
        return None
