"""SAE folders: `cfg.json` and `sae_weights.safetensors` in the SAELens v6 inference layout.

What SAELens has no field for lies under `metadata.steersman` and in `feature_stats.safetensors`, which others ignore.
A BatchTopK SAE is saved as a JumpReLU one whose thresholds are all its own, as SAELens does.
Every file is written under a temporary name, synced and renamed. `steersman.sae.formats.saelens` reads them.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from steersman.files import make_folder, write_json, write_whole
from steersman.sae.base import SAE, FeatureStats
from steersman.sae.config import SAEConfig

CONFIG, WEIGHTS, STATS = "cfg.json", "sae_weights.safetensors", "feature_stats.safetensors"


def save(sae: SAE, path: Path) -> None:
    """Write the SAE to the folder `path`, weights first, so that a folder with a cfg.json is complete."""
    make_folder(path)
    cfg = sae.cfg
    tensors = {name: value.detach().float().contiguous() for name, value in sae.named_parameters()}
    threshold = getattr(sae, "threshold", None)
    if threshold is not None:
        tensors["threshold"] = threshold.float().expand(cfg.d_sae).contiguous()
    write_whole(path / WEIGHTS, lambda temporary: save_file(tensors, temporary))
    if sae.feature_stats is None:
        (path / STATS).unlink(missing_ok=True)
    else:
        save_statistics(sae.feature_stats, path)
    write_json(path / CONFIG, _config_to_json(cfg))


def save_statistics(stats: FeatureStats, path: Path) -> None:
    """Write the feature statistics into the SAE folder `path`."""
    arrays = {name: getattr(stats, name).contiguous() for name in ("max_act", "density", "mean_act")}
    header = {"n_tokens": str(stats.n_tokens), "median_norm": repr(stats.median_norm)}
    write_whole(path / STATS, lambda temporary: save_file(arrays, temporary, metadata=header))


def saelens_architecture(cfg: SAEConfig) -> str:
    """What SAELens calls an SAE of this configuration; a name that it does not know for one that it lacks.

    >>> saelens_architecture(SAEConfig(d_in=4, d_sae=8, k=2, architecture="batch_topk"))
    'jumprelu'
    """
    by_threshold = cfg.architecture in ("batch_topk", "matryoshka", "jumprelu")
    plain = "jumprelu" if by_threshold else "standard" if cfg.architecture == "relu" else cfg.architecture
    if not (cfg.transcoder or cfg.skip_connection):
        return plain
    if cfg.transcoder and (by_threshold or cfg.architecture == "relu"):
        kind = "skip_transcoder" if cfg.skip_connection else "transcoder"
        return f"jumprelu_{kind}" if by_threshold else kind
    return f"{plain}{'_skip' * cfg.skip_connection}{'_transcoder' * cfg.transcoder}"


_NORM_NAMES = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}


def _config_to_json(cfg: SAEConfig) -> dict[str, Any]:
    fields = {
        "architecture": saelens_architecture(cfg),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": _NORM_NAMES[cfg.input_norm],
        "reshape_activations": "hook_z" if cfg.reshape_heads else "none",
    }
    if cfg.architecture == "topk":
        fields |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    if cfg.transcoder:
        fields |= {"d_out": cfg.out_width}
    own = {"config": cfg.record(), **cfg.metadata}
    kept = cfg.metadata.get("saelens")
    metadata = {**kept} if isinstance(kept, dict) else {}
    metadata |= {"model_name": cfg.model_name, "hook_name": cfg.hook_name, "steersman": own}
    if cfg.transcoder:
        metadata["hook_name_out"] = cfg.hook_name_out
    if "neuronpedia_id" in cfg.metadata:
        metadata["neuronpedia_id"] = cfg.metadata["neuronpedia_id"]
    metadata["sae_lens_version"] = "6.0.0"  # without the layout's version SAELens takes the file for an older one
    return fields | {"metadata": metadata}
