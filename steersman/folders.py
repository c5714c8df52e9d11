"""Folders that a command writes: whose they are, who may write them now, and what may be removed from them.

A folder is ours when the manifest in it says so. Nothing else in it is ever touched: what is removed is named one by
one, files only, never by a pattern and never a tree.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from steersman.errors import SteersmanError

__all__ = ["FolderLock", "remove_files", "remove_folder"]

log = logging.getLogger(__name__)


class FolderLock:
    """The right to write a folder, held by one process at a time and given up when it ends, however it ends.

    The lock is the operating system's, on the folder itself: it leaves no file. On file systems without locks it is
    not taken, and this is logged. Use as a context manager, or call `release`.
    """

    def __init__(self, folder: str | os.PathLike[str], what: str, *, shared: bool = False) -> None:
        """Take the lock of `folder`, which exists (or of a file); `what` names what is written there, such as "this
        store". A `shared` lock is refused only where somebody holds one that is not.

        Raises SteersmanError when another process holds it.
        """
        self._descriptor: int | None = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.release()
                raise SteersmanError(
                    f"{folder}: another process is writing {what}; wait for it to end, or choose another folder"
                ) from None
            log.warning("%s: the file system knows no locks (%s); run one process at a time here", folder, error)

    def release(self) -> None:
        """Give the folder up; may be called again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove the files of `folder` called `names`, of those that are there. Links are removed, not what they point to,
    and folders of such a name are left alone."""
    for name in names:
        file = folder / name
        if file.is_symlink() or file.is_file():
            file.unlink(missing_ok=True)


def remove_folder(folder: Path, names: Iterable[str]) -> bool:
    """`remove_files`, then the folder itself if nothing else is in it. Returns whether it is gone."""
    if folder.is_symlink() or not folder.is_dir():
        return not folder.exists()
    remove_files(folder, names)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        log.warning("%s is left where it is: it holds files that Steersman did not write", folder)
        return False
    return True
