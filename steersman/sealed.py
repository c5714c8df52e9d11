"""JSON objects that carry a checksum of themselves, so that a changed character is noticed when they are read.

The entry `crc32` is the CRC-32 of the object's other entries, written without spaces and sorted by name: how a file is
indented, or in what order its entries stand, does not matter. Objects of earlier versions have none and are read as
they are.
"""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

from steersman.errors import SteersmanError

__all__ = ["seal", "unseal"]

CHECKSUM = "crc32"


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with its checksum as a last entry.

    >>> seal({"b": 1, "a": [2.5]})
    {'b': 1, 'a': [2.5], 'crc32': 'cefc5eb3'}
    """
    return {**data, CHECKSUM: _crc(data)}


def unseal(data: Mapping[str, Any], where: str | os.PathLike[str]) -> dict[str, Any]:
    """`data` without its checksum. Raises SteersmanError, naming `where` it stands, when it has another one than its
    content; without one it is taken as it is."""
    content = {name: value for name, value in data.items() if name != CHECKSUM}
    try:
        intact = CHECKSUM not in data or data[CHECKSUM] == _crc(content)
    except RecursionError:
        raise SteersmanError(f"{where}: the JSON in it is nested too deeply") from None
    if not intact:
        raise SteersmanError(
            f"{where} was changed or is damaged: its content does not have the checksum that it was written with; "
            f"restore it, or take out its {CHECKSUM} where it was changed on purpose"
        )
    return content


def _crc(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{zlib.crc32(text.encode()):08x}"
