"""GGUF control vectors, as llama.cpp (`--control-vector`) and repeng read and write them; writing needs the `gguf`
package.

The rules: `general.architecture` is `controlvector`; `controlvector.model_hint` names the model's type (`llama`,
`gemma2`); `controlvector.layer_count` is the number of directions. The tensor `direction.N` [D] is added to the output
of block N, our `blocks.N.hook_resid_post`. llama.cpp has no direction 0, so a vector at block 0 cannot be written. Our
provenance is in `steersman.provenance` and a checksum of the file in `steersman.crc32`, which other programs pass over.
Other fields `controlvector.*` are kept in the metadata; one that says what is done with the directions is refused
unless it says that they are added.
"""

import json
import logging
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_whole
from steersman.lm.origin import canonical_hook
from steersman.reading import one_error, parse_json, shown
from steersman.steer.vectors.file import Parts
from steersman.steer.vectors.gguf_file import GGUFFile, read_file

log = logging.getLogger(__name__)

ARCHITECTURE, PROVENANCE, CHECKSUM = "controlvector", "steersman.provenance", "steersman.crc32"
_UNSET = "0" * 8
_ADDED = ("add", "added", "addition", "sum")
_KNOWN = {f"{ARCHITECTURE}.{name}" for name in ("model_hint", "layer_count")}


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise SteersmanError('GGUF files need the gguf package: pip install "steersman[gguf]"') from None
    return gguf


def write_gguf(parts: Parts, path: Path) -> None:
    """Write a control vector, whole or not at all. Raises SteersmanError where the format cannot hold the vector."""
    gguf = _package()
    directions: dict[int, Tensor] = {}
    for hook, direction in parts.directions.items():
        layer = _layer(hook)
        if direction.ndim != 1:
            raise SteersmanError(
                "a GGUF control vector is the same at every position: use .mean_over_positions() first"
            )
        directions[layer] = direction + directions[layer] if layer in directions else direction

    def save(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(parts.provenance["metadata"].get("model_type", "")))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        writer.add_string(PROVENANCE, json.dumps(parts.provenance))
        writer.add_string(CHECKSUM, _UNSET)
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = temporary.read_bytes()
        place = _place_of_sum(content)
        assert place is not None
        with open(temporary, "rb+") as file:
            file.seek(place)
            file.write(f"{zlib.crc32(content):08x}".encode())

    write_whole(path, save)


def _layer(hook: str) -> int:
    """The block whose output a hook point is: by its own name, by its module path, or as the next block's input."""
    name = canonical_hook(hook)
    place = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", name)
    layer = -1 if place is None else int(place[1]) - (place[2] == "pre")
    if layer < 1:
        raise SteersmanError(
            f"a GGUF control vector holds outputs of blocks from 1 on (blocks.1.hook_resid_post, ...), not {hook}"
        )
    return layer


def read_gguf(path: Path) -> Parts:
    """Read a control vector. Raises SteersmanError, naming the file, for another architecture or a damaged file."""
    with one_error(path):
        return _parts(path, read_file(path))


def _parts(path: Path, file: GGUFFile) -> Parts:
    fields = file.fields
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise SteersmanError(f"{path} holds a model of architecture {shown(architecture)}, not a control vector")
    _check_sum(path, file)
    directions: dict[str, Tensor] = {}
    for name in file.tensors:
        layer = re.fullmatch(r"direction\.(\d{1,6})", name, re.ASCII)
        if layer is None:
            raise SteersmanError(
                f"{path}: a control vector's tensors are direction.1, direction.2, ...; found {shown(name)}"
            )
        hook = f"blocks.{int(layer[1])}.hook_resid_post"
        shape = file.tensors[name].shape
        if len(shape) != 1 or hook in directions:
            raise SteersmanError(f"{path}: {name} has shape {list(shape)}; a direction has one dimension, and is one")
        directions[hook] = torch.from_numpy(file.read(name))
    widths = sorted({len(d) for d in directions.values()})
    if len(widths) > 1:
        raise SteersmanError(f"{path}: its directions have different widths: {', '.join(map(str, widths))}")
    own = fields.get(PROVENANCE)
    known = _provenance(path, own) if own is not None else None
    known = known or {"model_name": "", "method": "gguf", "metadata": {"file": path.name, **_others(path, fields)}}
    hint = fields.get(f"{ARCHITECTURE}.model_hint")
    if isinstance(hint, str) and hint:
        known["metadata"]["model_type"] = hint
    return Parts(directions, known)


def _provenance(path: Path, text: Any) -> dict[str, Any]:
    where = f"{path}: its {PROVENANCE}"
    if not isinstance(text, str):
        raise SteersmanError(f"{where} is no text")
    own = parse_json(text, where)
    try:
        known = {"model_name": own["model_name"], "method": own["method"], "metadata": dict(own["metadata"])}
    except (KeyError, TypeError, ValueError) as error:
        raise SteersmanError(f"{where} cannot be read ({error!r})") from error
    if not isinstance(known["model_name"], str) or not isinstance(known["method"], str):
        raise SteersmanError(f"{where} has values of the wrong type")
    return known


def _others(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """What another program says of the vector beyond what is read here."""
    found = {}
    for name, value in fields.items():
        if not name.startswith(f"{ARCHITECTURE}.") or name in _KNOWN:
            continue
        short = name.removeprefix(f"{ARCHITECTURE}.")
        if re.search(r"operation|mode|op$|type$", short) and str(value).lower() not in _ADDED:
            raise SteersmanError(
                f"{path}: {name} is {shown(value)}, and here control vectors are added; it is not read as one"
            )
        found[short] = value
    if found:
        log.warning("%s: %s is kept in the metadata and changes nothing", path, ", ".join(found))
    return found


def _place_of_sum(content: bytes) -> int | None:
    """Where the file's checksum stands: after its name, a type and a length."""
    name = CHECKSUM.encode()
    start = content.find(len(name).to_bytes(8, "little") + name)
    return None if start < 0 else start + 8 + len(name) + 4 + 8


def _check_sum(path: Path, file: GGUFFile) -> None:
    texts = [name for name, value in file.fields.items() if re.fullmatch("[0-9a-f]{8}", str(value))]
    if CHECKSUM not in file.fields and not any(len(name) == len(CHECKSUM) for name in texts):  # under a damaged name
        return
    content, place = bytearray(file.content), _place_of_sum(file.content)
    if place is not None:
        content[place : place + 8] = _UNSET.encode()
    if file.fields.get(CHECKSUM) != f"{zlib.crc32(content):08x}":
        raise SteersmanError(
            f"{path} is damaged: its content does not have the checksum that it was written with; restore it, or make "
            "it again"
        )
