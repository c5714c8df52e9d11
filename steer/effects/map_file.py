"""Files of effect maps: safetensors whose header holds the rest as JSON, with a checksum of the whole.

The rules: tensors `M` [D, L], `b`, `signal`, `noise`, `r2`, `ceiling`, `baseline_mean`, `baseline_standard_error` [L],
and, of maps measured by gradients, `metric` [D, D], all fp32. The header's metadata holds `format` =
`steersman.effect_map`, `version` = `1` and `about`, a JSON object with `model_name`, `hook_name`, `sae`, `median_norm`
and `provenance`. Files of earlier versions have no checksum.
"""

from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import make_folder
from steersman.reading import parse_json
from steersman.tensor_files import load_tensors, save_tensors

FORMAT, VERSION = "steersman.effect_map", 1
NAME = "map.safetensors"
"""Its name inside a folder of effects."""
COLUMNS = ("b", "signal", "noise", "r2", "ceiling", "baseline_mean", "baseline_standard_error")
ABOUT = ("model_name", "hook_name", "sae", "median_norm", "provenance")
_NUMBER, _FIGURE = (int, float), (int, float, type(None))
_NOTES: dict[str, tuple[type, ...]] = {
    "method": (str,), "ridge": _NUMBER, "n_vectors": (int,), "n_heldout": (int,), "n_not_reached": (int,),
    "damping": _NUMBER, "r2": _FIGURE, "r2_ceiling": _FIGURE, "median_scale": _NUMBER, "seed": (int,),
    "vectors_hash": (str,), "effects": (dict,),
}  # fmt: skip
"""What entries of the provenance are, where it has them."""


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a map to `path`, whole or not at all; folders on the way are made."""
    data = {name: tensor.float() for name, tensor in tensors.items()}
    make_folder(path.parent)
    save_tensors(path, data, {"format": FORMAT, "version": str(VERSION), "about": dumps(about)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the map at `path` and what is known about it. Raises SteersmanError, naming the file, when it
    holds none, is damaged, or contradicts itself."""
    if path.is_dir():
        path = path / NAME
    tensors, header = load_tensors(path)
    if header.get("format") != FORMAT:
        named = header.get("format", "no format of ours")[:60]
        raise SteersmanError(f"{path} is a safetensors file but no effect map: its header names {named}")
    if header.get("version") != str(VERSION):
        named = header.get("version", "")[:20]
        raise SteersmanError(f"{path} is an effect map of version {named}; this program reads {VERSION}")
    if lacking := [name for name in ("M", *COLUMNS) if name not in tensors]:
        raise SteersmanError(f"{path} lacks the tensor {', '.join(lacking)}")
    tensors = {name: tensors[name] for name in ("M", *COLUMNS, "metric") if name in tensors}
    M = tensors["M"]
    metric = tensors.get("metric")
    if metric is not None and (M.ndim != 2 or metric.shape != (len(M), len(M)) or not bool(metric.isfinite().all())):
        raise SteersmanError(f"{path}: its metric is not a finite [D, D]")
    if M.ndim != 2 or any(tensors[name].shape != M.shape[1:] for name in COLUMNS) or not M.numel():
        raise SteersmanError(f"{path}: the shapes of its tensors contradict each other")
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise SteersmanError(f"{path}: its tensors are not all fp32")
    if not bool(M.isfinite().all()) or not bool(tensors["b"].isfinite().all()):
        raise SteersmanError(f"{path}: M or b holds values that are not finite")
    return tensors, _about(header.get("about", ""), path, M.shape[1])


def _about(text: str, path: Path, d_sae: int) -> dict[str, Any]:
    given = parse_json(text, path)
    about: dict[str, Any] = {name: given.get(name) if isinstance(given, dict) else None for name in ABOUT}
    kinds: dict[str, tuple[type, ...]] = {"model_name": (str,), "hook_name": (str,), "sae": (dict,)}
    kinds |= {"median_norm": _NUMBER, "provenance": (dict,)}
    wrong = [name for name, kind in kinds.items() if not _is(about[name], kind)]
    if not wrong:
        sae, notes = about["sae"], about["provenance"]
        wrong += [] if isinstance(sae.get("hash"), str) and sae.get("d_sae") == d_sae else ["sae"]
        wrong += [f"provenance.{name}" for name, kind in _NOTES.items() if name in notes and not _is(notes[name], kind)]
    if wrong:
        raise SteersmanError(f"{path}: what its header says about the map is missing or wrong: {', '.join(wrong[:5])}")
    about["median_norm"] = float(about["median_norm"])
    return about


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value is of a kind; a number is one that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return not isinstance(value, int) or abs(value) < 1 << 1023
