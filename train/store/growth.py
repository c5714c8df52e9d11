"""A store that is there, made ready to hold more rows of the same text."""

import logging
from dataclasses import replace
from pathlib import Path

from steersman.errors import SteersmanError
from steersman.folders import FolderLock, remove_files
from steersman.train.store.folder import CheckText, check_same, shard_name
from steersman.train.store.manifest import MANIFEST, STATISTICS, Manifest
from steersman.train.store.shards import disk_errors

log = logging.getLogger(__name__)


def reopen(folder: Path, manifest: Manifest, *, shard_rows: int, check_text: CheckText | None = None) -> None:
    """Make the store in `folder` one that is being written to hold the tokens that `manifest` asks for.

    Every shard but the last has `shard_rows` rows, so a last one that has fewer is taken off and made again with what
    follows: the store then has the bytes that it would have if all had been asked for at once. Nothing is done where
    there is no store, or one of so many tokens.

    Raises SteersmanError when the store is of another configuration in anything else, or holds more already.
    """
    if not (folder / MANIFEST).exists():
        return
    there = Manifest.load(folder)
    had, wanted = there.config.get("tokens"), manifest.config["tokens"]
    more = had is not None and (wanted is None or wanted > had)
    ended = there.complete and (had is None or there.n_rows < had)  # the text did; there may be more of it by now
    if wanted == had and not ended:
        return
    if not more and wanted != had:
        raise SteersmanError(
            f"{folder}: holds {'the whole text' if had is None else f'{had:,} tokens'} already, which is not less than "
            f"{wanted:,}; ask for more, or choose another folder"
        )
    check_same(folder, there, replace(manifest, config={**manifest.config, "tokens": had}), check_text)
    shards, last = there.shards, there.shards[-1] if there.shards else None
    if last is not None and last.rows < shard_rows and last.name == shard_name(len(shards) - 1):
        shards = shards[:-1]
    grown = replace(
        there, config={**there.config, "tokens": wanted}, complete=False, shards=shards, statistics=None,
        statistics_file=None,
    )  # fmt: skip
    with disk_errors(folder, "the store is as it was"), FolderLock(folder, "this store"):
        grown.save(folder)
        remove_files(folder, [STATISTICS])
        if last is not None and last not in shards:
            for name in last.files:
                remove_files(folder / name, [f"{last.name}.safetensors"])
    log.info("%s: %s rows are kept; caching on from there", folder, f"{grown.n_rows:,}")
