"""Training straight from the model: a stream of activations through a shuffling buffer, with nothing written."""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from steersman.config import merged
from steersman.deprecation import renamed_fields
from steersman.errors import SteersmanError
from steersman.lm import LanguageModel
from steersman.train.capture.capture import Capture, CaptureConfig
from steersman.train.capture.shuffling import NeededRows, needed_rows, stage_order
from steersman.train.capture.stream_rows import StreamRows, batch_of, joined
from steersman.train.store.batch import ActivationBatch, batches_in
from steersman.train.store.shards import DTYPES
from steersman.train.store.statistics import (
    SKIP_NEEDS_ONE_PROCESS,
    ActivationStats,
    StatsSums,
    nonfinite_error,
    row_norms,
    stats_side_by_side,
)

_HELDOUT_FRACTION = 0.05
"""Of a text whose length is known, at most this much is held out."""
_LOOKED_AT, _CHARACTERS_OF_TOKEN = 64, 8
"""Documents that say which text without end it is, or one that comes over the network; and more characters than tokens
have on average."""


@renamed_fields(model_dtype="dtype")
@dataclass(frozen=True, kw_only=True)
class StreamConfig(CaptureConfig):
    """What to stream from a model, and through how large a buffer."""

    tokens: int | None = None
    """Rows of an epoch, counted after tokens are left out; None for the whole text."""
    buffer_rows: int = 65_536
    """Rows of the buffer that activations are shuffled in."""
    heldout_rows: int = 16_384
    """Rows that are held out, of the first documents: at most a twentieth of a text whose length is known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer_rows < 2 or self.heldout_rows < 0 or (self.tokens is not None and self.tokens < 1):
            raise SteersmanError("buffer_rows must be at least 2, heldout_rows at least 0 and tokens at least 1")


def stream_activations(
    lm: LanguageModel | None = None, texts: Any = None, config: StreamConfig | None = None, **overrides: Any
) -> "ActivationStream":
    """Activations to train on, made while they are read, with nothing written. Those of several hook points come from
    one forward pass and stand side by side in each row, as in a `HookView`.

    Args:
        lm: a loaded model; loaded as `config` says if not given.
        texts: anything `open_text` takes; `config.text` if not given.
        config: a `StreamConfig`; may be left out when `overrides` name what it needs.
        overrides: fields of `StreamConfig`, over those of `config`.

    Raises:
        SteersmanError: as `cache_activations` does before it starts.
    """
    return ActivationStream(lm, texts, config, **overrides)


class ActivationStream:
    """Activations made while they are read; to a trainer it reads like an `ActivationStore`, of several hook points
    like a `HookView`.

    Rows go through a buffer of `buffer_rows`: it is filled, permuted, its first half given out and refilled. The order
    is fixed by (seed, epoch, batch size). Rows are on the model's device. The first documents, `heldout_rows` rows of
    them, are kept in memory as the held-out split; training starts at the document after them.
    """

    def __init__(
        self, lm: LanguageModel | None, texts: Any, config: StreamConfig | None = None, **overrides: Any
    ) -> None:
        """See `stream_activations`."""
        config = merged(StreamConfig, config, overrides)
        self.config, self._capture = config, Capture.open(lm, texts, config)
        self._skip_bad = config.on_nonfinite == "skip"
        expected, wanted = self._capture.expected_rows(), config.heldout_rows
        self._heldout_rows = wanted if expected is None else min(wanted, int(expected * _HELDOUT_FRACTION))
        self._part, self._n_parts = 0, 1
        self._last_document = 0  # of an epoch, once its rows were counted
        self.n_passed = 0
        """Forward batches gone past until now, run or not: while it rises, reading advances."""

    def __repr__(self) -> str:
        return f"ActivationStream({self.hook_name} [{self.d_in}] of {self.model_name} over {self._capture.text.name})"

    def run_part(self, part: int, n_parts: int) -> None:
        """From now on run the model over every `n_parts`-th forward batch alone, beginning with batch `part`.

        Of the rows of the others only what follows from their tokens is known, as other processes have them;
        `whole_batches` gives both. Called before anything is read.
        """
        if self._skip_bad:
            raise SteersmanError(SKIP_NEEDS_ONE_PROCESS)
        self._part, self._n_parts = part, n_parts

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points by their canonical names, in the order in which their activations stand side by side."""
        return self._capture.settings.hooks

    @property
    def hook_name(self) -> str:
        """The hook point, by its canonical name; of several their names joined by "+"."""
        return "+".join(self.hooks)

    @property
    def hook_names(self) -> list[str]:
        """The hook points in a list, as a store gives its own."""
        return list(self.hooks)

    def resolve_hook(self, hook: str) -> str:
        """The canonical name of a hook point of the model."""
        return self._capture.lm.resolve_hook(hook)

    def width(self, hook: str) -> int:
        """Width of one of the hook points."""
        return self._capture.lm.hook_width(hook)

    @property
    def buffer_rows(self) -> int:
        """Rows of the buffer that shuffles."""
        return self.config.buffer_rows

    @property
    def model_name(self) -> str:
        """The model that runs."""
        return self._capture.lm.name

    @property
    def d_in(self) -> int:
        """Width D of a row: that of the hook point, or the sum of those of several."""
        return sum(map(self.width, self.hooks))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations given out."""
        return DTYPES[self.config.rows_dtype][0]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the model's name, the text and all settings."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        config, capture = self.config, self._capture
        settings = {
            name: value for name, value in asdict(capture.settings).items() if name != "bos_id" or not config.bos
        }
        content = [self.model_name, capture.text.identity(), settings, config.rows_dtype, config.tokens]
        content += [config.buffer_rows, self._heldout_rows, self._skip_bad, *sorted(capture.chat.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def contents(self) -> dict[str, str]:
        """What the rows follow from, each in sixteen hexadecimal digits that no name or place changes: the "model", the
        "text" as far as it is read, and the "settings"."""
        return self._contents

    @cached_property
    def _contents(self) -> dict[str, str]:
        config, capture = self.config, self._capture
        settings = [asdict(capture.settings), config.rows_dtype, config.tokens, config.buffer_rows]
        settings += [self._heldout_rows, self._skip_bad, *sorted(capture.chat.items())]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        return {"model": capture.lm.digest(), "text": self._text_digest(), "settings": digest}

    def _text_digest(self) -> str:
        text, limit = self._capture.text, self.config.tokens
        if text.n_characters() is not None:
            self.n_batches(1)  # reads what an epoch does
            return text.digest_after(self._last_document)
        if text.has_end:  # and a length that is not known: as many characters as the tokens will hardly have
            return text.digest_after(
                None, None if limit is None else _CHARACTERS_OF_TOKEN * (limit + self._heldout_rows)
            )
        return text.digest_after(_LOOKED_AT - 1)

    def stats(self, hook: str | None = None) -> ActivationStats:
        """Statistics of the first `buffer_rows` rows of the training split, of one of the hook points or of the rows as
        they are (see `stats_side_by_side`); runs the model over them once."""
        if hook is None:
            return stats_side_by_side(list(self._stats.values()))
        return self._stats[self._known(hook)]

    @cached_property
    def _stats(self) -> dict[str, ActivationStats]:
        widths = [self.width(hook) for hook in self.hooks]
        sums = {hook: StatsSums(width) for hook, width in zip(self.hooks, widths)}
        with closing(self._train_rows(self.buffer_rows, n_parts=1)) as rows:
            for part in rows:
                for total, x in zip(sums.values(), part.x.split(widths, dim=1)):
                    total.add(x, row_norms(x))
        return {hook: replace(total.stats(), all_rows=False) for hook, total in sums.items()}

    def n_batches(
        self, batch_size: int, *, split: str = "train", heldout_fraction: float = 0.05, drop_last: bool = True
    ) -> int | None:
        """Batches of an epoch: counted by tokenizing the text once where its length is known, else from `tokens`; None
        for a text without end. `heldout_fraction` is a store's: a stream holds out `heldout_rows` rows."""
        rows = len(self._heldout[0]) if self._check_split(split) == "heldout" else self._n_train_rows
        return None if rows is None else batches_in(rows, batch_size, drop_last)

    @cached_property
    def _n_train_rows(self) -> int | None:
        limit = self.config.tokens
        if self._capture.text.n_characters() is None:
            return limit
        rows = 0
        with closing(self._capture.batches(self._train_cursor)) as batches:
            for batch in batches:
                self.n_passed += 1
                rows += int(self._capture.kept(batch).sum())
                self._last_document = int(batch.doc_ids.max())
                if limit is not None and rows >= limit:
                    return limit
        return rows

    def batches(
        self,
        batch_size: int,
        *,
        hook: str | None = None,
        split: str = "train",
        heldout_fraction: float = 0.05,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        prefetch: int = 0,
    ) -> Iterator[ActivationBatch]:
        """Batches as `ActivationStore.batches` gives them; an epoch is one pass over the text.

        From `start` on, the batches are those that a full pass would give: the text before is tokenized again, but the
        model runs only over what is still in the buffer then (with on_nonfinite="skip", over all of it). Each rank runs
        the model itself and takes its part of each batch. Nothing is prefetched: the model is the slower part.
        """
        if hook is not None and (self._known(hook),) != self.hooks:
            raise SteersmanError(f"this stream gives {self.hook_name} side by side, not {hook} alone")
        if not 0 <= rank < world_size or batch_size % world_size:
            raise SteersmanError(f"batch_size {batch_size} must divide among world_size {world_size} ranks from 0 on")
        whole = self.whole_batches(
            batch_size, split=split, shuffle=shuffle, seed=seed, epoch=epoch, start=start, drop_last=drop_last
        )
        parts = (rows.split(rank, world_size) for rows in whole)
        return (batch_of(rows.x, rows.info) for rows in parts)

    def whole_batches(
        self,
        batch_size: int,
        *,
        split: str = "train",
        heldout_fraction: float = 0.05,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        drop_last: bool = True,
    ) -> Generator[StreamRows]:
        """The batches of `batches` as they are for all ranks together, with what `run_part` leaves to this process."""
        if batch_size < 1 or start < 0:
            raise SteersmanError(f"batch_size {batch_size} must be at least 1 and start {start} at least 0")
        if self._check_split(split) == "heldout":
            rows = self._heldout[0]
            order = np.random.default_rng([seed, epoch]).permutation(len(rows)) if shuffle else np.arange(len(rows))
            stages: Iterator[StreamRows] = iter([rows.take(order[start * batch_size :])])
        elif shuffle:
            if self.buffer_rows < 2 * batch_size:
                raise SteersmanError(
                    f"buffer_rows {self.buffer_rows} holds less than two batches of {batch_size}; make it larger"
                )
            stages = self._shuffled(batch_size, seed, epoch, start)
        else:
            stages = self._in_order(start * batch_size)
        return self._cut(stages, batch_size, drop_last)

    def _known(self, hook: str) -> str:
        name = self.resolve_hook(hook)
        if name not in self.hooks:
            raise SteersmanError(f"this stream gives {self.hook_name}, not {hook}")
        return name

    def _check_split(self, split: str) -> str:
        if split not in ("train", "heldout"):
            raise SteersmanError(f"split {split!r} of a stream is neither 'train' nor 'heldout'")
        return split

    @staticmethod
    def _cut(stages: Iterator[StreamRows], batch_size: int, drop_last: bool) -> Generator[StreamRows]:
        left: list[StreamRows] = []
        for stage in stages:
            rows = joined([*left, stage])
            whole = len(rows) // batch_size * batch_size
            for low in range(0, whole, batch_size):
                yield rows[low : low + batch_size]
            left = [rows[whole:]]
        if sum(map(len, left)) and not drop_last:
            yield left[0]

    def _in_order(self, first: int) -> Generator[StreamRows]:
        needed = NeededRows(np.zeros(0, dtype=np.int64), first)
        with closing(self._train_rows(self.config.tokens, needed)) as parts:
            for part in parts:
                yield part[max(first - int(part.info[0, 0]), 0) :] if len(part) else part

    def _shuffled(self, batch_size: int, seed: int, epoch: int, start: int) -> Generator[StreamRows]:
        """The rows of the training split in shuffled order, a buffer's half at a time, from batch `start` on."""
        size, half = self.buffer_rows, self.buffer_rows // 2 // batch_size * batch_size
        skip = start * batch_size
        with closing(self._train_rows(self.config.tokens, needed_rows(size, half, seed, epoch, skip))) as parts:
            buffer: list[StreamRows] = []
            held, stage, passes, more = 0, 0, 0, True
            while more:
                # All processes' parts of the passes are equal, so that nobody waits for another one's pass. What does
                # not fit in the buffer stands behind it, and changes nothing.
                while (held < size or passes % self._n_parts) and (part := next(parts, None)) is not None:
                    buffer.append(part)
                    held += len(part)
                    passes += 1
                more = held >= size
                rows = joined(buffer) if buffer else None
                if rows is None:
                    return
                mixed = stage_order(min(held, size), seed, epoch, stage)
                out, kept = (mixed[:half], mixed[half:]) if more else (mixed, mixed[:0])
                if skip < len(out):
                    yield rows.take(out[skip:])
                skip = max(skip - len(out), 0)
                buffer = [rows.take(kept), rows[size:]]
                held -= len(out)
                stage += 1

    @cached_property
    def _heldout(self) -> tuple[StreamRows, int]:
        """The held-out rows, and the number of the document that training starts at."""
        parts, n, document = [], 0, 0
        if self._heldout_rows:
            with closing(self._rows_from({"document": 0, "token": 0}, NeededRows())) as rows:
                for part in rows:
                    parts.append(part)
                    n += len(part)
                    if n >= self._heldout_rows:
                        break
        if parts:
            held = joined(parts)
            document = int(held.info[:, 2].max()) + 1
            return held, document
        nothing = np.zeros((0, 5), dtype=np.int64)
        return StreamRows(torch.zeros(0, self.d_in, dtype=self.dtype), nothing, self._part), document

    @property
    def _train_cursor(self) -> dict[str, int]:
        return {"document": self._heldout[1], "token": 0}

    def _train_rows(
        self, limit: int | None, needed: NeededRows | None = None, n_parts: int | None = None
    ) -> Generator[StreamRows]:
        """The rows of the training split in the order of the text, at most `limit`."""
        n = 0
        with closing(self._rows_from(self._train_cursor, needed or NeededRows(), n_parts)) as parts:
            for part in parts:
                part = part if limit is None else part[: limit - n]
                n += len(part)
                yield part
                if n == limit:
                    return
        if not n:
            name, n_heldout = self._capture.text.name, len(self._heldout[0])
            raise SteersmanError(
                f"{name}: no text is left to train on beside the {n_heldout} held-out rows; "
                "give more text or a smaller heldout_rows"
            )

    def _rows_from(
        self, cursor: dict[str, int], needed: NeededRows, n_parts: int | None = None
    ) -> Generator[StreamRows]:
        """The rows of each forward batch from `cursor` on. The model runs over those that are `needed` and, of these,
        over this process's part of `n_parts` (that of `run_part` if not given)."""
        row, n_parts = 0, self._n_parts if n_parts is None else n_parts
        with closing(self._capture.batches(cursor)) as batches:
            for number, batch in enumerate(batches):
                self.n_passed += 1
                kept = self._capture.kept(batch)
                n = int(kept.sum())
                wanted = self._skip_bad or needed.any(row, row + n)
                part = number % n_parts if n_parts > 1 else self._part
                positions = np.broadcast_to(np.arange(kept.shape[1]), kept.shape)[kept]
                columns = [np.zeros_like(positions), batch.input_ids[kept], batch.doc_ids[kept], positions]
                info = np.stack([*columns, np.full(n, part if wanted else -1)], 1).astype(np.int64)
                if wanted and part == self._part:
                    x, info = self._finite(self._capture.run(batch).activations, info)
                else:
                    x = torch.empty(0, self.d_in, dtype=self.dtype, device=self._capture.lm.device)
                info[:, 0] = np.arange(row, row + len(info))
                row += len(info)
                yield StreamRows(x, info, self._part)

    def _finite(self, found: Mapping[str, torch.Tensor], info: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """The activations of the hook points side by side in the type of the rows, and which rows they are: all, or
        those that are finite at every hook point."""
        parts = {hook: found[hook].to(self.dtype) for hook in self.hooks}
        finite = {hook: torch.isfinite(row_norms(x)).cpu().numpy() for hook, x in parts.items()}
        first, *others = parts.values()
        x = torch.cat([first, *(part.to(first.device) for part in others)], dim=1) if others else first
        every = np.logical_and.reduce(list(finite.values()))
        if every.all():
            return x, info
        if not self._skip_bad:
            bad = int(np.argmin(every))
            token, document, position = (int(value) for value in info[bad, 1:4])
            text, dtype = self._capture.show_token(token), self.config.rows_dtype
            hook = next(hook for hook, good in finite.items() if not good[bad])
            raise nonfinite_error(hook, found[hook][bad], dtype, token, text, position, document)
        index = np.flatnonzero(every)
        return x[torch.from_numpy(index).to(x.device)], info[index]
