"""Many prompts continued steered and unsteered into a JSONL file, a batch at a time: one record a line.

A run that was interrupted goes on behind the last whole line, if it is the same run.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from steersman.conversations import Document
from steersman.errors import SteersmanError
from steersman.files import make_folder
from steersman.progress import progress
from steersman.reading import check_regular
from steersman.steer.compare import Comparison, SteerConfig

log = logging.getLogger(__name__)

_LAST_LINE = 1 << 24
"""Bytes at the end of a file in which its last record must lie."""


def steer_to_file(
    compare: Callable[[SteerConfig, Sequence[Document]], Comparison],
    config: SteerConfig,
    prompts: Iterable[Document],
    out: str | Path,
    *,
    run: str = "",
) -> int:
    """Write a line for each prompt to `out` and say how many lines it then has.

    `compare(config, prompts)` continues a batch of prompts; `run` says in a few letters what decides the texts beside
    the prompts, and is part of each record. A record holds `row`, `run`, `prompt`, `messages` where it was given as a
    conversation, and what `TextPair` has. Texts are sampled with the seed of `config` plus the number of a batch's
    first row. Raises SteersmanError for a file that another run wrote, or of other prompts.
    """
    path = Path(out)
    make_folder(path.parent)
    done = _rows_of(path, run)
    rows = iter(prompts)
    for given in _batches(_after(rows, done, path), config.batch_size):
        found = compare(replace(config, seed=config.seed + done), given)
        with open(path, "a", encoding="utf-8") as file:
            for number, (prompt, pair) in enumerate(zip(given, found.pairs), done):
                record: dict[str, Any] = {"row": number, "run": run}
                if not isinstance(prompt, str):
                    record["messages"] = [dict(message) for message in prompt]
                file.write(json.dumps(record | asdict(pair), ensure_ascii=False, allow_nan=False) + "\n")
        done += len(given)
    return done


def _batches(prompts: Iterator[Document], size: int) -> Iterator[list[Document]]:
    with progress(desc="steering", unit="prompt") as bar:
        while given := list(islice(prompts, size)):
            yield given
            bar.update(len(given))


def _after(prompts: Iterator[Document], done: int, path: Path) -> Iterator[Document]:
    """The prompts after the first `done`, which the file has."""
    passed = sum(1 for _ in islice(prompts, done))
    if passed < done:
        raise _other(path, f"it has {done} rows, and there are {passed} prompts")
    if done:
        log.info("%s: goes on after %d rows", path, done)
    return prompts


def _rows_of(path: Path, run: str) -> int:
    """How many whole records a file has, the rest of an unfinished line being cut off. Raises SteersmanError for a file
    that is none of this run's."""
    if not path.exists():
        return 0
    size = check_regular(path)
    with open(path, "rb") as file:
        start = max(0, size - _LAST_LINE)
        file.seek(start)
        tail = file.read()
    whole = tail.rfind(b"\n") + 1
    if not size:
        return 0
    try:
        record = json.loads(tail[:whole].rstrip(b"\n").rpartition(b"\n")[2])
        row, known = int(record["row"]), record["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise _other(path, "its last line is no record of a run") from error
    if known != run:
        raise _other(path, "it was written with other settings")
    os.truncate(path, start + whole)
    return row + 1


def _other(path: Path, why: str) -> SteersmanError:
    return SteersmanError(f"{path}: {why}; choose another file, or delete this one")


def run_digest(*parts: Any) -> str:
    """Twelve hexadecimal digits of what decides a run: JSON values and bytes.

    >>> run_digest({"scale": 2}, b"vector") == run_digest({"scale": 3}, b"vector")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]
