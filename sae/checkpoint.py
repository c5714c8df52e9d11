"""SAE folders: `cfg.json` and `sae_weights.safetensors` in the SAELens v6 inference layout.

What SAELens has no field for lies under `metadata.steersman` and in `feature_stats.safetensors`, which others ignore.
A BatchTopK SAE is saved as a JumpReLU one whose thresholds are all its own, as SAELens does.
Every file is written under a temporary name, synced and renamed.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steersman.errors import SteersmanError
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig
from steersman.sae.stats import FeatureStats

CONFIG, WEIGHTS, STATS = "cfg.json", "sae_weights.safetensors", "feature_stats.safetensors"


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary path)`, sync the file and rename it to `path`: never half a file under the final name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise SteersmanError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def save(sae: SAE, path: Path) -> None:
    """Write the SAE to the folder `path`, weights first, so that a folder with a cfg.json is complete."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteersmanError(f"{path} cannot be made: {error.strerror}") from error
    cfg = sae.cfg
    tensors = {name: value.detach().contiguous() for name, value in sae.named_parameters()}
    threshold = getattr(sae, "threshold", None)
    if threshold is not None:
        tensors["threshold"] = threshold.expand(cfg.d_sae).contiguous()
    write_atomically(path / WEIGHTS, lambda temporary: save_file(tensors, temporary))
    if sae.feature_stats is None:
        (path / STATS).unlink(missing_ok=True)
    else:
        save_statistics(sae.feature_stats, path)
    write_json(path / CONFIG, _config_to_json(cfg))


def save_statistics(stats: FeatureStats, path: Path) -> None:
    """Write the feature statistics into the SAE folder `path`."""
    arrays = {name: getattr(stats, name).contiguous() for name in ("max_act", "density", "mean_act")}
    header = {"n_tokens": str(stats.n_tokens), "median_norm": repr(stats.median_norm)}
    write_atomically(path / STATS, lambda temporary: save_file(arrays, temporary, metadata=header))


def _config_to_json(cfg: SAEConfig) -> dict[str, Any]:
    fields = {
        "architecture": "topk" if cfg.activation == "topk" else "jumprelu",
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if cfg.activation == "topk":
        fields |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    own = {"config": {name: value for name, value in asdict(cfg).items() if name != "metadata"}, **cfg.metadata}
    metadata = {"model_name": cfg.model_name, "hook_name": cfg.hook_name, "steersman": own}
    metadata["sae_lens_version"] = "6.0.0"  # without the layout's version SAELens takes the file for an older one
    return fields | {"metadata": metadata}


def load(path: Path, device: torch.device) -> SAE:
    """Read the folder `path`. Raises a SteersmanError that names the file and what is wrong with it."""
    if not (path / CONFIG).is_file():
        found = ", ".join(sorted(child.name for child in path.iterdir())[:8]) if path.is_dir() else "no such folder"
        raise SteersmanError(f"{path} holds no SAE: {CONFIG} and {WEIGHTS} are needed, found: {found or 'nothing'}")
    cfg = _read_config(path / CONFIG)
    expected = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.d_in), "b_enc": (cfg.d_sae,)}
    expected["b_dec"] = (cfg.d_in,)
    if cfg.activation != "topk":
        expected["threshold"] = (cfg.d_sae,)
    tensors = _read_tensors(path / WEIGHTS, expected)
    sae = SAE(cfg)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(tensors[name])
        if cfg.activation == "batch_topk":
            sae.threshold = tensors["threshold"].float().max()
        elif cfg.activation == "jumprelu":
            sae.threshold = tensors["threshold"].float()
    sae.feature_stats = _read_stats(path / STATS, cfg.d_sae)
    return sae.to(device)


def _read_config(path: Path) -> SAEConfig:
    try:
        fields = json.loads(path.read_text())
        metadata = fields.get("metadata") or {}
        own = metadata.get("steersman")
        if own is not None:
            own = dict(own)
            return SAEConfig(**own.pop("config"), metadata=own)
        architecture = fields["architecture"]
        normalization = fields.get("normalize_activations", "none")
        if architecture not in ("topk", "jumprelu") or normalization not in ("none", None):
            raise SteersmanError(
                f"{path}: cannot read architecture {architecture!r} with normalize_activations {normalization!r} yet; "
                "topk and jumprelu with 'none' can be read"
            )
        return SAEConfig(
            d_in=fields["d_in"],
            d_sae=fields["d_sae"],
            k=fields.get("k", 0),
            activation=architecture,
            hook_name=metadata.get("hook_name") or "",
            model_name=metadata.get("model_name") or "",
            apply_b_dec_to_input=fields.get("apply_b_dec_to_input", True),
        )
    except SteersmanError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SteersmanError(f"{path} is not a readable SAE configuration: {error!r}") from error


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The named tensors of a safetensors file, their shapes and finiteness checked."""
    if not path.is_file():
        raise SteersmanError(f"{path} is missing")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name, shape in expected.items():
                if name not in names:
                    raise SteersmanError(f"{path} has no tensor {name!r}; it has {', '.join(sorted(names))}")
                found = tuple(file.get_slice(name).get_shape())
                if found != shape:
                    raise SteersmanError(
                        f"{path}: {name} has shape {list(found)}, the configuration says {list(shape)}"
                    )
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise SteersmanError(f"{path} is truncated or not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()) and name != "threshold":
            raise SteersmanError(f"{path}: {name} holds values that are not finite")
    return tensors


def _read_stats(path: Path, d_sae: int) -> FeatureStats | None:
    if not path.is_file():
        return None
    arrays = _read_tensors(path, dict.fromkeys(("max_act", "density", "mean_act"), (d_sae,)))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    return FeatureStats(**arrays, n_tokens=int(header["n_tokens"]), median_norm=float(header["median_norm"]))
