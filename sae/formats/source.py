"""Where an SAE's files are: a folder, one file of a folder, or a repository on the Hugging Face hub.

A source knows the names of the files first; a file of the hub is fetched only when a format opens it.
"""

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import check_regular, read_json_object
from steersman.sae.formats.npz import NpzFile
from steersman.sae.formats.pt import PtFile
from steersman.sae.formats.tensors import SafetensorsFile, TensorFile

log = logging.getLogger(__name__)

_MOST_FILES = 10_000
_DEEPEST = 3
"""Folders below the one that is named are looked into that far."""
_CONFIG_BYTES = 16 << 20
"""Largest configuration that is read."""
_ENDINGS = (".json", ".safetensors", ".npz", ".pt", ".pth", ".dcp")
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(/[^@]+)?)(@(?P<revision>[^@]+))?", re.ASCII)


class Source(ABC):
    """Some files by their names, relative to one folder and with forward slashes."""

    label: str
    """What the user named, for messages."""
    place: str
    """The full path of the folder (on the hub: repository and folder), from which layer and model are read."""
    names: list[str]
    """Files of the folder and of the folders below it, sorted."""
    only: str | None = None
    """The one file of the folder that the user named."""
    origin: dict[str, Any]
    """Where it is, for the provenance."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """The local path of a file; one of the hub is fetched."""

    def has(self, *names: str) -> bool:
        """Whether all of these files are there (and, where the user named one file, none of them is another of its
        kind)."""
        return all(name in self.names for name in names)

    def pick(self, pattern: str) -> str | None:
        """The file at the top that matches a regular expression: the one that the user named, or the only one."""
        if self.only is not None:
            return self.only if re.fullmatch(pattern, self.only) else None
        matching = [name for name in self.names if re.fullmatch(pattern, name)]
        return matching[0] if len(matching) == 1 else None

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. Raises SteersmanError where it is missing or malformed."""
        return read_json(self.path(name))

    def tensors(self, name: str, below: str | None = None) -> TensorFile:
        """The tensors of a file."""
        return open_tensors(self.path(name), below)

    def above(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file of the folder above, or None."""
        return None

    def describe(self) -> str:
        """The files, as text for a message."""
        if not self.names:
            return "nothing"
        shown = ", ".join(self.names[:8])
        return shown + (f" and {len(self.names) - 8} more" if len(self.names) > 8 else "")


class LocalSource(Source):
    """A folder on this machine, or one file of it."""

    def __init__(self, label: str, path: Path, origin: dict[str, Any] | None = None) -> None:
        self.label = label
        self.folder = path.parent if path.is_file() else path
        self.only = path.name if path.is_file() else None
        self.place = self.folder.resolve().as_posix()
        self.origin = {"path": path.resolve().name} if origin is None else origin
        self.names = sorted(islice(_files_below(self.folder), _MOST_FILES))

    def path(self, name: str) -> Path:
        return self.folder / inside(name)

    def above(self, name: str) -> dict[str, Any] | None:
        path = self.folder.resolve().parent / inside(name)
        return read_json(path) if os.path.lexists(path) else None


def _files_below(folder: Path) -> Iterator[str]:
    """Everything in `folder` and below that is no folder, and folders of a file's name: a link that leads nowhere, a
    pipe or a folder in the place of a file is there, and an error when it is opened."""
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in sorted(files) + sorted(name for name in folders if name.endswith(_ENDINGS)):
            yield (here / name).as_posix()
        folders[:] = sorted(folders) if len(here.parts) < _DEEPEST - 1 else []


class HubSource(Source):
    """A folder of a model repository on the hub, at one commit."""

    def __init__(self, label: str, repo: str, folder: str, revision: str | None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        self.label, self.repo, self.revision = label, repo, revision
        api = HfApi()
        commit = api.model_info(repo, revision=revision).sha
        assert commit is not None
        self.commit: str = commit
        folder = folder.strip("/")
        if re.search(r"\.(safetensors|npz|pt)$", folder):
            folder, self.only = str(PurePosixPath(folder).parent), PurePosixPath(folder).name
            folder = "" if folder == "." else folder
        self.folder = folder
        self.place = f"{repo}/{folder}"
        self.origin = {"repo_id": repo, "folder": folder, "revision": commit}
        tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit)
        prefix = f"{folder}/" if folder else ""
        self.names = []
        for item in tree:
            if isinstance(item, RepoFile):
                self.names.append(item.path.removeprefix(prefix))
            if len(self.names) >= _MOST_FILES:
                break
        self.names.sort()

    def path(self, name: str) -> Path:
        return self._fetch(f"{self.folder}/{inside(name)}" if self.folder else inside(name))

    def _fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            # By the name first, which the local cache remembers for when there is no connection; by the commit if the
            # name has moved on since the files were listed.
            path = Path(hf_hub_download(self.repo, name, revision=self.revision))
            return path if self.commit in path.parts else Path(hf_hub_download(self.repo, name, revision=self.commit))
        except Exception as error:  # the hub's client raises many kinds
            raise SteersmanError(f"{name} could not be fetched from {self.repo}: {_reason(error)}") from error

    def above(self, name: str) -> dict[str, Any] | None:
        from huggingface_hub.errors import EntryNotFoundError

        if not self.folder:
            return None
        parent = PurePosixPath(self.folder).parent
        try:
            return read_json(self._fetch(str(parent / inside(name))))
        except SteersmanError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise


def open_tensors(path: Path, below: str | None = None) -> TensorFile:
    """The tensors of a file, by the ending of its name. `below` is for `.pt` files that keep them one level down."""
    check_regular(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix == ".npz":
        return NpzFile(path)
    if path.suffix in (".pt", ".pth"):
        return PtFile(path, below)
    raise SteersmanError(f"{path}: tensors are read from .safetensors, .npz and .pt files")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SteersmanError for anything else."""
    try:
        return read_json_object(path, limit=_CONFIG_BYTES)
    except SteersmanError as error:
        raise SteersmanError(f"{path} is not a readable SAE configuration: {error}") from error


def inside(name: str) -> str:
    """A relative path, unchanged. Raises SteersmanError for one that would leave its folder.

    >>> inside("checkpoints/final.safetensors")
    'checkpoints/final.safetensors'
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\x00" in name:
        raise SteersmanError(f"{name!r} leads out of the folder it belongs to: it is not opened")
    return name


def open_source(name: str | Path) -> Source:
    """The files that `name` means: a path that exists, or `repo-id[/subfolder][@revision]` on the hub.

    Raises SteersmanError for a path that does not exist and cannot be a hub id, for one that climbs out of its
    repository, and for a repository that is neither on the hub nor in the local cache.
    """
    label = str(name)
    path = Path(name).expanduser()
    if path.exists():
        return LocalSource(label, path)
    match = _HUB_NAME.fullmatch(label)
    if match is None or isinstance(name, Path) or label.startswith((".", "/", "~")) or "\\" in label:
        raise SteersmanError(f"{label} holds no SAE: no such folder or file")
    inside(label)
    repo, folder, revision = match["repo"], match["folder"], match["revision"]
    inside(revision or "main")
    return _open_hub(label, repo, folder.strip("/"), revision)


def _open_hub(label: str, repo: str, folder: str, revision: str | None) -> Source:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if not constants.HF_HUB_OFFLINE:
            return HubSource(label, repo, folder, revision)
        reason = "the hub is switched off (HF_HUB_OFFLINE)"
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise SteersmanError(
            f"{label} is no local path and not on the hub: {_reason(error)} (a private or gated repository needs "
            "`hf auth login`)"
        ) from error
    except Exception as error:  # no connection, in one of many kinds
        reason = _reason(error)
    return _cached(label, repo, folder, revision, reason)


def _cached(label: str, repo: str, folder: str, revision: str | None, reason: str) -> Source:
    """The copy of a repository in the hub's local cache."""
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception as error:
        raise SteersmanError(
            f"{label} is no local path nor in the local cache, and the hub cannot be reached: {reason}"
        ) from error
    path = snapshot / folder
    if not path.exists():
        raise SteersmanError(
            f"{label}: the local cache of {repo} has no {folder}, and the hub cannot be reached: {reason}"
        )
    log.warning("%s: the hub cannot be reached; using the copy in the local cache", repo)
    source = LocalSource(label, path, {"repo_id": repo, "folder": folder, "revision": snapshot.name})
    source.place = f"{repo}/{folder}"
    return source


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
