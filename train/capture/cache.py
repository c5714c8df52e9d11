"""Caching: run a model over text once and keep its activations on disk.

Who writes depends on who runs the model. One process writes its rows as they come, and of the ranks that run a
tensor-parallel model together rank 0 does (`lockstep.py`). Ranks with a whole model each write a part of the shards
each (`parallel_cache.py`).
"""

import logging
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steersman.config import merged
from steersman.deprecation import renamed_fields
from steersman.errors import LostRankError, SteersmanError
from steersman.files import format_bytes
from steersman.lm import LanguageModel
from steersman.parallel import Mesh, Ranks, process_group, rank_and_world_size, use_local_accelerator
from steersman.train.capture.capture import Capture, CaptureConfig
from steersman.train.capture.lockstep import cache_in_lockstep
from steersman.train.capture.parallel_cache import cache_on_ranks
from steersman.train.capture.shared_store import SharedStore, has_parts
from steersman.train.store.folder import CheckText
from steersman.train.store.growth import reopen
from steersman.train.store.manifest import LABELS, MANIFEST, Manifest
from steersman.train.store.shards import DTYPES
from steersman.train.store.statistics import SKIP_NEEDS_ONE_PROCESS
from steersman.train.store.store import ActivationStore
from steersman.train.store.writer import ROW_BYTES, StoreWriter

log = logging.getLogger(__name__)


@renamed_fields(model_dtype="dtype")
@dataclass(frozen=True, kw_only=True)
class CacheConfig(CaptureConfig):
    """What to cache, from which text, and where. `steersman cache` takes the same names as flags."""

    out: str
    """Folder for the store. An unfinished store is resumed, a finished one returned; the configuration must match."""
    tokens: int | None = 1_000_000
    """Rows to cache, counted after tokens are left out; None for the whole text."""
    label_column: str | None = None
    """Field of .jsonl, .parquet and dataset records that holds a label: 1, 0, or -1 where it is not known, of the text
    or (a list) of each of its tokens. It is stored beside every row, for a supervised latent."""
    shard_rows: int = 131_072
    """Rows of a shard. An interruption loses the unfinished shard."""
    extend: bool = False
    """Let a store that is there grow to `tokens`. It then has the bytes of one that was cached at once."""
    tensor_parallel: bool = False
    """With several processes (torchrun): split every layer of the model over them, instead of giving each a part of the
    text."""
    timeout_seconds: float = 600.0
    """With several processes (torchrun): how long none of them may be at work before the others stop waiting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.tokens < 1:
            raise SteersmanError(f"tokens {self.tokens} must be at least 1; leave it None for the whole text")
        if self.shard_rows < 1:
            raise SteersmanError(f"shard_rows {self.shard_rows} must be at least 1")


def cache_activations(
    lm: LanguageModel | None = None, texts: Any = None, config: CacheConfig | None = None, **overrides: Any
) -> ActivationStore:
    """Run a model over text and write its activations at one or several hook points to a store.

    Shards are written while the model runs. An interrupted call is resumed by the same call after the last finished
    shard, and leaves the same bytes as an uninterrupted one (on the same device and number of threads). Memory does not
    grow with the number of tokens. Started by `torchrun`, each process writes a part of the shards, and the store is
    the same. The processes of a tensor-parallel model run it together, and rank 0 writes.

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
    config = merged(CacheConfig, config, overrides)
    together = config.tensor_parallel and rank_and_world_size()[1] > 1
    with process_group(config.timeout_seconds) if together else nullcontext():
        rank, n_ranks = rank_and_world_size()
        if n_ranks > 1:
            use_local_accelerator()
        capture = Capture.open(
            lm, texts, config, tensor_parallel=config.tensor_parallel, label_column=config.label_column
        )
        out, manifest = Path(config.out), _manifest(capture, config)
        shared = n_ranks > 1 or has_parts(out)
        if shared and config.on_nonfinite == "skip":
            raise SteersmanError(SKIP_NEEDS_ONE_PROCESS)
        check_disk = partial(_check_disk, capture, config)
        limits: dict[str, Any] = {
            "shard_rows": config.shard_rows, "max_rows": config.tokens, "check_text": capture.text.check,
        }  # fmt: skip
        if config.extend:
            _extend(out, manifest, config, rank, capture.text.check)
        if shared and not capture.lm.tensor_parallel:
            store = SharedStore(out, manifest, rank=rank, **limits)
            cache_on_ranks(store, capture, check_disk, n_ranks=n_ranks, timeout_seconds=config.timeout_seconds)
        else:
            open_writer = partial(StoreWriter.begin, out, manifest, on_nonfinite=config.on_nonfinite, **limits)
            with Ranks(Mesh(latent=n_ranks, rank=rank), config.timeout_seconds) as ranks:
                cache_in_lockstep(capture, config.tokens, ranks, open_writer, check_disk)
        return ActivationStore.open(out, verify=False)


def _extend(out: Path, manifest: Manifest, config: CacheConfig, rank: int, check_text: CheckText) -> None:
    """On rank 0: `reopen`. The others wait until it is done."""
    if rank == 0:
        reopen(out, manifest, shard_rows=config.shard_rows, check_text=check_text)
        return
    end = time.monotonic() + config.timeout_seconds
    while (out / MANIFEST).exists() and Manifest.load(out).config.get("tokens") != config.tokens:
        if time.monotonic() > end:
            raise LostRankError(f"{out}: rank 0 does not extend this store; run the whole command again")
        time.sleep(0.1)


def _manifest(capture: Capture, config: CacheConfig) -> Manifest:
    """The empty store's manifest; its `config` holds all that decides what the rows are, and nothing else."""
    lm, settings = capture.lm, capture.settings
    content = {
        "source": "text",
        "text": capture.text.identity(),
        "revision": lm.revision,
        "model_digest": lm.digest(),
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "tokens": config.tokens,
        "context_length": settings.context_length,
        "packing": settings.packing,
        "batch_size": settings.batch_size,
        "excluded_tokens": list(settings.excluded),
        "bos_token": settings.bos_id,
        "shard_rows": config.shard_rows,
    }
    if config.label_column is not None:
        content[LABELS] = config.label_column
    if lm.quantization is not None:
        content["quantization"] = lm.quantization
    content |= capture.chat
    hooks = {hook: lm.hook_width(hook) for hook in settings.hooks}
    return Manifest(model_name=lm.name, dtype=config.rows_dtype, hooks=hooks, config=content)


def _check_disk(capture: Capture, config: CacheConfig, writer: StoreWriter | SharedStore) -> None:
    """Say how large the store will be; `SteersmanError` when the disk has no room for it."""
    limits = [n for n in (config.tokens, capture.expected_rows()) if n is not None]
    free = shutil.disk_usage(writer.folder).free
    if not limits:
        log.info("the text's length is unknown: %s free for the store at %s", format_bytes(free), writer.folder)
        return
    row = sum(writer.manifest.hooks.values()) * DTYPES[config.rows_dtype][0].itemsize + ROW_BYTES
    rows = max(min(limits) - writer.n_rows, 0)
    needed = rows * row
    room = f"{format_bytes(free)} free"
    log.info("caching about %s tokens: %s to write, %s at %s", f"{rows:,}", format_bytes(needed), room, writer.folder)
    if needed > free:
        raise SteersmanError(
            f"{writer.folder}: the store needs {format_bytes(needed)} more and the disk has {room}; "
            "free space, cache fewer tokens, or choose another place"
        )
