"""SAE files of every public format, one file a format; `load` finds out which it is.

To add one, write a `Format` with its layout and source in the docstring, and name its module in `_MODULES`. No two
formats recognise the same files.
"""

import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from steersman.sae.base import SAE
from steersman.sae.formats.base import Format, build, recognise
from steersman.sae.formats.source import open_source

__all__ = ["Format", "load", "open_source", "recognise"]

log = logging.getLogger(__name__)

_MODULES = (
    "saelens",
    "sparsify",
    "dictionary_learning",
    "gemma_scope",
    "gemma_scope_2",
    "llama_scope",
    "llamascopium",
    "openai",
)
for _module in _MODULES:
    import_module(f"{__name__}.{_module}")


def load(
    path: str | Path, device: torch.device, *, format: str | None = None, dtype: torch.dtype = torch.float32
) -> SAE:
    """See `SAE.load`."""
    source = open_source(path)
    found = recognise(source, format)
    parts = found.read(source)
    sae = build(parts, device, dtype)
    if not parts.native or "repo_id" in source.origin:
        origin = {"format": found.name, **source.origin}
        sae.cfg = replace(sae.cfg, metadata={**sae.cfg.metadata, "origin": origin})
    for warning in parts.warnings:
        log.warning("%s: %s", source.label, warning)
    return sae
