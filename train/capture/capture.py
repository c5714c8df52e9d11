"""From text to rows of activations: the part that caching and streaming share."""

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steersman.errors import SteersmanError
from steersman.text import TextSource
from steersman.train.capture.contexts import ContextBatch, context_batches

if TYPE_CHECKING:
    from steersman.lm import LanguageModel

DEFAULT_CONTEXT = 256
"""Tokens of a context unless asked otherwise, or the model's limit if that is smaller."""


@dataclass(frozen=True, kw_only=True)
class CapturedRows:
    """The kept tokens of one forward batch."""

    activations: Mapping[str, torch.Tensor]
    """Hook point -> [n, D], on the model's device and in its type."""
    token_ids: np.ndarray
    """[n] int64."""
    doc_ids: np.ndarray
    """[n] int64."""
    positions: np.ndarray
    """[n] int64, place in the context."""
    cursor: Mapping[str, int]
    """Where in the text the batch starts."""


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """How text becomes rows; all of it decides what the rows are."""

    hooks: tuple[str, ...]
    """Hook points by their canonical names."""
    context_length: int
    """Tokens of a context, BOS included."""
    batch_size: int
    """Contexts of a forward pass."""
    packing: bool
    """Whether documents are packed into full contexts, or kept one a row."""
    excluded: tuple[int, ...]
    """Token ids whose rows are left out."""


def capture_settings(
    lm: "LanguageModel",
    hooks: str | Sequence[str],
    *,
    context_length: int | None,
    batch_size: int,
    packing: bool,
    exclude_bos: bool,
    exclude_eos: bool,
    exclude_tokens: Sequence[int],
) -> CaptureSettings:
    """Check what a user asked for against the model. Raises `SteersmanError` naming the value and its limit."""
    if lm.tokenizer is None:
        raise SteersmanError(f"{lm.name} was wrapped without a tokenizer, so it cannot read text; give it one")
    names = tuple(lm.resolve_hook(hook) for hook in ([hooks] if isinstance(hooks, str) else hooks))
    if not names or len(set(names)) != len(names):
        raise SteersmanError(f"hook must name one or several different hook points, got {hooks!r}")
    if rowless := [name for name in names if lm.hook_point(name).kind == "hook_attn_mask"]:
        raise SteersmanError(f"{rowless[0]} holds an attention mask, which has no row for each token: it is not stored")
    limit = lm.context_length
    length = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT) if context_length is None else context_length
    if length < 2 or (limit is not None and length > limit):
        raise SteersmanError(f"context_length {length} is not between 2 and the {limit} positions of {lm.name}")
    if batch_size < 1:
        raise SteersmanError(f"batch_size {batch_size} must be at least 1 context")
    special = [lm.bos_token_id] * exclude_bos + [lm.eos_token_id] * exclude_eos
    excluded = tuple(sorted({*exclude_tokens, *(token for token in special if token is not None)}))
    return CaptureSettings(
        hooks=names, context_length=length, batch_size=batch_size, packing=packing, excluded=excluded
    )


def tokenize(lm: "LanguageModel", texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens."""
    return lm.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def show_token(lm: "LanguageModel", token: int) -> str:
    """The text of one token."""
    return str(lm.tokenizer.decode([token]))


def captured_rows(
    lm: "LanguageModel", text: TextSource, settings: CaptureSettings, cursor: Mapping[str, int] | None = None
) -> Generator[CapturedRows]:
    """Run the model over `text` from `cursor` on and give the kept rows of each forward batch.

    The next batches are tokenized in another thread meanwhile. On an accelerator nothing here waits for the device.
    """
    with closing(model_batches(lm, text, settings, cursor)) as batches:
        for batch in batches:
            yield capture_batch(lm, batch, settings)


def model_batches(
    lm: "LanguageModel", text: TextSource, settings: CaptureSettings, cursor: Mapping[str, int] | None = None
) -> Generator[ContextBatch]:
    """The forward batches of `text` from `cursor` on, tokenized in another thread ahead of their use."""
    batches = context_batches(
        text,
        lambda texts: tokenize(lm, texts),
        context_length=settings.context_length,
        batch_size=settings.batch_size,
        packing=settings.packing,
        bos_id=lm.bos_token_id,
        pad_id=lm.pad_token_id or 0,
        cursor=cursor,
    )
    return in_background(batches, beside_model(lm, "steersman-text"), ahead=4)


def capture_batch(lm: "LanguageModel", batch: ContextBatch, settings: CaptureSettings) -> CapturedRows:
    """One forward pass, up to the last hook point, and the rows of its tokens that are not left out."""
    kept = kept_tokens(batch, settings)
    mask = None if batch.full else torch.from_numpy(batch.attention_mask())
    with torch.inference_mode():
        found = lm.capture(torch.from_numpy(batch.input_ids), mask, hooks=settings.hooks)
        flat = {hook: x.reshape(-1, x.shape[-1]) for hook, x in found.items()}
        if not kept.all():
            index = torch.from_numpy(np.flatnonzero(kept))
            flat = {hook: x.index_select(0, index.to(x.device, non_blocking=True)) for hook, x in flat.items()}
    positions = np.broadcast_to(np.arange(kept.shape[1]), kept.shape)
    return CapturedRows(
        activations=flat,
        token_ids=batch.input_ids[kept],
        doc_ids=batch.doc_ids[kept],
        positions=positions[kept],
        cursor=batch.cursor,
    )


def kept_tokens(batch: ContextBatch, settings: CaptureSettings) -> np.ndarray:
    """Which tokens of a batch become rows: all but padding and those left out, [B, S] bool."""
    kept = batch.doc_ids >= 0
    if settings.excluded:
        kept &= ~np.isin(batch.input_ids, settings.excluded)
    return kept


class CallingThread(Executor):
    """Runs what it is given at once, in the thread that gives it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def beside_model(lm: "LanguageModel", name: str) -> Executor:
    """Where to do one thing at a time beside the model's passes: in a thread, if the passes leave a core for it.

    On a CPU whose every core computes the passes a thread more makes each of their parallel steps wait for the core
    that it took, which costs more than doing its work in between.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if lm.device.type == "cpu" and torch.get_num_threads() >= cores:
        return CallingThread()
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)


def in_background(items: Iterator[Any], pool: Executor, ahead: int) -> Generator[Any]:
    """The same items, up to `ahead` of them made by `pool` before they are asked for."""
    end = object()
    pending: deque[Future[Any]] = deque(pool.submit(next, items, end) for _ in range(ahead))
    try:
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def expected_tokens(lm: "LanguageModel", text: TextSource, settings: CaptureSettings) -> int | None:
    """About how many rows the whole text gives, from its length and its first documents; None when it has no end."""
    total = text.n_characters()
    if total is None:
        return None
    sample = [document for document, _ in zip(text.documents(), range(32)) if document]
    characters = sum(map(len, sample))
    if not characters:
        return 0
    tokens = sum(map(len, tokenize(lm, sample)))
    return math.ceil(total * tokens / characters)
