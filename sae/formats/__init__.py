"""SAE files of every public format, one file a format; `load` finds out which it is.

To add one, write a `Format` with its layout and source in the docstring; one of this package is named in `_MODULES`.
No two formats recognise the same files.
"""

import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from steersman.errors import SteersmanError
from steersman.reading import one_error
from steersman.sae.base import SAE
from steersman.sae.feature_labels import LABELS, FeatureLabels
from steersman.sae.formats.base import Format, Parts, build, recognise
from steersman.sae.formats.source import open_source

__all__ = ["Format", "Parts", "convert", "load", "open_source", "recognise"]

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
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    format: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """Read an SAE from a folder, a file, or the hub (`repo-id[/subfolder][@revision]`), in any format of
    `steersman.sae.formats`; `format` names one where the files alone would mean another.

    Weights go to `device` as `dtype`, block by block, so that a file of a million features is never held twice.
    Raises SteersmanError for what is no SAE, saying what was found, and for files that are malformed.
    """
    source = open_source(path)
    with one_error(source.label):
        layout = recognise(source, format)
        parts = layout.read(source)
        sae = build(parts, torch.device(device), dtype)
        if source.only is None and source.has(LABELS):
            sae.labels = FeatureLabels.load(source.path(LABELS))
            sae.labels.check(sae.cfg, str(source.path(LABELS)))
    if not parts.native or "repo_id" in source.origin:
        origin = {"format": layout.name, **source.origin}
        sae.cfg = replace(sae.cfg, metadata={**sae.cfg.metadata, "origin": origin})
    for warning in parts.warnings:
        log.warning("%s: %s", source.label, warning)
    return sae


def convert(source: str | Path | SAE, target: str | Path, *, to: str, format: str | None = None) -> SAE:
    """Write an SAE, or the one at `source` (read as `SAE.load` does), to the folder `target` in the format `to`.

    The codes and reconstructions of the result equal the source's. Raises SteersmanError, and writes nothing, where the
    format cannot express what the SAE computes, and where the folder is not empty. Returns the SAE.
    """
    written = [name for name, known in Format.registry.items() if type(known).write is not Format.write]
    if to not in written:
        raise SteersmanError(f"cannot write the format {to!r}; can write {', '.join(written)}")
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SteersmanError(f"{path} exists and is not an empty folder: name a new one")
    sae = source if isinstance(source, SAE) else load(source, format=format)
    Format.registry[to].write(sae, path)
    return sae
