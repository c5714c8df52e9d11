"""From any format to one that another library opens."""

from pathlib import Path

import torch

from steersman.errors import SteersmanError
from steersman.sae.base import SAE
from steersman.sae.formats.base import Format

TARGETS = ("saelens", "sparsify", "dictionary_learning")


def convert(source: str | Path | SAE, target: str | Path, *, to: str, format: str | None = None) -> SAE:
    """Write an SAE, or the one at `source` (read as `SAE.load` does), to the folder `target` in the format `to`.

    The codes and reconstructions of the result equal the source's. Raises SteersmanError, and writes nothing, where the
    format cannot express what the SAE computes, and where the folder is not empty. Returns the SAE.
    """
    if to not in TARGETS:
        raise SteersmanError(f"cannot write the format {to!r}; can write {', '.join(TARGETS)}")
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SteersmanError(f"{path} exists and is not an empty folder: name a new one")
    sae = source if isinstance(source, SAE) else SAE.load(source, torch.device("cpu"), format=format)
    Format.registry[to].write(sae, path)
    return sae
