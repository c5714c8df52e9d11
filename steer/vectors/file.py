"""Files of steering vectors: safetensors whose tensors are named by hook point, with the provenance in the header.

The rules: every tensor is a direction in fp32, [D] or [P, D], under the name of its hook point. The header's metadata
holds `format` = `steersman.vector`, `version` = `1` and `provenance`, a JSON object with `model_name`, `method`
and `metadata`. Where the rows of [P, D] are generated steps and not positions, the version is `2` and the provenance
has `per` = `step`: a program that knows positions only does not take them for those. A file with another format or a
later version is refused; so are numbers that are not finite, and content that does not have the checksum it was written
with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from steersman.errors import SteersmanError
from steersman.reading import parse_json
from steersman.tensor_files import check_format, load_tensors, save_tensors

FORMAT, VERSION = "steersman.vector", 2


class Parts(NamedTuple):
    """A steering vector as files hold it."""

    directions: dict[str, Tensor]
    """Hook point -> [D] or [P, D]."""
    provenance: Mapping[str, Any]
    """`model_name`, `method` and `metadata`, and `per` of a table of steps."""


def write(parts: Parts, path: Path) -> None:
    """Write the vector to `path`, whole or not at all."""
    version = 1 if parts.provenance.get("per", "position") == "position" else VERSION
    header = {"format": FORMAT, "version": str(version), "provenance": json.dumps(parts.provenance)}
    save_tensors(path, parts.directions, header)


def read(path: Path) -> Parts:
    """Read the vector in `path`. Raises SteersmanError, naming the file, when it holds none."""
    directions, header = load_tensors(path)
    check_format(path, header, FORMAT, VERSION, "steering vector")
    return Parts(directions, _provenance(path, header))


def _provenance(path: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        known = parse_json(header["provenance"], f"{path}: the provenance in its header")
        model_name, method, metadata = known["model_name"], known["method"], known["metadata"]
        per = known.get("per", "position")
    except (KeyError, TypeError) as error:
        raise SteersmanError(f"{path}: the provenance in its header cannot be read ({error!r})") from error
    if not (all(isinstance(text, str) for text in (model_name, method, per)) and isinstance(metadata, dict)):
        raise SteersmanError(f"{path}: the provenance in its header has values of the wrong type")
    return {"model_name": model_name, "method": method, "metadata": metadata, "per": per}
