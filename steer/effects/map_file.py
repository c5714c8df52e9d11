"""Files of effect maps: safetensors whose header holds the rest as JSON.

The rules: tensors `M` [D, L], `b`, `signal`, `noise`, `r2`, `ceiling`, `baseline_mean`, `baseline_standard_error` [L],
all fp32. The header's metadata holds `format` = `steersman.effect_map`, `version` = `1` and `about`, a JSON object with
`model_name`, `hook_name`, `sae`, `median_norm` and `provenance`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import make_folder, write_whole

FORMAT, VERSION = "steersman.effect_map", 1
NAME = "map.safetensors"
"""Its name inside a folder of effects."""
COLUMNS = ("b", "signal", "noise", "r2", "ceiling", "baseline_mean", "baseline_standard_error")
ABOUT = ("model_name", "hook_name", "sae", "median_norm", "provenance")


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a map to `path`, whole or not at all; folders on the way are made."""
    data = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)}
    make_folder(path.parent)
    write_whole(path, lambda temporary: save_file(data, temporary, metadata=header))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the map at `path` and what is known about it. Raises SteersmanError, naming the file, when it
    holds none, or one that contradicts itself."""
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise SteersmanError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                named = header.get("format", "no format of ours")
                raise SteersmanError(f"{path} is a safetensors file but no effect map: its header names {named}")
            if header.get("version") != str(VERSION):
                raise SteersmanError(
                    f"{path} is an effect map of version {header.get('version')}; this program reads {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in ("M", *COLUMNS)}
        about = {name: json.loads(header["about"])[name] for name in ABOUT}
        about["median_norm"] = float(about["median_norm"])
    except (KeyError, TypeError, ValueError) as error:
        raise SteersmanError(f"{path}: the map in it cannot be read ({error!r})") from error
    except (SafetensorError, OSError) as error:
        raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error
    M = tensors["M"]
    if M.ndim != 2 or any(tensors[name].shape != M.shape[1:] for name in COLUMNS):
        raise SteersmanError(f"{path}: the shapes of its tensors contradict each other")
    if not bool(M.isfinite().all()) or not bool(tensors["b"].isfinite().all()):
        raise SteersmanError(f"{path}: M or b holds values that are not finite")
    return tensors, about
