"""`manifest.json`: what a store holds, shard by shard. It is the only file that says a shard exists.

A store is a folder with

- `manifest.json`, replaced atomically after each finished shard; it carries a checksum of itself and of every file;
- one folder per hook point with `00000.safetensors`, ...: the activations [n, D] of the shard's rows;
- `rows/00000.safetensors`, ...: `token_ids` [n] int32, `doc_ids` [n] int64 and `positions` [n] int32 of the same rows,
  where the configuration says `labels` also `labels` [n] int8 (1, 0, or -1 where it is not known), and the sums for the
  statistics of each hook point over the shard;
- `statistics.safetensors`, written when the store is complete: those sums over all shards.

Nothing in the files depends on when or in how many attempts they were written.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.files import replace_whole
from steersman.reading import read_bytes
from steersman.train.store.shards import DTYPES, FileRecord

FORMAT, VERSION = "steersman-activations", 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
ROWS = "rows"
LABELS = "labels"
"""The entry of `config` by which a store has labels: the text's column of them, or true. Others have no such entry."""

_MANIFEST_BYTES = 1 << 30
"""Largest manifest that is read: of about three million shards."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard: the same rows in one file per hook point and one file of row data."""

    name: str
    """Name of its files, without their ending: a number of five or more digits."""
    rows: int
    """Number of rows."""
    files: Mapping[str, FileRecord]
    """Record of each file by its folder's name."""
    cursor: Mapping[str, int] | None = None
    """The forward batch in which the shard ends: where in the text the batch starts, and under "rows" how many rows of
    it are in this shard or earlier ones. None in a store that was not made from text."""
    skipped: int = 0
    """Rows left out because they were not finite."""
    text: Mapping[str, Any] | None = None
    """Of which text the rows are: under "document" the number of the last row's document, under "digest" what
    `DigestedText` says of all documents up to it. None where that is not known, as in stores of earlier versions."""

    def line(self) -> str:
        """The shard in the manifest, in one line of JSON; made once, as the manifest is written after every shard."""
        line = self.__dict__.get("_line")
        if line is None:
            record = asdict(self)
            if self.text is None:
                del record["text"]
            line = json.dumps(record)
            object.__setattr__(self, "_line", line)
        return line

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> "ShardRecord":
        """The record of a line; TypeError, ValueError or KeyError where it is none."""
        files = {name: FileRecord(**file) for name, file in data["files"].items()}
        record = cls(**{**data, "files": files})
        counts = (record.rows, record.skipped, *(n for file in files.values() for n in (file.bytes, file.crc32)))
        if not all(type(n) is int and n >= 0 for n in counts) or not str(record.name).isdecimal():
            raise ValueError("a shard's numbers are none")
        return record


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    model_name: str
    """The model that the activations are of; may be empty."""
    dtype: str
    """Type of the activations: bfloat16, float16 or float32."""
    hooks: Mapping[str, int]
    """Hook point -> width, in the order of the store."""
    config: Mapping[str, Any]
    """Everything that decides what the store's bytes are; a run resumes a store only if this is equal."""
    complete: bool = False
    """Whether all that was asked for is there."""
    shards: tuple[ShardRecord, ...] = field(default=())
    """The finished shards, in the order of their rows."""
    statistics: Mapping[str, Mapping[str, float]] | None = None
    """Hook point -> mean_norm, median_norm, mean_squared_norm, and where there are rows whose norm is above ten times
    the median, their number and share of the squared norm, n_large and large_share; once the store is complete."""
    statistics_file: FileRecord | None = None
    """Record of `statistics.safetensors`; None in stores of earlier versions."""

    @property
    def has_labels(self) -> bool:
        """Whether there is a label beside every row."""
        return bool(self.config.get(LABELS))

    @property
    def n_rows(self) -> int:
        """Rows in finished shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def n_skipped(self) -> int:
        """Rows left out because they were not finite."""
        return sum(shard.skipped for shard in self.shards)

    def folders(self) -> dict[str, str]:
        """Hook point -> name of its folder: the hook's name with everything but letters, digits, `.-_` replaced.

        >>> Manifest(model_name="", dtype="float32", hooks={"a/b": 2, "a:b": 2}, config={}).folders()
        {'a/b': 'a_b', 'a:b': 'a_b-1'}
        """
        folders: dict[str, str] = {}
        taken = {ROWS, MANIFEST, STATISTICS, "", ".", ".."}
        for number, hook in enumerate(self.hooks):
            folder = re.sub(r"[^A-Za-z0-9._-]", "_", hook)[:100]
            if folder in taken:
                folder = f"{folder}-{number}"
            taken.add(folder)
            folders[hook] = folder
        return folders

    def to_json(self) -> bytes:
        """The file's bytes: the same for equal manifests, with a line for each shard."""
        head = asdict(replace(self, shards=()))
        del head["shards"]
        if self.statistics_file is None:
            del head["statistics_file"]
        text = json.dumps({"format": FORMAT, "version": VERSION, "n_rows": self.n_rows, **head}, indent=1)
        lines = ",\n".join("  " + shard.line() for shard in self.shards)
        shards = f',\n "shards": [\n{lines}\n ]' if self.shards else ',\n "shards": []'
        return f"{text[:-2]}{shards}\n}}\n".encode()

    def save(self, folder: Path) -> None:
        """Replace the manifest in `folder`: its JSON and, as a last entry, the CRC-32 of it."""
        replace_whole(folder / MANIFEST, lambda temporary: temporary.write_bytes(self.sealed()))

    def sealed(self) -> bytes:
        """The file's bytes, checksum included."""
        content = self.to_json()
        return content[: -len(b"\n}\n")] + f',\n "crc32": "{zlib.crc32(content):08x}"\n}}\n'.encode()

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when anything in the store changes. (The statistics' file follows from
        the shards; without its record a store has the digits that version 0.1 gave it.)"""
        return hashlib.sha256(replace(self, statistics_file=None).to_json()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check `folder`'s manifest; `SteersmanError` if there is none or it is not one of ours."""
        path = folder / MANIFEST
        if not folder.is_dir() or not (path.exists() or path.is_symlink()):
            raise SteersmanError(
                f"{folder}: no activation store here (there is no {MANIFEST}); make one with cache_activations"
            )
        content = read_bytes(path, limit=_MANIFEST_BYTES)
        try:
            data = json.loads(content)
            if data.pop("format") != FORMAT:
                raise KeyError("format")
            version, n_rows, crc = data.pop("version"), data.pop("n_rows"), data.pop("crc32", None)
            if version != VERSION:
                raise SteersmanError(
                    f"{path}: written in version {version} of the format, this Steersman reads {VERSION}"
                )
            shards = tuple(map(ShardRecord.parse, data.pop("shards")))
            if (file := data.pop("statistics_file", None)) is not None:
                data["statistics_file"] = FileRecord(**file)
            manifest = cls(**data, shards=shards)
            folders = {*manifest.folders().values(), ROWS}
            if manifest.n_rows != n_rows or manifest.dtype not in DTYPES or not manifest.hooks:
                raise ValueError("its parts contradict each other")
            if any(type(width) is not int or width < 1 for width in manifest.hooks.values()):
                raise ValueError("a hook point has no width")
            if not isinstance(manifest.model_name, str) or not isinstance(manifest.config, dict):
                raise ValueError("its model or configuration is none")
            if any(set(shard.files) != folders for shard in shards):
                raise ValueError("a shard lacks files")
            if crc is not None and crc != f"{zlib.crc32(manifest.to_json()):08x}":
                raise ValueError("it was changed or is damaged: its content does not match its checksum")
        except SteersmanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise SteersmanError(f"{path}: not a readable store manifest ({error}); write the store again") from error
        return manifest
