"""SAELens: `cfg.json` and `sae_weights.safetensors`. Also what Steersman writes, and its run folders.

Since version 6 the configuration holds `architecture`, `d_in`, `d_sae`, `apply_b_dec_to_input`,
`normalize_activations`, `reshape_activations` and a `metadata` object; before, all keys were flat and the architecture
`standard` unless the activation function was `topk`. Tensors: `W_enc [D,L]`, `b_enc [L]`, `W_dec [L,D]`, `b_dec [D]`,
and by architecture `threshold [L]` (jumprelu), `b_gate, b_mag, r_mag [L]` (gated), `W_skip [D_out,D]` (skip
transcoders). Training checkpoints hold `topk_threshold` (BatchTopK) or `log_threshold`, decoder norms that are not
folded yet, and in `activation_scaler.json` an input scale that is not.

What SAELens has no field for, Steersman writes under `metadata.steersman` and in `feature_stats.safetensors`, which
others ignore. A BatchTopK SAE is written as a JumpReLU one whose thresholds are all its own, as SAELens does.

Source: sae_lens 6, `saes/*.py`, `loading/pretrained_sae_loaders.py` (`handle_pre_6_0_config`,
`read_sae_components_from_disk`), `training/activation_scaler.py`.
"""

import math
from pathlib import Path
from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.files import make_folder, write_json
from steersman.reading import shown
from steersman.sae.base import SAE, FeatureStats
from steersman.sae.config import SAEConfig
from steersman.sae.feature_labels import LABELS
from steersman.sae.formats.base import Format, Parts, flag, integer, positive, refuse, section, text, without_weights
from steersman.sae.formats.names import hook_of_model, to_model_name
from steersman.sae.formats.source import Source
from steersman.sae.formats.tensors import Entry, SafetensorsFile, TensorFile
from steersman.sealed import seal, unseal
from steersman.tensor_files import CHECKSUM, check_tensors, save_tensors

CONFIG, WEIGHTS, STATS, SCALER = (
    "cfg.json",
    "sae_weights.safetensors",
    "feature_stats.safetensors",
    "activation_scaler.json",
)

FORMAT = "steersman.sae"
"""What the header of weights says that Steersman wrote."""
_WEIGHTS_SUM = "weights_crc32"

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka",
    "matching_pursuit": "matching_pursuit",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
NORMS = {"none": "none", "expected_average_only_in": "none", "layer_norm": "layer_norm"} | {
    "constant_norm_rescale": "constant_norm"
}
_NORM_NAMES = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_KEPT = (
    "hook_head_index",
    "prepend_bos",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "exclude_special_tokens",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "neuronpedia_id",
    "sae_lens_training_version",
)


class SAELens(Format):
    name = "saelens"
    needs = f"{CONFIG} and {WEIGHTS}"

    def matches(self, source: Source) -> bool:
        return source.has(CONFIG, WEIGHTS) and source.only in (None, CONFIG, WEIGHTS)

    def read(self, source: Source) -> Parts:
        fields = source.json(CONFIG)
        file = source.tensors(WEIGHTS)
        path = source.path(CONFIG)
        own = section(fields, "metadata", path).get("steersman")
        if own is not None:
            return _read_own(source, own, file)
        if isinstance(file, SafetensorsFile) and file.metadata.get("format") == FORMAT:
            raise SteersmanError(
                f"{path} is not a readable SAE configuration: {WEIGHTS} was written with one that holds "
                "metadata.steersman; restore it"
            )
        return _read_saelens(source, _modern(fields, source.path(CONFIG)), file)

    def write(self, sae: SAE, path: Path) -> None:
        """The architectures that SAELens lacks are refused; `SAE.save` writes them for Steersman alone."""
        cfg = sae.cfg
        if architecture_name(cfg) not in ARCHITECTURES:
            what = " transcoder" * cfg.transcoder or " with a skip connection" * cfg.skip_connection
            known = SAE.architectures[cfg.architecture].saelens_name in ARCHITECTURES
            raise SteersmanError(f"SAELens has no {cfg.architecture}{what if known else ''} architecture")
        save(sae, path)


def _read_own(source: Source, own: Any, file: TensorFile) -> Parts:
    path = source.path(CONFIG)
    try:
        own = unseal(dict(own), path)
        weights = own.pop(_WEIGHTS_SUM, None)
        known = file.metadata if isinstance(file, SafetensorsFile) else {}
        if weights is not None and known.get(CHECKSUM, weights) != weights:
            raise SteersmanError(
                f"{source.path(WEIGHTS)} is not the file that {CONFIG} was written with: they are of different SAEs, "
                "or a save was cut short; restore them, or save the SAE again"
            )
        settings = dict(own.pop("config"))
        kind = settings.get("activation")
        if isinstance(kind, str) and kind not in SAE.architectures:
            raise SteersmanError(
                f"{path}: unknown architecture {kind!r}; have {', '.join(SAE.architectures)}. One from outside the "
                "package is known once its module is imported: import that first"
            )
        cfg = SAEConfig.from_record(settings, metadata=own)
    except SteersmanError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteersmanError(f"{path} is not a readable SAE configuration: {shown(error)}") from error
    tensors = {name: file.entry(name) for name in without_weights(cfg, path).state_dict()}
    stats = _read_stats(source.path(STATS), cfg.d_sae) if source.has(STATS) else None
    return Parts(cfg=cfg, tensors=tensors, file=file, stats=stats, native=True)


def _modern(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of any version in the form of version 6."""
    if isinstance(fields.get("metadata"), dict):  # only version 6 and later have one
        return fields
    flat = {_OLD_NAMES.get(key, key): value for key, value in fields.items()}
    hook = text(flat, "hook_name", "", path)
    flat.setdefault("architecture", "standard")
    arguments = section(flat, "activation_fn_kwargs", path)
    refuse(flat, {"activation_fn": ("relu", "topk")}, path)
    if flat.get("activation_fn") == "topk":
        refuse(arguments, {"postact_fn": ("relu", "ReLU")}, path)
        if arguments.get("k") is None and flat.get("k") is None:
            raise SteersmanError(f"{path} is not a readable SAE configuration: its topk has no k")
        flat["architecture"], flat["k"] = "topk", arguments.get("k", flat.get("k"))
    norm = flat.get("normalize_activations")
    if isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    flat["normalize_activations"] = norm or "none"
    flat.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    flat.setdefault("apply_b_dec_to_input", True)
    if "d_in" not in flat or "d_sae" not in flat:
        raise SteersmanError(f"{path} is not a readable SAE configuration: it has no d_in or no d_sae")
    return flat | {"metadata": {"prepend_bos": True} | {key: value for key, value in flat.items() if key != "metadata"}}


def _read_saelens(source: Source, fields: dict[str, Any], file: TensorFile) -> Parts:
    path, warnings = source.path(CONFIG), []
    architecture = text(fields, "architecture", "standard", path)
    norm = text({"norm": fields.get("normalize_activations") or "none"}, "norm", "none", path)
    if architecture not in ARCHITECTURES:
        raise SteersmanError(f"{path}: cannot read architecture {architecture!r}; can read {', '.join(ARCHITECTURES)}")
    if norm not in NORMS:
        raise SteersmanError(
            f"{path}: cannot read normalize_activations {norm!r}; can read {', '.join(NORMS)} (a whitened SAE must be "
            "folded by SAELens first)"
        )
    refuse(fields, {"reshape_activations": ("none", "hook_z")}, path)
    scale = _input_scale(source)
    if norm == "expected_average_only_in" and scale is None:
        warnings.append(
            "its inputs were scaled to an average norm in training and the scale is not recorded: activations are "
            "taken as they are"
        )
    metadata = section(fields, "metadata", path)
    transcoder = "transcoder" in architecture
    for what in ("d_in", "d_sae"):
        if what not in fields:
            raise SteersmanError(f"{path} is not a readable SAE configuration: it has no {what}")
    d_sae = integer(fields["d_sae"], "d_sae", path)
    kind = SAE.architectures[ARCHITECTURES[architecture]]
    k = fields.get("k", 0) if kind.uses_k else 0
    if isinstance(k, float) and not kind.exact_k and math.isfinite(k):
        k = max(1, round(k))  # an average, and only used in training
    if kind.saelens_options and scale is not None:
        raise SteersmanError(
            f"{path}: the input scale of a training checkpoint of {architecture!r} is folded by SAELens alone: have it "
            "save its inference model (save_inference_model)"
        )
    model = to_model_name(text(metadata, "model_name", "", path))
    cfg = SAEConfig(
        d_in=integer(fields["d_in"], "d_in", path),
        d_sae=d_sae,
        k=integer(k, "k", path),
        architecture=kind.name,
        hook_name=hook_of_model(text(metadata, "hook_name", "", path), model),
        model_name=model,
        apply_b_dec_to_input=flag(fields, "apply_b_dec_to_input", True, path) and not transcoder,
        input_norm=NORMS[norm],  # pyright: ignore[reportArgumentType]
        reshape_heads=fields.get("reshape_activations", "none") == "hook_z",
        transcoder=transcoder,
        d_out=integer(fields["d_out"], "d_out", path) if transcoder and "d_out" in fields else None,
        hook_name_out=hook_of_model(text(metadata, "hook_name_out", "", path), model) if transcoder else "",
        skip_connection="skip" in architecture,
        group_sizes=_group_sizes(fields, d_sae, path) if kind.uses_groups else (),
        options={name: fields[name] for name in kind.saelens_options if name in fields},
        metadata=_kept(metadata),
    )
    finetuned = fields.get("finetuning_scaling_factor") is not None and flag(
        fields, "finetuning_scaling_factor", False, path
    )
    tensors, factor, ignored = _find(cfg, file, finetuned)
    by_norm = flag(fields, "rescale_acts_by_decoder_norm", False, path)
    if scale is not None and by_norm and "topk_threshold" in file:
        # Its unit is the pre-activation times the decoder row's length, which folding the input scale shortens.
        tensors["threshold"] = tensors["threshold"].scaled(1 / scale)
    return Parts(
        cfg=cfg,
        tensors=tensors,
        file=file,
        ignored=ignored,
        input_scale=scale or 1.0,
        fold_decoder_norm=by_norm,
        decoder_factor=factor,
        warnings=warnings,
    )


def _kept(metadata: dict[str, Any]) -> dict[str, Any]:
    kept = {key: metadata[key] for key in _KEPT if metadata.get(key) is not None}
    ours = {"saelens": kept} if kept else {}
    return ours | ({"neuronpedia_id": kept["neuronpedia_id"]} if "neuronpedia_id" in kept else {})


def _input_scale(source: Source) -> float | None:
    """The scale of a training checkpoint whose inputs are not folded yet."""
    if not source.has(SCALER):
        return None
    scale = source.json(SCALER).get("scaling_factor")
    if scale is None:
        return None
    return positive(scale, "scaling_factor", source.path(SCALER))


def _group_sizes(fields: dict[str, Any], d_sae: int, path: Path) -> tuple[int, ...]:
    """The sizes of the groups from the widths that the nested SAEs end at."""
    widths = fields.get("matryoshka_widths")
    if not isinstance(widths, list) or not widths or not all(type(width) is int for width in widths):
        raise SteersmanError(f"{path}: matryoshka_widths is {shown(widths)}, not a list of widths")
    ends = widths if widths[-1] == d_sae else [*widths, d_sae]
    return tuple(end - start for start, end in zip([0, *ends[:-1]], ends))


def _find(cfg: SAEConfig, file: TensorFile, finetuned: bool) -> tuple[dict[str, Entry], Entry | None, frozenset[str]]:
    theirs = {"threshold": next((name for name in ("topk_threshold", "log_threshold") if name in file), "threshold")}
    tensors = {name: file.entry(theirs.get(name, name)) for name in without_weights(cfg, file.path).state_dict()}
    if "threshold" in tensors and theirs["threshold"] == "log_threshold":
        tensors["threshold"] = tensors["threshold"].exp()
    ignored: set[str] = set()
    factor = next((file.entry(name) for name in ("finetuning_scaling_factor", "scaling_factor") if name in file), None)
    if factor is not None and bool(torch.allclose(factor.read().float(), torch.ones(factor.shape))):
        ignored.add(factor.name)  # written by some versions, and never used
        factor = None
    if factor is not None and not finetuned and factor.name == "scaling_factor":
        raise SteersmanError(
            f"{file.path} has a scaling_factor that is not one, and finetuning_scaling_factor is not set"
        )
    return tensors, factor, frozenset(ignored)


def _read_stats(path: Path, d_sae: int) -> FeatureStats:
    check_tensors(path)
    file = SafetensorsFile(path)
    arrays = {name: torch.empty(d_sae) for name in ("max_act", "density", "mean_act")}
    for name, array in arrays.items():
        file.entry(name).copy_into(array)
    try:
        n_tokens, median = int(file.metadata["n_tokens"]), float(file.metadata["median_norm"])
    except (KeyError, ValueError) as error:
        raise SteersmanError(f"{path} lacks n_tokens or median_norm in its header") from error
    if n_tokens < 0 or not (math.isfinite(median) and median >= 0):
        raise SteersmanError(f"{path}: n_tokens {n_tokens} and median_norm {median} in its header are impossible")
    return FeatureStats(**arrays, n_tokens=n_tokens, median_norm=median)


def save(sae: SAE, path: str | Path) -> None:
    """Write the folder `path`: sae_weights.safetensors, the feature statistics, the labels and last, so that a folder
    with one is complete, cfg.json; each of them whole or not at all."""
    path = Path(path)
    make_folder(path)
    tensors = {name: value.detach().float() for name, value in sae.weights().items()}
    save_tensors(path / WEIGHTS, tensors, {"format": FORMAT})
    if sae.feature_stats is None:
        (path / STATS).unlink(missing_ok=True)
    else:
        save_statistics(sae.feature_stats, path)
    if sae.labels:
        sae.labels.save(path / LABELS)
    else:
        (path / LABELS).unlink(missing_ok=True)
    sum_of_weights = SafetensorsFile(path / WEIGHTS).metadata[CHECKSUM]
    write_json(path / CONFIG, _config_to_json(sae.cfg, sum_of_weights))


def save_statistics(stats: FeatureStats, path: Path) -> None:
    """Write the feature statistics into the SAE folder `path`."""
    arrays = {name: getattr(stats, name) for name in ("max_act", "density", "mean_act")}
    header = {"n_tokens": str(stats.n_tokens), "median_norm": repr(stats.median_norm)}
    save_tensors(path / STATS, arrays, header)


def architecture_name(cfg: SAEConfig) -> str:
    """What SAELens calls an SAE of this configuration; a name that it does not know for one that it lacks.

    >>> architecture_name(SAEConfig(d_in=4, d_sae=8, k=2, architecture="batch_topk"))
    'jumprelu'
    """
    plain = SAE.architectures[cfg.architecture].saelens_name
    if cfg.transcoder and plain in ("jumprelu", "standard"):
        kind = "skip_transcoder" if cfg.skip_connection else "transcoder"
        return f"jumprelu_{kind}" if plain == "jumprelu" else kind
    return f"{plain}{'_skip' * cfg.skip_connection}{'_transcoder' * cfg.transcoder}"


def _config_to_json(cfg: SAEConfig, sum_of_weights: str) -> dict[str, Any]:
    fields = {
        "architecture": architecture_name(cfg),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": _NORM_NAMES[cfg.input_norm],
        "reshape_activations": "hook_z" if cfg.reshape_heads else "none",
    }
    if SAE.architectures[cfg.architecture].saelens_name == "topk":
        fields |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    kind = SAE.architectures[cfg.architecture]
    fields |= {name: {**kind.defaults, **cfg.options}[name] for name in kind.saelens_options}
    if cfg.transcoder:
        fields |= {"d_out": cfg.out_width}
    own = seal({"config": cfg.record(), **cfg.metadata, _WEIGHTS_SUM: sum_of_weights})
    kept = cfg.metadata.get("saelens")
    metadata = {**kept} if isinstance(kept, dict) else {}
    metadata |= {"model_name": cfg.model_name, "hook_name": cfg.hook_name, "steersman": own}
    if cfg.transcoder:
        metadata["hook_name_out"] = cfg.hook_name_out
    if "neuronpedia_id" in cfg.metadata:
        metadata["neuronpedia_id"] = cfg.metadata["neuronpedia_id"]
    metadata["sae_lens_version"] = "6.0.0"  # without the layout's version SAELens takes the file for an older one
    return fields | {"metadata": metadata}
