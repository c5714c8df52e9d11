"""Which text rows are of, told by its documents: a digest that runs along while they are read.

The digest after document n is the SHA-256 of the digest after document n - 1 and of document n. A store records it with
every shard, so whoever goes on there can say whether the documents up to that place are still the same: wherever the
file lies, whatever it is called, and whatever was appended to it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice

from steersman.errors import SteersmanError
from steersman.labels import LabelledText
from steersman.text import TextSource
from steersman.train.store.manifest import Manifest

_START = "0" * 16


def _after(digest: str, document: str) -> str:
    content = document.encode("utf-8", "surrogatepass")
    if isinstance(document, LabelledText):
        content += f"\0label {document.label}".encode()
    return hashlib.sha256(digest.encode() + content).hexdigest()[:16]


class DigestedText:
    """`text`, with the digest after each document that was read not long ago."""

    def __init__(self, text: TextSource) -> None:
        self.text = text
        self._digests: dict[int, str] = {-1: _START}
        """Document -> the digest after it: of places to start at, and of the latest documents."""
        self._places = {-1}

    @property
    def name(self) -> str:
        """See `TextSource`."""
        return self.text.name

    def identity(self) -> str:
        """See `TextSource`."""
        return self.text.identity()

    def n_characters(self) -> int | None:
        """See `TextSource`."""
        return self.text.n_characters()

    @property
    def has_end(self) -> bool:
        """Whether the documents are here, all of them."""
        return not getattr(self.text, "remote", False) and not getattr(self.text, "endless", False)

    def documents(self, start: int = 0) -> Iterator[str]:
        """See `TextSource`. From a place whose digest is not known no digests are known either."""
        digest = self._digests.get(start - 1)
        for number, document in enumerate(self.text.documents(start), start):
            if digest is not None:
                digest = self._digests[number] = _after(digest, document)
            yield document

    def marks(self, first: int, last: int) -> dict[int, str]:
        """The digests after documents first..last, of those known; what is known of earlier ones is let go."""
        for number in [n for n in self._digests if n < first - 1 and n not in self._places]:
            self._digests.pop(number, None)
        return {n: digest for n in range(first, last + 1) if (digest := self._digests.get(n)) is not None}

    def digest_after(self, document: int | None, characters: int | None = None) -> str:
        """The digest after this document (None: the last), for which all up to it are read; after an earlier one where
        the text ends before, or so many characters are read."""
        digest, n = _START, 0
        for text in islice(self.text.documents(), None if document is None else document + 1):
            digest, n = _after(digest, text), n + len(text)
            if characters is not None and n >= characters:
                break
        return digest

    def check(self, manifest: Manifest) -> str:
        """What is wrong with the text, given a store that should be of it; empty if nothing. From then on `documents`
        knows the digests from wherever one of the store's shards leaves off."""
        shards = [shard for shard in manifest.shards if shard.text is not None]
        if not shards:
            return self._begin_at(manifest)
        marks: Mapping[int, str] = {int(s.text["document"]): str(s.text["digest"]) for s in shards if s.text}
        last, places = max(marks), {s.cursor["document"] - 1 for s in manifest.shards if s.cursor}
        first = self._first_to_read(marks, max(places, default=-1))
        digest, number = marks.get(first, _START), first
        if first in places:
            self._know(first, digest)
        for number, document in enumerate(islice(self.text.documents(first + 1), last - first), first + 1):
            digest = _after(digest, document)
            if number in places:
                self._know(number, digest)
            if marks.get(number, digest) != digest:
                return (
                    f"the text changed: {self.name} has other documents up to number {number} than those that the rows "
                    "stored here are of"
                )
        if number < last:
            return (
                f"the text changed: {self.name} has {number + 1} documents, and rows of document {last} are stored here"
            )
        return ""

    def _first_to_read(self, marks: Mapping[int, str], place: int) -> int:
        """The document after which reading begins: the first of all; of a text that comes over the network one that
        leaves at least the last part to be compared."""
        if not getattr(self.text, "remote", False):
            return -1
        ordered = sorted(marks)[:-1]
        return max((n for n in ordered if n <= place), default=-1)

    def _begin_at(self, manifest: Manifest) -> str:
        """Know the digests where shards without digests leave off, unless the text comes over the network."""
        places = {s.cursor["document"] - 1 for s in manifest.shards if s.cursor} if not manifest.complete else set()
        if places and not getattr(self.text, "remote", False):
            digest = _START
            for number, document in enumerate(islice(self.text.documents(), max(places) + 1)):
                digest = _after(digest, document)
                if number in places:
                    self._know(number, digest)
        return ""

    def _know(self, document: int, digest: str) -> None:
        self._digests[document] = digest
        self._places.add(document)


def is_of_text(manifest: Manifest, text: TextSource) -> bool:
    """Whether a store is of this text, as far as its manifest tells."""
    if any(shard.text for shard in manifest.shards):
        try:
            return not DigestedText(text).check(manifest)
        except SteersmanError:
            return False
    return manifest.config.get("text") == text.identity()
