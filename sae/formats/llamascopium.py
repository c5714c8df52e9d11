"""Llamascopium (OpenMOSS): `config.json` and `sae_weights.safetensors` or `sae_weights.pt` (`{"sae": ...}`).

`W_E [D,L]`, `b_E [L]`, `W_D [L,D]`, `b_D [D]` (with `use_decoder_bias`),
`activation_function.log_jumprelu_threshold [L]` (jumprelu), and the numbers
`dataset_average_activation_norm.<hook point>`. `config.json`: `sae_type`, `d_model`, `act_fn`, `top_k`,
`hook_point_in`, `hook_point_out` (another one makes it a transcoder), `norm_activation`, `use_decoder_bias`,
`use_glu_encoder`, `sparsity_include_decoder_norm`.

`z = x W_E + b_E`; with `sparsity_include_decoder_norm` the activation function decides on `z |W_D|`, and what passes
has the value z. Inputs are multiplied by `sqrt(D) / norm` of their hook point (dataset-wise), or by `sqrt(D) / |x|`
(token-wise), or taken as they are (inference). `b_D` is not subtracted from the input.

Source: llamascopium 2.0, `models/sae.py`, `models/sparse_dictionary.py`, `activation_functions.py`.
"""

import math
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import shown
from steersman.sae.config import SAEConfig
from steersman.sae.formats.base import Format, Parts, flag, integer, matrix, refuse, text
from steersman.sae.formats.names import to_hook_name
from steersman.sae.formats.source import Source
from steersman.sae.formats.tensors import TensorFile

CONFIG = "config.json"
WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt")
_ACTIVATIONS = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_NORM = "dataset_average_activation_norm."


class Llamascopium(Format):
    name = "llamascopium"
    needs = f"{CONFIG} with sae_type, and {WEIGHTS[0]} or {WEIGHTS[1]}"

    def matches(self, source: Source) -> bool:
        weights = any(source.has(name) for name in (*WEIGHTS, "sae_weights.dcp"))
        return weights and source.has(CONFIG) and "sae_type" in source.json(CONFIG)

    def read(self, source: Source) -> Parts:
        fields, path = source.json(CONFIG), source.path(CONFIG)
        weights = next((name for name in WEIGHTS if source.has(name)), None)
        if weights is None:
            raise SteersmanError(
                f"{source.label} has its weights as a distributed checkpoint (sae_weights.dcp), which is read by "
                "unpickling: save it with llamascopium as sae_weights.safetensors"
            )
        file = source.tensors(weights, below="sae")
        activation = _check(fields, path)
        tensors = {"W_enc": file.entry("W_E"), "b_enc": file.entry("b_E"), "W_dec": file.entry("W_D")}
        if flag(fields, "use_decoder_bias", True, path):
            tensors["b_dec"] = file.entry("b_D")
        d_in, d_sae = matrix(tensors["W_enc"])
        if activation == "jumprelu":
            tensors["threshold"] = file.entry("activation_function.log_jumprelu_threshold").exp()
        hook_in, hook_out = (text(fields, f"hook_point_{end}", "", path) for end in ("in", "out"))
        transcoder = hook_out not in ("", hook_in)
        norm = fields.get("norm_activation", "dataset-wise")
        scales = _scales(norm, hook_in, hook_out or hook_in, d_in, file)
        if norm == "token-wise" and transcoder:
            raise SteersmanError(f"{path}: a token-wise normalised transcoder cannot be undone without its target")
        include = flag(fields, "sparsity_include_decoder_norm", True, path)
        warnings = []
        if include and activation == "topk":
            warnings.append("activations are in units of unit decoder rows: the source library's times their length")
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            k=integer(fields.get("top_k", 0), "top_k", path) if activation == "topk" else 0,
            architecture=activation,
            hook_name=to_hook_name(hook_in),
            apply_b_dec_to_input=False,
            input_norm="constant_norm" if norm == "token-wise" else "none",
            transcoder=transcoder,
            d_out=matrix(tensors["W_dec"])[1] if transcoder else None,
            hook_name_out=to_hook_name(hook_out) if transcoder else "",
        )
        return Parts(
            cfg=cfg,
            tensors=tensors,
            file=file,
            ignored=frozenset(name for name in file.headers if name.startswith(_NORM)),
            input_scale=scales[0],
            output_scale=scales[1],
            fold_decoder_norm=include and activation == "topk",
            threshold_by_decoder_norm=include and activation == "jumprelu",
            norms_in_file_units=True,
            warnings=warnings,
        )


def _check(fields: dict[str, Any], path: Path) -> str:
    """The activation. Raises SteersmanError for what is not an SAE that can be read."""
    if fields.get("sae_type") != "sae":
        raise SteersmanError(f"{path}: cannot read sae_type {shown(fields.get('sae_type'))}, only 'sae'")
    refuse(fields, {"apply_decoder_bias_to_pre_encoder": (False,)}, path)
    if flag(fields, "use_glu_encoder", False, path):
        raise SteersmanError(f"{path}: cannot read an SAE with a gated linear unit in its encoder (use_glu_encoder)")
    activation = text(fields, "act_fn", "relu", path)
    if activation == "batchtopk":
        raise SteersmanError(
            f"{path}: a batchtopk SAE without a threshold has codes that depend on the batch: convert it to jumprelu "
            "with llamascopium first"
        )
    if activation not in _ACTIVATIONS:
        raise SteersmanError(f"{path}: cannot read act_fn {activation!r}; can read {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[activation]


def _scales(norm: Any, hook_in: str, hook_out: str, d_in: int, file: TensorFile) -> tuple[float, float]:
    """What inputs and outputs are multiplied by."""
    if norm in ("inference", "token-wise"):
        return 1.0, 1.0
    if norm != "dataset-wise":
        raise SteersmanError(
            f"{file.path}: cannot read norm_activation {shown(norm)}; can read dataset-wise, token-wise and inference"
        )

    def scale(hook: str) -> float:
        value = file.entry(_NORM + hook).number()
        if value <= 0:
            raise SteersmanError(f"{file.path}: {_NORM}{hook} is {value}, not a positive number")
        return math.sqrt(d_in) / value

    return scale(hook_in), scale(hook_out)
