"""Small stores and texts that several test modules of `steersman.train` use."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.train import ActivationStore

HOOK = "blocks.1.hook_resid_post"


def word_documents(n: int, seed: int = 0, longest: int = 60, shortest: int = 1) -> list[str]:
    """Documents of random words that the tokenizer of `tiny_models` knows, of `shortest` to `longest` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(4, 61, rng.integers(shortest, longest + 1))) for _ in range(n)]


def random_rows(n: int, width: int, seed: int = 0) -> torch.Tensor:
    """[n, width] bfloat16 rows that differ from one another."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def store_of(
    x: torch.Tensor, out: Path, *, shard_rows: int = 100, document_rows: int = 7, **options: Any
) -> ActivationStore:
    """A store of the rows `x` in batches of odd sizes; each document has `document_rows` rows."""

    def batches() -> Iterator[dict[str, Any]]:
        start = 0
        for size in np.random.default_rng(0).integers(1, 90, len(x)):
            stop = min(start + size, len(x))
            if start < stop:
                rows = np.arange(start, stop)
                yield {"x": x[start:stop], "doc_ids": rows // document_rows, "token_ids": rows % 50, "positions": rows}
            start = stop

    return ActivationStore.from_tensors(batches(), out, HOOK, shard_rows=shard_rows, **options)


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file in `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
