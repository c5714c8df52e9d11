"""GGUF control vectors, as llama.cpp (`--control-vector`) and repeng read and write them; needs the `gguf` package.

The rules: `general.architecture` is `controlvector`; `controlvector.model_hint` names the model's type (`llama`,
`gemma2`); `controlvector.layer_count` is the number of directions. The tensor `direction.N` [D] is added to the output
of block N, our `blocks.N.hook_resid_post`. llama.cpp has no direction 0, so a vector at block 0 cannot be written. Our
provenance is in `steersman.provenance`, which other programs pass over.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steersman.errors import SteersmanError
from steersman.files import write_whole
from steersman.steer.vectors.file import Parts

ARCHITECTURE, PROVENANCE = "controlvector", "steersman.provenance"


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise SteersmanError('GGUF files need the gguf package: pip install "steersman[gguf]"') from None
    return gguf


def write_gguf(parts: Parts, path: Path) -> None:
    """Write a control vector, whole or not at all. Raises SteersmanError where the format cannot hold the vector."""
    gguf = _package()
    directions = {}
    for hook, direction in parts.directions.items():
        place = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook)
        if place is None or int(place[1]) == 0:
            raise SteersmanError(
                f"a GGUF control vector holds outputs of blocks from 1 on (blocks.1.hook_resid_post, ...), not {hook}"
            )
        if direction.ndim != 1:
            raise SteersmanError(
                "a GGUF control vector is the same at every position: use .mean_over_positions() first"
            )
        directions[int(place[1])] = direction.numpy()

    def save(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(parts.provenance["metadata"].get("model_type", "")))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        writer.add_string(PROVENANCE, json.dumps(parts.provenance))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, save)


def read_gguf(path: Path) -> Parts:
    """Read a control vector. Raises SteersmanError, naming the file, for another architecture or a damaged file."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, NotImplementedError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SteersmanError(f"{path} is damaged or not a GGUF file: {reason}") from error
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise SteersmanError(f"{path} holds a model of architecture {architecture!r}, not a control vector")
    directions = {}
    for name, data in tensors.items():
        layer = re.fullmatch(r"direction\.(\d+)", name)
        if layer is None:
            raise SteersmanError(
                f"{path}: a control vector's tensors are direction.1, direction.2, ...; found {name!r}"
            )
        direction = torch.from_numpy(np.array(data, dtype=np.float32)).flatten()
        directions[f"blocks.{layer[1]}.hook_resid_post"] = direction
    widths = sorted({len(d) for d in directions.values()})
    if len(widths) > 1:
        raise SteersmanError(f"{path}: its directions have different widths: {', '.join(map(str, widths))}")
    known = {"model_name": "", "method": "gguf", "metadata": {"file": path.name}}
    try:
        own = json.loads(fields[PROVENANCE])
        known = {"model_name": str(own["model_name"]), "method": str(own["method"]), "metadata": dict(own["metadata"])}
    except (KeyError, ValueError, TypeError):
        pass  # another program's file
    hint = fields.get(f"{ARCHITECTURE}.model_hint")
    if isinstance(hint, str) and hint:
        known["metadata"]["model_type"] = hint
    return Parts(directions, known)
