"""Progress bars for work that a person waits for."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None, *, desc: str, total: int | None = None, shown: bool = True, **options: Any
) -> tqdm:
    """A tqdm bar on standard error: silent when `STEERSMAN_PROGRESS=0` or not to be `shown` (on ranks other than 0),
    slow-ticking when nobody watches a terminal."""
    options.setdefault("mininterval", 0.2 if sys.stderr.isatty() else 10.0)
    options.setdefault("dynamic_ncols", True)
    silent = not shown or os.environ.get("STEERSMAN_PROGRESS") == "0"
    return tqdm(iterable, desc=desc, total=total, disable=silent, **options)
