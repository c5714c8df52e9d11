"""The store that several ranks write together: what each may touch of it, and how one that is lost is found out.

Beside the folders of a store there is `parts/` until it is complete: `parts/manifest.json` says of which store, every
finished shard has its record there, every shard that is being written a folder, and every rank a file that it holds the
lock of while it lives. A `parts` without such a manifest is not ours and is never touched.
"""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from steersman.errors import SteersmanError
from steersman.files import fsync_folder, replace_whole, temporary_path
from steersman.folders import FolderLock, remove_folder
from steersman.reading import parse_json
from steersman.train.store.folder import (
    CheckText,
    check_same,
    check_same_store,
    only_begun,
    remove_shards,
    remove_store,
)
from steersman.train.store.manifest import MANIFEST, ROWS, Manifest, ShardRecord
from steersman.train.store.shards import disk_errors
from steersman.train.store.writer import StoreWriter

PARTS = "parts"
_RECORD, _RANK, _BEGUN = re.compile(r"\d{5,}\.json"), re.compile(r"rank-\d{5,}"), re.compile(r"\.manifest-\d{5,}\.tmp")


def has_parts(folder: Path) -> bool:
    """Whether `folder` holds a store that several ranks have begun to write and not finished."""
    try:
        if (folder / MANIFEST).exists() and Manifest.load(folder).complete:
            return False
        return _is_ours(folder / PARTS)
    except OSError:
        return False


def _is_ours(parts: Path) -> bool:
    """Whether `parts` is the folder of such a store; version 0.1 left no manifest in it, but our names alone."""
    if not parts.is_dir() or parts.is_symlink():
        return False
    try:
        Manifest.load(parts)
    except SteersmanError:
        pass
    else:
        return True
    names = [child.name for child in parts.iterdir()]
    records = [name for name in names if _RECORD.fullmatch(name)]
    ours = all(_RECORD.fullmatch(n) or _RANK.fullmatch(n) or _BEGUN.fullmatch(n) or n.isdecimal() for n in names)
    return ours and bool(records) and all(_is_record(parts / name) for name in records)


def _is_record(file: Path) -> bool:
    with suppress(OSError, SteersmanError):
        data = parse_json(file.read_bytes(), file)
        return isinstance(data, dict) and {"store", "name", "rows", "files"} <= data.keys()
    return False


class SharedStore:
    """The store at `folder` that several ranks write; `manifest` describes it, without shards.

    Raises a SteersmanError when the folder holds something else, a store of another configuration, or one that another
    process is writing.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        shard_rows: int,
        max_rows: int | None,
        rank: int,
        check_text: CheckText | None = None,
    ) -> None:
        self.folder, self.manifest, self.rank = folder, manifest, rank
        self.shard_rows, self.max_rows = shard_rows, max_rows
        self.parts = folder / PARTS
        self._described, self._check_text = manifest, check_text
        self._locks: list[FolderLock] = []
        try:
            with disk_errors(folder, "choose another place for the store"):
                self._open()
        except BaseException:
            self.leave()
            if not self.finished():
                raise

    def _open(self) -> None:
        folder, parts, manifest = self.folder, self.parts, self._described
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            self.manifest = check_same_store(folder, manifest, self._check_text)
            if self.manifest.complete:
                return
        # Another rank may go on from the one to the other between the two questions, but not back.
        elif not only_begun(folder, manifest, [PARTS]) and not _is_ours(parts):
            raise SteersmanError(f"{folder}: exists and is not an activation store; choose an empty or new folder")
        if parts.exists() and not self._only_begun() and not _is_ours(parts):
            raise SteersmanError(
                f"{parts}: this folder is needed and holds files that Steersman did not write; choose another folder "
                "for the store"
            )
        if (parts / MANIFEST).exists():
            check_same(folder, Manifest.load(parts), replace(manifest, shards=()))
        for name in (PARTS, *manifest.folders().values(), ROWS):
            (folder / name).mkdir(exist_ok=True)
        self._locks.append(FolderLock(folder, "this store", shared=True))
        own = parts / f"rank-{self.rank:05d}"
        own.touch()
        self._locks.append(FolderLock(own, f"the part of rank {self.rank} of this store"))
        if not (parts / MANIFEST).exists():
            begun = parts / f".manifest-{self.rank:05d}.tmp"  # other ranks write the same
            begun.write_bytes(replace(manifest, shards=()).sealed())
            os.replace(begun, parts / MANIFEST)
            fsync_folder(parts)
        if self._check_text is not None and (records := self.records()):
            shards = tuple(records[number] for number in sorted(records))
            if problem := self._check_text(replace(self.manifest, shards=shards)):
                raise SteersmanError(f"{folder}: {problem}; choose another folder, or delete this one")

    def _only_begun(self) -> bool:
        names = [child.name for child in self.parts.iterdir()]
        return all(_RANK.fullmatch(name) or _BEGUN.fullmatch(name) for name in names)

    def finished(self) -> bool:
        """Whether the store is complete by now, whoever ended it."""
        with suppress(OSError, SteersmanError):
            there = Manifest.load(self.folder)
            if there.complete:
                check_same(self.folder, there, self._described)
                self.manifest = there
                return True
        return False

    def records(self) -> dict[int, ShardRecord]:
        """The finished shards by number."""
        found = {number: shard for number, shard in enumerate(self.manifest.shards) if self._whole(number, shard)}
        for file in sorted(self.parts.glob("*.json")):
            if not _RECORD.fullmatch(file.name):
                continue
            try:
                content = file.read_bytes()
            except FileNotFoundError:  # the store was completed meanwhile
                continue
            data = parse_json(content, file)
            try:
                store, record = data.pop("store"), ShardRecord.parse(data)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise SteersmanError(
                    f"{file}: damaged ({error}); delete this file, and the shard is written again"
                ) from error
            if store not in self._identities():
                raise SteersmanError(f"{file}: a shard of a store of another configuration; delete {self.folder}")
            found[int(file.stem)] = record
        return found

    def _whole(self, number: int, shard: ShardRecord) -> bool:
        """Whether a shard that one process left has its own name, and so all of its rows."""
        return int(shard.name) == number and len(shard.name) <= max(5, len(str(number)))

    @property
    def n_shards(self) -> int | None:
        """How many shards there will be unless the text ends before; None when that is not known."""
        return None if self.max_rows is None else -(-self.max_rows // self.shard_rows)

    def room(self, number: int) -> int:
        """Rows of shard `number`, unless the text ends before."""
        left = self.shard_rows if self.max_rows is None else self.max_rows - number * self.shard_rows
        return min(self.shard_rows, left)

    def _identities(self) -> tuple[str, ...]:
        """What records are marked with: ours, and that of version 0.1, which knew neither model nor text."""
        known = {k: v for k, v in self._described.config.items() if k not in ("model_digest", "text")}
        mine = replace(self._described, shards=(), config=known, model_name="")
        early = {k: v for k, v in self._described.config.items() if k not in ("model_digest", "bos_token")}
        return mine.fingerprint, replace(self._described, shards=(), config=early).fingerprint

    @property
    def n_rows(self) -> int:
        """Rows in finished shards."""
        return sum(record.rows for record in self.records().values())

    def disk_advice(self) -> str:
        """What to do when the disk is full."""
        return f"{len(self.records())} finished shards are intact: free space and run the same command again to resume"

    def begin_shard(self, number: int, rows_before: int) -> StoreWriter:
        """A writer of shard `number` alone; its first batch has `rows_before` rows that belong to earlier shards."""
        with disk_errors(self.folder, self.disk_advice()):
            writer = StoreWriter.begin(
                self.parts / f"{number:05d}",
                replace(self._described, shards=()),
                shard_rows=self.shard_rows,
                max_rows=self.room(number),
                rows_before=rows_before,
                check_files=False,
            )
        return writer

    def end_shard(self, number: int, writer: StoreWriter) -> None:
        """Move a finished shard to its place and record it. Done again after a kill, it resumes where it stopped."""
        with disk_errors(self.folder, self.disk_advice()):
            writer.end_shard()
            record = writer.manifest.shards[0]
            for name in record.files:
                here = writer.folder / name / f"{record.name}.safetensors"
                if here.exists():
                    os.replace(here, self.folder / name / f"{number:05d}.safetensors")
                fsync_folder(self.folder / name)
            content = asdict(replace(record, name=f"{number:05d}")) | {"store": self._identities()[0]}
            replace_whole(
                self.parts / f"{number:05d}.json", lambda temporary: temporary.write_bytes(json.dumps(content).encode())
            )
            writer.abandon()
            remove_store(writer.folder, self._described, [0])

    def alive(self) -> None:
        """Leave a sign that this rank is at work."""
        sign = self.parts / f"rank-{self.rank:05d}"
        with suppress(FileNotFoundError), open(sign, "r+") as file:  # else the store was completed meanwhile
            file.write(str(time.time_ns()))

    def pulse(self) -> str:
        """Changes when some rank has been at work."""
        signs = []
        for file in sorted(self.parts.glob("rank-*")):
            with suppress(FileNotFoundError):
                signs.append(file.read_text())
        return "".join(signs)

    def complete(self, n_rows: int) -> None:
        """Write the manifest of all shards of a store of `n_rows` rows, with their statistics."""
        records, n_shards = self.records(), -(-n_rows // self.shard_rows)
        shards = tuple(records[number] for number in range(n_shards))
        for number, shard in enumerate(shards):
            if shard.rows != (rows := min(self.shard_rows, n_rows - number * self.shard_rows)):
                raise SteersmanError(
                    f"{self.folder}: shard {number} has {shard.rows} rows where {rows} belong; "
                    f"delete {self.parts / f'{number:05d}.json'}, and it is written again"
                )
        with disk_errors(self.folder, self.disk_advice()):
            first, manifest = max(len(self.manifest.shards) - 1, 0), replace(self.manifest, shards=shards)
            manifest.save(self.folder)
            # Left by an interrupted run of one process: the shard that it was writing, and any it left short.
            known = [f"{shard.name}.safetensors" for shard in shards]
            remove_shards(self.folder, self._described, range(first, first + 2), known)
            writer = StoreWriter(
                self.folder,
                manifest,
                shard_rows=self.shard_rows,
                max_rows=self.max_rows,
                skip_bad=False,
            )
            writer.finish()
            self.manifest = writer.manifest
            self.remove_parts()

    def remove_parts(self) -> None:
        """Once the store is complete: remove what the ranks left in `parts`."""
        with suppress(FileNotFoundError):  # several ranks may do it at once
            n_shards = len(self.manifest.shards)
            for number in range(n_shards):
                if (part := self.parts / f"{number:05d}").is_dir():
                    remove_store(part, self._described, [0])
            records = [Path(f"{number:05d}.json") for number in range(n_shards)]
            names = [name for record in records for name in (record.name, temporary_path(record).name)]
            signs = [child.name for child in self.parts.iterdir()]
            names += [name for name in signs if _RANK.fullmatch(name) or _BEGUN.fullmatch(name)]
            remove_folder(self.parts, [*names, MANIFEST])

    def leave(self) -> None:
        """Let go of the store."""
        while self._locks:
            self._locks.pop().release()
