"""A store from activations made elsewhere: vision, proteins, another framework."""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from steersman.errors import SteersmanError
from steersman.files import fsync_folder
from steersman.folders import FolderLock, remove_folder
from steersman.train.store.folder import only_begun, remove_store
from steersman.train.store.manifest import LABELS, MANIFEST, Manifest
from steersman.train.store.shards import check_choices, disk_errors
from steersman.train.store.store import ActivationStore
from steersman.train.store.writer import StoreWriter

log = logging.getLogger(__name__)

_ROW_KEYS = ("token_ids", "doc_ids", "positions", "labels")


def write_tensors(
    batches: Iterable[Any],
    out: str | os.PathLike[str],
    hook_name: str,
    *,
    model_name: str = "",
    dtype: str = "bfloat16",
    on_nonfinite: Literal["error", "skip"] = "error",
    shard_rows: int = 131072,
) -> ActivationStore:
    """Write a store from any iterable of activations, in one step: `out` appears whole or not at all.

    Args:
        batches: [n, d_in] tensors or numpy arrays of floating-point numbers, of any n and one d_in; or mappings with
            such an array under "x" and, where known, integer arrays [n] under "token_ids", "doc_ids" and "positions".
            Without them a row's token id and position are 0 and its document id is its own row number, so that rows
            are held out one by one. "labels" [n] (1, 0, or -1 where it is not known) come with all batches or with
            none.
        out: folder for the store; must not exist, or be empty.
        hook_name: what to call the place that the activations are from.
        model_name: what to call the model that they are from.
        dtype: type on disk: bfloat16, float16 or float32.
        on_nonfinite: "error", or "skip" to leave out rows that are not finite; the manifest counts them.
        shard_rows: rows of a shard; one ends with the batch that fills it, and a larger batch is spread over several.

    Raises:
        SteersmanError: no rows, a wrong shape or type (naming the batch), a row that is not finite, a full disk.
    """
    check_choices(dtype, on_nonfinite)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SteersmanError(f"{out}: exists and is not empty; choose another folder for the store, or delete this one")
    if isinstance(batches, torch.Tensor | np.ndarray | Mapping):
        raise SteersmanError("batches must be an iterable of [n, d_in] arrays; wrap a single array in a list")
    temporary = out.with_name(f".{out.name}.partial")
    lock: FolderLock | None = _begin(temporary, out)
    writer: StoreWriter | None = None
    n_read = 0
    try:
        for number, item in enumerate(batches):
            x, rows = _check_item(item, number, n_read)
            *rows, labels = rows
            if writer is None:
                content = {"source": "tensors"} if labels is None else {"source": "tensors", LABELS: True}
                manifest = Manifest(model_name=model_name, dtype=dtype, hooks={hook_name: x.shape[1]}, config=content)
                writer = StoreWriter.begin(
                    temporary, manifest, shard_rows=shard_rows, on_nonfinite=on_nonfinite, lock=lock
                )
            width = writer.manifest.hooks[hook_name]
            if x.shape[1] != width:
                raise SteersmanError(
                    f"batch {number} of the tensors has width {x.shape[1]}, earlier ones {width}; "
                    "all rows of a store have one width"
                )
            if (labels is not None) != writer.manifest.has_labels:
                raise SteersmanError(f"batch {number} of the tensors: labels come with all batches or with none")
            for low in range(0, len(x), shard_rows):
                part = slice(low, low + shard_rows)
                given = None if labels is None else labels[part]
                writer.append({hook_name: x[part]}, *(column[part] for column in rows), labels=given)
            n_read += len(x)
        if writer is None:
            raise SteersmanError("no tensors to store: the iterable is empty")
        writer.finish(release=False)
        with disk_errors(out, "choose another folder for the store"):
            os.replace(temporary, out)
            fsync_folder(out.absolute().parent)
        writer.abandon()
    except BaseException:
        with suppress(OSError):
            if writer is not None:
                _remove(temporary, writer.manifest)
                writer.abandon()
            remove_folder(temporary, [])
        raise
    finally:
        lock.release()
    return ActivationStore.open(out, verify=False)


def _begin(temporary: Path, out: Path) -> FolderLock:
    """Make the folder that the store is written in, empty, and take its lock; SteersmanError when another process
    writes there, or when it holds files that are not those of a store from tensors."""
    with disk_errors(out, "choose another place for the store"):
        temporary.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(temporary, f"the store {out}")
        try:
            if (temporary / MANIFEST).exists():  # left by a run that was killed
                there = Manifest.load(temporary)
                if there.config.get("source") == "tensors":
                    _remove(temporary, there)
            manifest = Manifest(model_name="", dtype="float32", hooks={"x": 1}, config={})
            if not only_begun(temporary, manifest):
                raise SteersmanError(f"{temporary}: holds files that Steersman did not write; move this folder away")
            if out.exists() and any(out.iterdir()):
                raise SteersmanError(f"{out}: another process wrote this store meanwhile; choose another folder")
        except BaseException:
            lock.release()
            raise
    return lock


def _remove(temporary: Path, manifest: Manifest) -> None:
    remove_store(temporary, manifest, range(len(manifest.shards) + 2), itself=False)


def _check_item(item: Any, number: int, first_row: int) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """The activations of a batch, and its row arrays in the order of `_ROW_KEYS`; None for labels that it lacks."""
    parts: Mapping[str, Any] = item if isinstance(item, Mapping) else {"x": item}
    if unknown := sorted({*parts} - {"x", *_ROW_KEYS}):
        raise SteersmanError(f"batch {number} of the tensors has unknown keys {unknown}; known are x, {_ROW_KEYS}")
    x = parts.get("x")
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(x))
    if not isinstance(x, torch.Tensor) or x.ndim != 2 or not x.shape[1] or not x.is_floating_point():
        found = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise SteersmanError(
            f"batch {number} of the tensors is {found}; a batch is a floating-point tensor or array [n, d_in]"
        )
    n = len(x)
    defaults = (np.zeros(n, np.int32), np.arange(first_row, first_row + n), np.zeros(n, np.int32), None)
    rows = []
    for key, default in zip(_ROW_KEYS, defaults):
        given = parts.get(key)
        column = default if given is None else np.asarray(given)
        if column is None:
            rows.append(None)
            continue
        if column.shape != (n,) or column.dtype.kind not in "iu":
            raise SteersmanError(
                f"batch {number} of the tensors: {key} is {column.dtype} {column.shape}, must be integers ({n},)"
            )
        rows.append(column)
    if rows[-1] is not None and not np.isin(rows[-1], (-1, 0, 1)).all():
        raise SteersmanError(f"batch {number} of the tensors: labels must be 1, 0, or -1 where they are not known")
    return x.detach(), tuple(rows)
