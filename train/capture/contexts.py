"""Documents to token contexts: the forward batches of caching and streaming, each with the place where it starts.

Packed, the tokens of all documents follow one another through contexts of one length: BOS at the start of every
document and of every context, nothing in between, no padding but in the last context. A token can therefore attend to
the end of the document before its own, as it does in most models' training. Unpacked, each document is one row, cut at
the context length and padded on the right to the longest row of its batch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from steersman.errors import SteersmanError
from steersman.labels import UNLABELLED, LabelledText, TextTokens, TokenizedText, tokens_of, with_tokens
from steersman.text import TextSource
from steersman.train.capture.text_digest import DigestedText

log = logging.getLogger(__name__)

Tokenize = Callable[[list[str]], Sequence[Sequence[int]]]

_DOCUMENTS_AT_ONCE, _CHARACTERS_AT_ONCE = 64, 262_144
"""Documents, and about how many characters of them, given to the tokenizer in one call, which it spreads over threads:
it takes some 200 bytes for a character. Does not change what comes out."""

PIECE_CHARACTERS = 131_072
"""A longer document is given to the tokenizer in pieces of at most so many characters, cut before white space where
there is any in a piece's second half. Part of what the tokens are."""


@dataclass(frozen=True, kw_only=True)
class ContextBatch:
    """Token contexts for one forward pass."""

    input_ids: np.ndarray
    """Token ids [B, S] int64, padded on the right."""
    lengths: np.ndarray
    """Number of tokens in each row [B], the rest is padding."""
    doc_ids: np.ndarray
    """Number of the document of each token [B, S] int64; -1 at padding."""
    cursor: Mapping[str, int]
    """Where in the text the batch starts: document number and token in it. `context_batches` can start there again."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """The text's digest after each document of the batch, where `DigestedText` knows it."""
    labels: np.ndarray | None = None
    """Label of each token [B, S] int8, -1 where there is none, as at BOS and padding; None unless labels are read."""
    chosen: np.ndarray | None = None
    """Which tokens may become rows [B, S] bool, where documents say it of theirs; BOS and padding do not."""

    @property
    def full(self) -> bool:
        """Whether there is no padding."""
        return bool((self.lengths == self.input_ids.shape[1]).all())

    def attention_mask(self) -> np.ndarray:
        """1 at tokens and 0 at padding, [B, S] int64."""
        return (np.arange(self.input_ids.shape[1]) < self.lengths[:, None]).astype(np.int64)


def context_batches(
    text: TextSource,
    tokenize: Tokenize,
    *,
    context_length: int,
    batch_size: int,
    packing: bool,
    bos_id: int | None,
    pad_id: int,
    cursor: Mapping[str, int] | None = None,
    labelled: bool = False,
    choosing: bool = False,
) -> Iterator[ContextBatch]:
    """The contexts of `text` in batches of `batch_size`, from `cursor` (a batch's own) or the first document on.

    `tokenize` gives the ids of texts without special tokens; documents that bring their tokens are not given to it.
    With `choosing`, they say which of them become rows. Batches are the same whatever cursor reading started from.
    Raises `SteersmanError` when a text read from its start has no tokens at all.
    """
    place = {"document": 0, "token": 0} if cursor is None else cursor
    needed = None if packing else context_length
    documents = _tokenized(text, tokenize, place["document"], bos_id, needed)
    builder = _Builder(context_length, batch_size, bos_id, pad_id, place, labelled=labelled, choosing=choosing)
    batches = builder.packed(documents) if packing else builder.one_a_row(documents)
    first = next(batches, None)
    if first is None:
        if cursor is None:
            raise SteersmanError(f"{text.name}: no document has any text in it")
        return
    for batch in chain([first], batches):
        yield _with_marks(batch, text) if isinstance(text, DigestedText) else batch


def _with_marks(batch: ContextBatch, text: DigestedText) -> ContextBatch:
    documents = batch.doc_ids[batch.doc_ids >= 0]
    return replace(batch, marks=text.marks(int(documents.min()), int(documents.max())))


def pieces(document: str) -> Iterator[str]:
    """A document in pieces that the tokenizer is given; a short one is one piece.

    >>> [len(piece) for piece in pieces("a" * 131_000 + " b" * 1000)]
    [131070, 1930]
    """
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        cut = max(document.rfind(space, start + PIECE_CHARACTERS // 2, end) for space in " \n\t")
        end = cut if cut > 0 else end
        yield document[start:end]
        start = end
    yield document[start:]


class Tokens(NamedTuple):
    """Tokens that follow one another in a document."""

    document: int
    """Number of the document."""
    first: int
    """Place in the document of the first token."""
    ids: np.ndarray
    """Token ids [n] int64."""
    last: bool
    """Whether the document ends with them."""
    labels: np.ndarray
    """Their labels [n] int8, -1 where there is none."""
    chosen: np.ndarray | None = None
    """Which of them may become rows [n] bool; None: all."""


def _tokenized(
    text: TextSource, tokenize: Tokenize, start: int, bos_id: int | None, needed: int | None
) -> Iterator[Tokens]:
    """The tokens of the documents that have any, piece by piece; of each document only pieces that hold its first
    `needed` tokens, if not None. A BOS written in the text itself is taken off."""
    empty = 0
    for group in _groups(text.documents(start), start):
        for tokens in _tokens_of_group(group, tokenize, bos_id, needed):
            if len(tokens.ids) or tokens.first:
                yield tokens
            else:
                empty += 1
    if empty:
        log.warning("%s: %d documents are empty and were passed over", text.name, empty)


def _tokens_of_group(
    group: list[tuple[int, str]], tokenize: Tokenize, bos_id: int | None, needed: int | None
) -> Iterator[Tokens]:
    if len(group) == 1 and len(group[0][1]) > PIECE_CHARACTERS and tokens_of(group[0][1]) is None:
        yield from _long_document(*group[0], tokenize, bos_id, needed)
        return
    unread = [str(document) for _, document in group if tokens_of(document) is None]
    read = iter(tokenize(unread) if unread else ())
    for number, document in group:
        known = tokens_of(document)
        known = TextTokens(np.asarray(next(read), dtype=np.int64)) if known is None else known
        yield _whole(number, document, known, bos_id)


def documents_with_tokens(
    documents: Iterator[str], tokenize: Tokenize, bos_id: int | None, limit: int | None
) -> Iterator[tuple[str, int]]:
    """Documents that bring the tokens of which contexts are made, each with how many of its first `limit` tokens (None:
    of all) may become rows."""
    for group in _groups(documents, 0):
        parts = _tokens_of_group([(number, _unlabelled(text)) for number, text in group], tokenize, bos_id, None)
        for _, document in group:
            found = [next(parts)]
            while not found[-1].last:
                found.append(next(parts))
            ids, chosen = np.concatenate([part.ids for part in found]), found[0].chosen
            n = len(ids[:limit]) if chosen is None else int(chosen[:limit].sum())
            yield with_tokens(document, TextTokens(ids, chosen)), n


def _unlabelled(document: str) -> str:
    tokens = tokens_of(document)
    return str(document) if tokens is None else TokenizedText(str(document), tokens)


def _groups(documents: Iterator[str], start: int) -> Iterator[list[tuple[int, str]]]:
    """Documents with their numbers, as many at a time as are tokenized in one call; one that is long comes alone."""
    group: list[tuple[int, str]] = []
    characters = 0
    for number, document in enumerate(documents, start):
        if group and (len(document) > PIECE_CHARACTERS or characters + len(document) > _CHARACTERS_AT_ONCE):
            yield group
            group, characters = [], 0
        group.append((number, document))
        characters += len(document)
        if len(group) == _DOCUMENTS_AT_ONCE or len(document) > PIECE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _long_document(
    number: int, document: str, tokenize: Tokenize, bos_id: int | None, needed: int | None
) -> Iterator[Tokens]:
    first, parts = 0, pieces(str(document))
    piece = next(parts)
    while True:
        following = next(parts, None)
        ids = _ids(tokenize([piece])[0], None if first else bos_id)
        last = following is None or (needed is not None and first + len(ids) >= needed)
        whole = last and following is None
        yield Tokens(number, first, ids, last, _labels(number, document, first, len(ids), ended=whole))
        if last or following is None:
            return
        first, piece = first + len(ids), following


def _whole(number: int, document: str, tokens: TextTokens, bos_id: int | None) -> Tokens:
    """A document that was tokenized in one piece."""
    found = _ids(tokens.ids, bos_id)
    chosen = None if tokens.kept is None else tokens.kept[len(tokens.ids) - len(found) :]
    return Tokens(number, 0, found, True, _labels(number, document, 0, len(found), ended=True), chosen)


def _labels(number: int, document: str, first: int, n: int, *, ended: bool) -> np.ndarray:
    """The labels of n tokens of a document from token `first` on. Raises SteersmanError where the document has labels
    for another number of tokens; `ended` says that these are its last ones."""
    label = document.label if isinstance(document, LabelledText) else UNLABELLED
    if isinstance(label, int):
        return np.full(n, label, dtype=np.int8)
    if len(label) < first + n or (ended and len(label) != first + n):
        raise SteersmanError(
            f"document {number} has {len(label)} labels and {first + n}{'' if ended else ' or more'} tokens (without "
            "BOS): give one label for each token of this model's tokenizer, or one for the document"
        )
    return np.asarray(label[first : first + n], dtype=np.int8)


def _ids(ids: Sequence[int] | np.ndarray, bos_id: int | None) -> np.ndarray:
    return np.asarray(ids[1:] if len(ids) and ids[0] == bos_id else ids, dtype=np.int64)


class _Builder:
    """Fills rows of token ids and hands out a batch when all of them are full."""

    def __init__(
        self,
        context_length: int,
        batch_size: int,
        bos_id: int | None,
        pad_id: int,
        cursor: Mapping[str, int],
        *,
        labelled: bool = False,
        choosing: bool = False,
    ) -> None:
        self._labelled, self._choosing = labelled, choosing
        self._shape = (batch_size, context_length)
        self._prefix = [] if bos_id is None else [bos_id]
        self._pad_id = pad_id
        self._clear(cursor)

    def _clear(self, cursor: Mapping[str, int]) -> None:
        self._ids = np.full(self._shape, self._pad_id, dtype=np.int64)
        self._docs = np.full(self._shape, -1, dtype=np.int64)
        self._labels = np.full(self._shape if self._labelled else (0, 0), UNLABELLED, dtype=np.int8)
        self._chosen = np.zeros(self._shape if self._choosing else (0, 0), dtype=bool)
        self._lengths = np.zeros(self._shape[0], dtype=np.int64)
        self._row = 0
        self._cursor = dict(cursor)

    def _put(
        self,
        document: int,
        ids: Sequence[int] | np.ndarray,
        labels: np.ndarray | None = None,
        chosen: np.ndarray | None = None,
    ) -> int:
        """Write as many of `ids` as fit in the present row, with what is known of them; returns how many."""
        column = int(self._lengths[self._row])
        n = min(len(ids), self._shape[1] - column)
        self._ids[self._row, column : column + n] = ids[:n]
        self._docs[self._row, column : column + n] = document
        if self._labelled and labels is not None:
            self._labels[self._row, column : column + n] = labels[:n]
        if self._choosing and chosen is not None:
            self._chosen[self._row, column : column + n] = chosen[:n]
        self._lengths[self._row] += n
        return n

    def _batch(self, n_rows: int, cursor: Mapping[str, int]) -> ContextBatch:
        lengths = self._lengths[:n_rows]
        longest = int(lengths.max())
        batch = ContextBatch(
            input_ids=self._ids[:n_rows, :longest],
            lengths=lengths,
            doc_ids=self._docs[:n_rows, :longest],
            cursor=self._cursor,
            labels=self._labels[:n_rows, :longest] if self._labelled else None,
            chosen=self._chosen[:n_rows, :longest] if self._choosing else None,
        )
        self._clear(cursor)
        return batch

    def packed(self, documents: Iterator[Tokens]) -> Iterator[ContextBatch]:
        at, at_start = self._cursor["token"], self._cursor["token"] == 0
        resumed = self._cursor["document"]
        for number, first, tokens, last, labels, chosen in documents:
            if not first:  # a document begins; the first one where the cursor says
                at = at if number == resumed else 0
                at_start, resumed = at == 0, -1
            while at < first + len(tokens):
                if at_start or not self._lengths[self._row]:
                    self._put(number, self._prefix)
                    at_start = False
                of_rows = None if chosen is None else chosen[at - first :]
                n = self._put(number, tokens[at - first :], labels[at - first :], of_rows)
                at_start = n == 0 and at == 0  # BOS took the row's last place: the document starts in the next row
                at += n
                if self._lengths[self._row] == self._shape[1]:
                    self._row += 1
                if self._row == self._shape[0]:
                    done = last and at >= first + len(tokens)
                    yield self._batch(self._row, {"document": number + done, "token": 0 if done else at})
        rows = int((self._lengths > 0).sum())
        if rows:
            yield self._batch(rows, self._cursor)

    def one_a_row(self, documents: Iterator[Tokens]) -> Iterator[ContextBatch]:
        for number, first, tokens, last, labels, chosen in documents:
            if not first:
                self._put(number, self._prefix)
            self._put(number, tokens, labels, chosen)
            self._row += last
            if self._row == self._shape[0]:
                yield self._batch(self._row, {"document": number + 1, "token": 0})
        if self._row:
            yield self._batch(self._row, self._cursor)
