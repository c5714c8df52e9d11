"""Caching: run a model over text once and keep its activations on disk."""

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from steersman.errors import SteersmanError
from steersman.files import format_bytes
from steersman.lm.load import Quantization
from steersman.parallel import comm_errors, process_group, rank_and_world_size, use_local_accelerator
from steersman.progress import progress
from steersman.text import TextSource, TxtDocuments, open_text
from steersman.train.capture.capture import (
    CaptureSettings,
    beside_model,
    capture_settings,
    captured_rows,
    expected_tokens,
    show_token,
)
from steersman.train.capture.parallel_cache import PARTS, SharedStore, cache_on_ranks
from steersman.train.store.from_tensors import check_choices
from steersman.train.store.manifest import Manifest
from steersman.train.store.shards import DTYPES
from steersman.train.store.statistics import SKIP_NEEDS_ONE_PROCESS
from steersman.train.store.store import ActivationStore
from steersman.train.store.writer import ROW_BYTES, StoreWriter

if TYPE_CHECKING:
    from steersman.lm import LanguageModel

log = logging.getLogger(__name__)

_WRITES_AHEAD = 3
"""Forward batches that may wait to be written: what bounds the memory of caching, beside the model's own."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to cache, from which text, and where. `steersman cache` takes the same names as flags."""

    hook: str | tuple[str, ...]
    """Hook point or points, such as blocks.2.hook_resid_post or model.layers.2."""
    out: str
    """Folder for the store. An interrupted store is gone on with, a finished one returned, if all else is equal."""
    model: str | None = None
    """Folder or hub id of the model; not needed when a loaded model is given."""
    text: str | None = None
    """File, folder or dataset id (see `open_text`); not needed when texts are given."""
    tokens: int | None = 1_000_000
    """Rows to cache, counted after tokens are left out; None for the whole text."""
    context_length: int | None = None
    """Tokens of a context, BOS included; the smaller of 256 and the model's limit if not given."""
    packing: bool = True
    """Pack documents into full contexts; otherwise one document a row, cut at context_length."""
    batch_size: int = 32
    """Contexts of a forward pass. Part of the store's identity: other shapes round differently."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the activations on disk."""
    exclude_bos: bool = True
    """Leave out the rows of BOS, whose norm is often a hundred times that of other tokens."""
    exclude_eos: bool = False
    """Leave out the rows of EOS."""
    exclude_tokens: tuple[int, ...] = ()
    """Further token ids to leave out."""
    on_nonfinite: Literal["error", "skip"] = "error"
    """What to do about rows with NaN or infinity: stop, or leave them out and count them in the manifest."""
    shard_rows: int = 131_072
    """Rows of a shard. An interruption loses the unfinished shard."""
    text_column: str = "text"
    """Field of .jsonl, .parquet and dataset records that holds the text."""
    txt_documents: TxtDocuments = "line"
    """What a document is in .txt files: a line, a paragraph or the file."""
    streaming: bool = True
    """Stream a Hugging Face dataset instead of downloading it first."""
    revision: str | None = None
    """Revision of the model on the hub."""
    model_dtype: str | None = None
    """Type to run the model in; float32 on the CPU and the checkpoint's own elsewhere if not given."""
    device: str = "auto"
    """Device to run the model on."""
    device_map: str | None = None
    """Spread a model that one device does not hold over devices and the host's memory: auto, balanced, sequential."""
    quantization: Quantization | None = None
    """Keep the model's weights in 8bit or 4bit. Part of the store's identity: it changes the activations."""
    tensor_parallel: bool = False
    """With several processes (torchrun): split every layer of the model over them, instead of giving each a part of the
    text."""
    timeout_seconds: float = 600.0
    """With several processes (torchrun): how long none of them may be at work before the others stop waiting."""
    trust_remote_code: bool = False
    """Let transformers run code that comes with the model."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise SteersmanError(f"tokens {self.tokens} must be at least 1; leave it None for the whole text")
        if self.shard_rows < 1:
            raise SteersmanError(f"shard_rows {self.shard_rows} must be at least 1")
        check_choices(self.dtype, self.on_nonfinite)


def cache_activations(
    lm: "LanguageModel | None" = None,
    texts: Any = None,
    config: CacheConfig | None = None,
    **overrides: Any,
) -> ActivationStore:
    """Run a model over text and write its activations at one or several hook points to a store.

    Shards are written while the model runs on. When interrupted, the same call goes on after the last finished shard
    and leaves the same bytes as an uninterrupted one (on the same device and number of threads). Memory does not grow
    with the number of tokens. Started by `torchrun`, each process writes a part of the shards, and the store is the
    same; see `parallel_cache.py`. The processes of a tensor-parallel model run it together, and the first one writes.

    Args:
        lm: a loaded model; loaded as `config` says if not given.
        texts: anything `open_text` takes; `config.text` if not given.
        config: a `CacheConfig`; may be left out when `overrides` name what it needs.
        overrides: fields of `CacheConfig`, over those of `config`.

    Raises:
        SteersmanError: an unknown hook point, no text, a context longer than the model's, too little free disk, a
            folder that holds something else or a store of another configuration (naming the fields), activations that
            are not finite (naming document and token), a disk that fills up.
    """
    config = _config(config, overrides)
    with (
        process_group(config.timeout_seconds)
        if config.tensor_parallel and rank_and_world_size()[1] > 1
        else nullcontext()
    ):
        return _cache(lm, texts, config)


def _cache(lm: "LanguageModel | None", texts: Any, config: CacheConfig) -> ActivationStore:
    rank, n_ranks = rank_and_world_size()
    if n_ranks > 1:
        use_local_accelerator()
    if lm is None:
        from steersman.lm import LanguageModel

        if config.model is None:
            raise SteersmanError("no model given: pass a loaded one, or set model to a folder or hub id")
        lm = LanguageModel.load(
            config.model,
            dtype=config.model_dtype,
            device=config.device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            device_map=config.device_map,
            quantization=config.quantization,
            tensor_parallel=config.tensor_parallel,
        )
    if texts is None and config.text is None:
        raise SteersmanError("no text given: pass texts, or set text to a file, folder or dataset id")
    text = open_text(
        config.text if texts is None else texts,
        text_column=config.text_column,
        streaming=config.streaming,
        txt_documents=config.txt_documents,
    )
    settings = capture_settings(
        lm,
        config.hook,
        context_length=config.context_length,
        batch_size=config.batch_size,
        packing=config.packing,
        exclude_bos=config.exclude_bos,
        exclude_eos=config.exclude_eos,
        exclude_tokens=config.exclude_tokens,
    )
    out = Path(config.out)
    shared = n_ranks > 1 or (out / PARTS).exists()
    if shared and config.on_nonfinite == "skip":
        raise SteersmanError(SKIP_NEEDS_ONE_PROCESS)
    if lm.tensor_parallel:
        _cache_together(lm, text, config, settings, rank)
    elif shared:
        limits = {"shard_rows": config.shard_rows, "max_rows": config.tokens}
        store = SharedStore(out, _manifest(lm, text, config, settings), rank=rank, **limits)
        if rank == 0 and not store.manifest.complete:
            _check_disk(lm, text, config, settings, store)
        cache_on_ranks(store, lm, text, settings, n_ranks=n_ranks, timeout_seconds=config.timeout_seconds)
    else:
        _write(lm, text, config, settings)
    return ActivationStore.open(out, verify=False)


def _write(
    lm: "LanguageModel",
    text: TextSource,
    config: CacheConfig,
    settings: CaptureSettings,
    begun: Callable[[StoreWriter], None] = lambda writer: None,
) -> None:
    """Write the store, or what is missing of it. `begun` is called before the model runs, if it has to."""
    writer = StoreWriter.begin(
        Path(config.out),
        _manifest(lm, text, config, settings),
        shard_rows=config.shard_rows,
        max_rows=config.tokens,
        on_nonfinite=config.on_nonfinite,
    )
    if not writer.manifest.complete:
        try:
            _check_disk(lm, text, config, settings, writer)
            begun(writer)
            _fill(writer, lm, text, config, settings)
            writer.finish()
        except BaseException:
            writer.abandon()
            writer.remove_if_empty()
            raise


def _cache_together(
    lm: "LanguageModel", text: TextSource, config: CacheConfig, settings: CaptureSettings, rank: int
) -> None:
    """All ranks of a tensor-parallel model run it over the same batches; the first one writes what comes out."""
    told: list[Any] = []
    """Where to start, (cursor, number of the row there); None when there is nothing to do; or what the mistake is."""

    def tell(what: Any) -> None:
        told.append(what)
        with comm_errors():
            dist.broadcast_object_list(told, src=0)

    def begun(writer: StoreWriter) -> None:
        cursor = writer.manifest.shards[-1].cursor if writer.manifest.shards else None
        tell((cursor, writer.n_rows - cursor["rows"] if cursor else 0))

    if rank == 0:
        try:
            with comm_errors():
                _write(lm, text, config, settings, begun)
        except SteersmanError as error:
            if not told:
                tell(str(error))
            raise
        if not told:
            tell(None)
    else:
        tell(None)
        if isinstance(told[0], str):
            raise SteersmanError(told[0])
        if told[0] is not None:
            with comm_errors():
                _run_along(lm, text, settings, *told[0], config.tokens)
    if told[0] is not None:
        with comm_errors():
            dist.barrier()


def _run_along(
    lm: "LanguageModel",
    text: TextSource,
    settings: CaptureSettings,
    cursor: Mapping[str, int] | None,
    row: int,
    max_rows: int | None,
) -> None:
    """The passes that `_fill` makes, without writing. `row` is the number of the first row at `cursor`."""
    with closing(captured_rows(lm, text, settings, cursor)) as batches:
        for rows in batches:
            row += len(rows.token_ids)
            if max_rows is not None and row >= max_rows:
                return


def _config(config: CacheConfig | None, overrides: Mapping[str, Any]) -> CacheConfig:
    known = CacheConfig.__dataclass_fields__
    if unknown := sorted(set(overrides) - set(known)):
        raise SteersmanError(f"cache_activations has no option {unknown[0]!r}; it has {', '.join(known)}")
    if config is not None:
        return replace(config, **overrides)
    if missing := [name for name in ("hook", "out") if name not in overrides]:
        raise SteersmanError(f"cache_activations needs {' and '.join(missing)}")
    if isinstance(overrides["out"], os.PathLike):
        overrides = {**overrides, "out": os.fspath(overrides["out"])}
    return CacheConfig(**overrides)


def _manifest(lm: "LanguageModel", text: TextSource, config: CacheConfig, settings: CaptureSettings) -> Manifest:
    """The empty store's manifest; its `config` holds all that decides what the rows are, and nothing else."""
    content = {
        "source": "text",
        "text": text.identity(),
        "revision": lm.revision,
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "tokens": config.tokens,
        "context_length": settings.context_length,
        "packing": settings.packing,
        "batch_size": settings.batch_size,
        "excluded_tokens": list(settings.excluded),
        "shard_rows": config.shard_rows,
    }
    if lm.quantization is not None:
        content["quantization"] = lm.quantization
    hooks = {hook: lm.hook_width(hook) for hook in settings.hooks}
    return Manifest(model_name=lm.name, dtype=config.dtype, hooks=hooks, config=content)


def _check_disk(
    lm: "LanguageModel",
    text: TextSource,
    config: CacheConfig,
    settings: CaptureSettings,
    writer: StoreWriter | SharedStore,
) -> None:
    """Say how large the store will be; `SteersmanError` when the disk has no room for it."""
    limits = [n for n in (config.tokens, expected_tokens(lm, text, settings)) if n is not None]
    free = shutil.disk_usage(writer.folder).free
    if not limits:
        log.info("the text's length is unknown: %s free for the store at %s", format_bytes(free), writer.folder)
        return
    row = sum(writer.manifest.hooks.values()) * DTYPES[config.dtype][0].itemsize + ROW_BYTES
    rows = max(min(limits) - writer.n_rows, 0)
    needed = rows * row
    log.info(
        "caching about %s tokens: %s to write, %s free at %s",
        f"{rows:,}",
        format_bytes(needed),
        format_bytes(free),
        writer.folder,
    )
    if needed > free:
        raise SteersmanError(
            f"{writer.folder}: the store needs {format_bytes(needed)} more and the disk has {format_bytes(free)} free; "
            "free space, cache fewer tokens, or choose another place"
        )


def _fill(
    writer: StoreWriter, lm: "LanguageModel", text: TextSource, config: CacheConfig, settings: CaptureSettings
) -> None:
    """Run the model until the store is full or the text ends, and write what it gives, in a thread where one helps."""
    shards = writer.manifest.shards
    sent = writer.n_rows
    pending: deque[Future[None]] = deque()
    pool = beside_model(lm, "steersman-write")
    bar = progress(desc="caching", total=config.tokens, initial=sent, unit="tok", unit_scale=True)
    try:
        with bar, closing(captured_rows(lm, text, settings, shards[-1].cursor if shards else None)) as batches:
            for rows in batches:
                append = partial(
                    writer.append,
                    rows.activations,
                    rows.token_ids,
                    rows.doc_ids,
                    rows.positions,
                    cursor=rows.cursor,
                    show_token=partial(show_token, lm),
                )
                pending.append(pool.submit(append))
                sent += len(rows.token_ids)
                bar.update(len(rows.token_ids))
                if config.tokens is not None and sent >= config.tokens:
                    while pending:  # rows that are not finite may have been skipped: count what is there
                        pending.popleft().result()
                    sent = writer.n_rows
                    if writer.full:
                        break
                while len(pending) > _WRITES_AHEAD:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if config.tokens is not None and not writer.full:
        log.warning("%s: the text ended after %d of the %d tokens asked for", text.name, writer.n_rows, config.tokens)
