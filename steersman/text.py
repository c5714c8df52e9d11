"""Documents from wherever they are, numbered, so that reading can start again at any of them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast, get_args, runtime_checkable

from steersman.errors import SteersmanError, near_names
from steersman.reading import check_regular

__all__ = ["TextSource", "open_text", "read_texts"]

log = logging.getLogger(__name__)

TxtDocuments = Literal["line", "paragraph", "file"]
OnBadText = Literal["error", "skip"]
SUFFIXES = (".txt", ".jsonl", ".parquet")
_LINE_BYTES = 256 << 20
"""Longest line of a file that is read."""
_SHOWN = 5
"""Documents that are passed over and named; further ones are counted."""


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
    if isinstance(source, str | os.PathLike):
        return _open_named(str(source), text_column, streaming, txt_documents, on_bad_text)
    if callable(source):
        return _MadeText(cast(Callable[[int], str], source), on_bad_text)
    if isinstance(source, Sequence) or (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        if not len(source):
            raise SteersmanError("the list of texts is empty; give at least one document")
        return _ListedText(source, on_bad_text)
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


def _open_named(
    source: str, text_column: str, streaming: bool, txt_documents: TxtDocuments, on_bad_text: OnBadText
) -> TextSource:
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
        return _FileText(path, tuple(files), text_column, txt_documents, on_bad_text)
    if path.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        near = near_names(path.name, [p.name for p in path.parent.glob("*")][:1000], 3) if path.parent.is_dir() else ""
        raise SteersmanError(f"{path}: no such file or folder{f'; near it: {near}' if near else ''}")
    if any(mark in source for mark in " \n\t"):
        raise SteersmanError(
            "the text is one string, which names a file or dataset; to use it as a document, pass [text]"
        )
    return _HubText(source, text_column, streaming, on_bad_text)


def _checked(text: Any, where: str) -> str:
    """`text`, if it is text that can be encoded; SteersmanError saying `where` it is otherwise."""
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
    return text


class _Guard:
    """What becomes of documents that are none."""

    def __init__(self, name: str, on_bad_text: OnBadText) -> None:
        self._name, self._skip, self._n = name, on_bad_text == "skip", 0

    def __call__(self, make: Callable[..., str], *args: Any) -> str:
        """`make(*args)`, or nothing where that is an error and such documents are passed over."""
        try:
            return make(*args)
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
class _ListedText:
    """Strings in memory, or any sequence of them."""

    texts: Sequence[str]
    on_bad_text: OnBadText = "error"

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
        guard = _Guard(self.name, self.on_bad_text)
        for number in range(start, len(self.texts)):
            yield guard(_checked, self.texts[number], f"{self.name}: document {number}")

    def n_characters(self) -> int | None:
        return sum(len(text) for text in self.texts if isinstance(text, str))


@dataclass(frozen=True)
class _MadeText:
    """A function of the document's number."""

    make: Callable[[int], str]
    on_bad_text: OnBadText = "error"
    endless: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"the text of {getattr(self.make, '__qualname__', type(self.make).__name__)}"

    def identity(self) -> str:
        sample = "\0".join(islice(self.documents(), 16))
        return f"function, first documents sha256 {hashlib.sha256(sample.encode()).hexdigest()[:16]}"

    def documents(self, start: int = 0) -> Iterator[str]:
        guard = _Guard(self.name, self.on_bad_text)
        for number in count(start):
            yield guard(_checked, self.make(number), f"{self.name}: document {number}")

    def n_characters(self) -> int | None:
        return None


@dataclass(frozen=True)
class _FileText:
    """One local file, or those of a folder one after another."""

    path: Path
    files: tuple[Path, ...]
    text_column: str
    txt_documents: TxtDocuments
    on_bad_text: OnBadText = "error"

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
        guard = _Guard(self.name, self.on_bad_text)
        for file, number, raw in islice(units, start, None):
            yield guard(self._document, file, number, raw)

    def _document(self, file: Path, number: int, raw: Any) -> str:
        if file.suffix == ".parquet":
            return _column_text({self.text_column: raw}, self.text_column, f"{file}: row {number}")
        if file.suffix == ".jsonl":
            return _json_text(file, number, raw, self.text_column)
        return _checked(raw, str(file) if self.txt_documents == "file" else f"{file}: {self.txt_documents} {number}")

    def _units(self, file: Path) -> Iterator[tuple[Path, int, Any]]:
        """(file, number of the line or row from 1, raw content): JSON is parsed only for documents that are read."""
        if file.suffix == ".parquet":
            values = _parquet_texts(file, self.text_column)
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


def _json_text(file: Path, number: int, line: str, column: str) -> str:
    where = f"{file}: line {number}"
    try:
        record = json.loads(line)
    except RecursionError:
        raise SteersmanError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise SteersmanError(f"{where} is not JSON ({error})") from error
    return _column_text(record, column, where)


def _column_text(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict) or column not in record:
        known = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise SteersmanError(f"{where} has no {column!r}; it has {known}: choose one with text_column")
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise SteersmanError(f"{where}: {column!r} is {type(text).__name__}, not text; choose another text_column")
    return _checked(text, f"{where}: {column!r}")


def _parquet_texts(file: Path, column: str) -> Iterator[Any]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise SteersmanError(
                f"{file}: has no column {column!r}; it has {table.schema_arrow.names}: choose one with text_column"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from batch.column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise SteersmanError(f"{file}: not a readable parquet file ({error})") from error


@dataclass(frozen=True)
class _HubText:
    """A dataset that the `datasets` library loads."""

    source: str
    text_column: str
    streaming: bool
    on_bad_text: OnBadText = "error"
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
            guard = _Guard(self.name, self.on_bad_text)
            for number, record in enumerate(chain([first], rows), start):
                if isinstance(record, dict) and self.text_column not in record:  # of no use in any row
                    _column_text(record, self.text_column, f"{self.name}: row {number}")
                yield guard(_column_text, record, self.text_column, f"{self.name}: row {number}")

    def n_characters(self) -> int | None:
        return None
