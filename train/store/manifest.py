"""`manifest.json`: what a store holds, shard by shard. It is the only file that says a shard exists.

A store is a folder with

- `manifest.json`, replaced atomically after each finished shard;
- one folder per hook point with `00000.safetensors`, ...: the activations [n, D] of the shard's rows;
- `rows/00000.safetensors`, ...: `token_ids` [n] int32, `doc_ids` [n] int64 and `positions` [n] int32 of the same rows,
  and the sums for the statistics of each hook point over the shard;
- `statistics.safetensors`, written when the store is complete: those sums over all shards.

Nothing in the files depends on when or in how many attempts they were written.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.files import replace_whole
from steersman.train.store.shards import DTYPES, FileRecord

FORMAT, VERSION = "steersman-activations", 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
ROWS = "rows"


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
        text = json.dumps({"format": FORMAT, "version": VERSION, "n_rows": self.n_rows, **head}, indent=1)
        lines = ",\n".join("  " + json.dumps(asdict(shard)) for shard in self.shards)
        shards = f',\n "shards": [\n{lines}\n ]' if self.shards else ',\n "shards": []'
        return f"{text[:-2]}{shards}\n}}\n".encode()

    def save(self, folder: Path) -> None:
        """Replace the manifest in `folder`."""
        replace_whole(folder / MANIFEST, lambda temporary: temporary.write_bytes(self.to_json()))

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when anything in the store changes."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check `folder`'s manifest; `SteersmanError` if there is none or it is not one of ours."""
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise SteersmanError(
                f"{folder}: no activation store here (there is no {MANIFEST}); make one with cache_activations"
            ) from None
        try:
            data = json.loads(content)
            if data.pop("format") != FORMAT:
                raise KeyError("format")
            version, n_rows = data.pop("version"), data.pop("n_rows")
            if version != VERSION:
                raise SteersmanError(
                    f"{path}: written in version {version} of the format, this Steersman reads {VERSION}"
                )
            shards = tuple(
                ShardRecord(**{**shard, "files": {name: FileRecord(**file) for name, file in shard["files"].items()}})
                for shard in data.pop("shards")
            )
            manifest = cls(**data, shards=shards)
            folders = {*manifest.folders().values(), ROWS}
            if manifest.n_rows != n_rows or manifest.dtype not in DTYPES or not manifest.hooks:
                raise ValueError("its parts contradict each other")
            if any(set(shard.files) != folders or not shard.name.isdecimal() for shard in shards):
                raise ValueError("a shard lacks files")
        except SteersmanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SteersmanError(f"{path}: not a readable store manifest ({error}); write the store again") from error
        return manifest
