"""A store's folder: which names in it are ours, and whether the store in it is the one that is asked for.

Whatever is removed from the folder is named here, by the number of a shard that the store has or could have. Everything
else in it is its owner's.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from steersman.config import differences
from steersman.errors import SteersmanError
from steersman.files import temporary_path
from steersman.folders import remove_files, remove_folder
from steersman.train.store.manifest import MANIFEST, ROWS, STATISTICS, Manifest

UNFINISHED = [name for file in (MANIFEST, STATISTICS) for name in (temporary_path(Path(file)).name, f"{file}.tmp")]
"""What a killed process may leave in the store's folder; version 0.1 left it under the second names."""

_SHORT_NAMES = 10

CheckText = Callable[[Manifest], str]
"""What is wrong with the text, given the manifest of a store that is to be of it; empty if nothing."""


def shard_name(number: int, short: int | None = None) -> str:
    """What the files of shard `number` are called, without their ending. While it lacks rows, as after an interruption,
    its name has two more digits, `short`: the whole shard and one that is interrupted again get other names, so that
    the files that a manifest names are never written over.

    >>> shard_name(3), shard_name(3, 1)
    ('00003', '0000301')
    """
    return f"{number:05d}" if short is None else f"{number:05d}{short % _SHORT_NAMES:02d}"


def next_short(name: str) -> int:
    """The `short` that follows that of a shard called `name`."""
    return int(name[-2:]) + 1 if len(name) == 7 and name.startswith("0") else 0


def shard_files(number: int) -> list[str]:
    """Every name that a file of shard `number` can have, or its temporary file."""
    names = [shard_name(number), *(shard_name(number, short) for short in range(_SHORT_NAMES))]
    files = [f"{name}.safetensors" for name in names]
    return [*files, temporary_path(Path(files[0])).name, f"{files[0]}.tmp"]


def remove_shards(folder: Path, manifest: Manifest, numbers: Iterable[int], keep: Iterable[str] = ()) -> None:
    """Remove the files of these shards, but those called `keep` (names with their endings)."""
    names = {name for number in numbers for name in shard_files(number)} - {*keep}
    for part in (ROWS, *manifest.folders().values()):
        here = folder / part
        if here.is_dir() and not here.is_symlink():
            remove_files(here, names & {child.name for child in here.iterdir()})


def remove_store(folder: Path, manifest: Manifest, numbers: Iterable[int], *, itself: bool = True) -> None:
    """Remove a store: the files of these shards and those beside them; then its folders where nothing else is in them,
    and `folder` itself if `itself`."""
    numbers = list(numbers)
    names = [name for number in numbers for name in shard_files(number)]
    for part in (ROWS, *manifest.folders().values()):
        remove_folder(folder / part, names)
    own = [MANIFEST, STATISTICS, *UNFINISHED]
    if itself:
        remove_folder(folder, own)
    else:
        remove_files(folder, own)


def only_begun(folder: Path, manifest: Manifest, also: Iterable[str] = ()) -> bool:
    """Whether a folder without a manifest holds at most what is made before it is written, for a run may end in
    between: empty folders of our names, and what is called as `also` says."""
    folders, also = (ROWS, *manifest.folders().values()), (*also, *UNFINISHED)
    for child in folder.iterdir():
        empty = child.name in folders and child.is_dir() and not any(child.iterdir())
        if not empty and child.name not in also:
            return False
    return True


def check_same_store(folder: Path, manifest: Manifest, check_text: CheckText | None = None) -> Manifest:
    """The manifest in `folder`, or `manifest` where nothing is stored yet; `SteersmanError` saying what is other when
    the store there is of another configuration, model or text."""
    there = Manifest.load(folder)
    if not there.complete and not there.shards:
        return manifest  # nothing was written yet: there is nothing to be at odds with
    check_same(folder, there, manifest, check_text)
    return there


def check_same(folder: Path, there: Manifest, manifest: Manifest, check_text: CheckText | None = None) -> None:
    """`SteersmanError` saying in what the store `there` differs from the one that `manifest` describes."""
    found, wanted = _compared(there), _compared(manifest)
    changed = ""
    if "model_digest" in found and "model_digest" in wanted:
        # What a model is called says nothing beside what it is.
        names = ("model_name", "revision") if found["model_digest"] == wanted["model_digest"] else ()
        if not names and found.get("model_dtype") == wanted.get("model_dtype"):
            changed = "the model changed (its configuration or its weights)"
        for name in ("model_digest", *names):
            for side in (found, wanted):
                side.pop(name, None)
        for side in (found, wanted):  # the text's documents are compared instead of what it is called
            side.pop("text", None)
    elif "model_digest" not in found:  # written by an earlier version
        for name in ("model_digest", "bos_token"):
            wanted.pop(name, None)
    if difference := "; ".join(filter(None, (changed, differences(found, wanted)))):
        raise SteersmanError(
            f"{folder}: holds a store of another configuration: {difference}; choose another folder, or delete this one"
        )
    if check_text is not None and (difference := check_text(there)):
        raise SteersmanError(f"{folder}: {difference}; choose another folder, or delete this one")


def _compared(manifest: Manifest) -> dict[str, Any]:
    settings: Mapping[str, Any] = manifest.config
    return {**settings, "dtype": manifest.dtype, "hooks": manifest.hooks, "model_name": manifest.model_name}
