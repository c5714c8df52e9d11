"""Files of effect maps: safetensors whose header holds the rest as JSON.

The rules: tensors `M` [D, L], `b`, `signal`, `noise`, `r2`, `ceiling`, `baseline_mean`, `baseline_standard_error` [L],
all fp32. The header's metadata holds `format` = `steersman.effect_map`, `version` = `1` and `about`, a JSON object with
`model_name`, `hook_name`, `sae`, `median_norm` and `provenance`.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import write_whole
from steersman.steer.effects.folder import Baseline
from steersman.steer.effects.map import EffectMap

FORMAT, VERSION = "steersman.effect_map", 1
NAME = "map.safetensors"
"""Its name inside a folder of effects."""
_COLUMNS = ("b", "signal", "noise", "r2", "ceiling")


def write(m: EffectMap, path: Path) -> None:
    """Write the map to `path`, atomically; folders on the way are made."""
    tensors = {"M": m.M, **{name: getattr(m, name) for name in _COLUMNS}}
    tensors |= {"baseline_mean": m.baseline.mean, "baseline_standard_error": m.baseline.standard_error}
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    about = {
        "model_name": m.model_name,
        "hook_name": m.hook_name,
        "sae": dict(m.sae),
        "median_norm": m.baseline.median_norm,
        "provenance": dict(m.provenance),
    }
    header = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    except OSError as error:
        raise SteersmanError(f"{path.parent} cannot be made: {error.strerror}") from error
    except SafetensorError as error:  # safetensors wraps what the system said
        raise SteersmanError(f"{path} could not be written: {error}") from error


def read(path: Path) -> EffectMap:
    """Read the map at `path`. Raises SteersmanError, naming the file, when it holds none."""
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise SteersmanError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                found = header.get("format", "no format of ours")
                raise SteersmanError(f"{path} is a safetensors file but no effect map: its header names {found}")
            if header.get("version") != str(VERSION):
                raise SteersmanError(
                    f"{path} is an effect map of version {header.get('version')}; this program reads {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return _build(path, tensors, json.loads(header["about"]))
    except (SafetensorError, OSError) as error:
        raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise SteersmanError(f"{path}: the map in it cannot be read ({error!r})") from error


def _build(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> EffectMap:
    M = tensors["M"]
    columns = {name: tensors[name] for name in _COLUMNS}
    mean, standard_error = tensors["baseline_mean"], tensors["baseline_standard_error"]
    if M.ndim != 2 or any(c.shape != M.shape[1:] for c in (*columns.values(), mean, standard_error)):
        raise SteersmanError(f"{path}: the shapes of its tensors contradict each other")
    if not bool(M.isfinite().all()) or not bool(columns["b"].isfinite().all()):
        raise SteersmanError(f"{path}: M or b holds values that are not finite")
    return EffectMap(
        M=M,
        **columns,
        baseline=Baseline(mean, standard_error, float(about["median_norm"])),
        model_name=about["model_name"],
        hook_name=about["hook_name"],
        sae=about["sae"],
        provenance=about["provenance"],
    )
