"""Files of steering vectors: safetensors whose tensors are named by hook point, with the provenance in the header.

The rules: every tensor is a direction in fp32, [D] or [P, D], under the name of its hook point. The header's metadata
holds `format` = `steersman.vector`, `version` = `1` and `provenance`, a JSON object with `model_name`, `method`
and `metadata`. A file with another format or a later version is refused; so are numbers that are not finite.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_whole
from steersman.steer.vectors.vector import SteeringVector

FORMAT, VERSION = "steersman.vector", 1


def writer_and_reader(path: Path) -> tuple[Callable[[SteeringVector, Path], None], Callable[[Path], SteeringVector]]:
    """How a vector is written to and read from `path`, by its ending."""
    if path.suffix.lower() == ".gguf":
        from steersman.steer.vectors.gguf import read_gguf, write_gguf

        return _prepared(write_gguf), _found(read_gguf)
    return _prepared(write), _found(read)


def _prepared(write: Callable[[SteeringVector, Path], None]) -> Callable[[SteeringVector, Path], None]:
    def prepared(v: SteeringVector, path: Path) -> None:
        make_parent(path)
        write(v, path)

    return prepared


def _found(read: Callable[[Path], SteeringVector]) -> Callable[[Path], SteeringVector]:
    def found(path: Path) -> SteeringVector:
        if not path.is_file():
            missing = "no such file" if not path.exists() else "a folder, not a vector file"
            raise SteersmanError(f"{path}: {missing}")
        return read(path)

    return found


def write(v: SteeringVector, path: Path) -> None:
    """Write the vector to `path`, atomically."""
    header = {"format": FORMAT, "version": str(VERSION), "provenance": json.dumps(v.provenance())}
    write_whole(path, lambda temporary: _save(v.directions, temporary, header))


def _save(directions: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    try:
        save_file(directions, path, metadata=header)
    except SafetensorError as error:  # safetensors wraps what the system said
        raise SteersmanError(f"{path.parent} cannot be written to: {error}") from error


def make_parent(path: Path) -> None:
    """Make the folder of `path`. Raises SteersmanError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteersmanError(f"{path.parent} cannot be made: {error.strerror}") from error


def read(path: Path) -> SteeringVector:
    """Read the vector in `path`. Raises SteersmanError, naming the file, when it holds none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            check_header(path, header)
            directions = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error
    known = _provenance(path, header)
    try:
        return SteeringVector(directions=directions, **known)
    except SteersmanError as error:
        raise SteersmanError(f"{path}: {error}") from None


def check_header(path: Path, header: dict[str, str]) -> None:
    """Raise SteersmanError unless the header says that this is a vector this version can read."""
    if header.get("format") != FORMAT:
        found = header.get("format", "no format of ours")
        raise SteersmanError(f"{path} is a safetensors file but no steering vector: its header names {found}")
    version = header.get("version", "")
    if not version.isdecimal() or not 1 <= int(version) <= VERSION:
        raise SteersmanError(f"{path} is a steering vector of version {version!r}; this program reads up to {VERSION}")


def _provenance(path: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        known = json.loads(header["provenance"])
        model_name, method, metadata = known["model_name"], known["method"], known["metadata"]
    except (KeyError, ValueError, TypeError) as error:
        raise SteersmanError(f"{path}: the provenance in its header cannot be read ({error!r})") from error
    if not (isinstance(model_name, str) and isinstance(method, str) and isinstance(metadata, dict)):
        raise SteersmanError(f"{path}: the provenance in its header has values of the wrong type")
    return {"model_name": model_name, "method": method, "metadata": metadata}
