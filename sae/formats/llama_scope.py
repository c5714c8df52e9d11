"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors` of `fnlp/Llama3_1-8B-Base-LX{R,A,M}-{8,32}x`.

JumpReLU. `encoder.weight [L,D]`, `encoder.bias`, `decoder.weight [D,L]`, `decoder.bias`. Inputs are multiplied by
`s = sqrt(D) / dataset_average_activation_norm.in` (and outputs divided by it), which is folded in; the threshold of
every latent is `jump_relu_threshold * s`. `b_dec` is not subtracted from the input.

The SAEs of R1-Distill have `config.json` and `sae_weights.safetensors` with the same names and
`log_jumprelu_threshold [L]`, the scale being `dataset_average_activation_norm` there too where it is given.

Source: arXiv 2410.20526; sae_lens 6, `loading/pretrained_sae_loaders.py` (`llama_scope_*`).
"""

import math
import re
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import shown
from steersman.sae.config import SAEConfig
from steersman.sae.formats.base import (
    Format,
    Parts,
    integer,
    matrix,
    number,
    positive,
    refuse,
    section,
    text,
    with_metadata,
)
from steersman.sae.formats.names import to_hook_name
from steersman.sae.formats.source import Source
from steersman.sae.formats.tensors import TensorFile

HYPERPARAMETERS, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_DISTILL = ("config.json", "sae_weights.safetensors")
_PLAIN = {
    "act_fn": ("jumprelu",),
    "apply_decoder_bias_to_pre_encoder": (False,),
    "use_decoder_bias": (True,),
    "use_glu_encoder": (False,),
    "norm_activation": ("dataset-wise",),
}
"""Keys that change what an SAE computes, and the values at which it is what is read here."""


class LlamaScope(Format):
    name = "llama_scope"
    needs = f"{HYPERPARAMETERS} and {WEIGHTS}"

    def matches(self, source: Source) -> bool:
        return source.has(HYPERPARAMETERS, WEIGHTS)

    def read(self, source: Source) -> Parts:
        fields, file = source.json(HYPERPARAMETERS), source.tensors(WEIGHTS)
        path = source.path(HYPERPARAMETERS)
        s = norm_scale(fields, path)
        if s is None:
            raise SteersmanError(f"{path} has no dataset_average_activation_norm: the scale of the input is unknown")
        refuse(fields, _PLAIN, path)
        threshold = number(fields.get("jump_relu_threshold"), "jump_relu_threshold", path)
        cfg = _config(source, fields, file)
        return Parts(cfg=cfg, tensors=_tensors(file), file=file, input_scale=s, constants={"threshold": threshold * s})


class LlamaScopeDistill(Format):
    name = "llama_scope_r1"
    needs = "config.json and sae_weights.safetensors with encoder.weight and log_jumprelu_threshold"

    def matches(self, source: Source) -> bool:
        return source.has(*_DISTILL) and "log_jumprelu_threshold" in source.tensors(_DISTILL[1])

    def read(self, source: Source) -> Parts:
        fields, file = source.json(_DISTILL[0]), source.tensors(_DISTILL[1])
        refuse(fields, {**_PLAIN, "norm_activation": ("dataset-wise", "inference")}, source.path(_DISTILL[0]))
        tensors = _tensors(file) | {"threshold": file.entry("log_jumprelu_threshold").exp()}
        prefix = "dataset_average_activation_norm"
        noted = {name.removeprefix(f"{prefix}."): name for name in file.headers if name.startswith(prefix)}
        hook = text(fields, "hook_point_in", "in", file.path)
        if hook in noted:
            fields = {**fields, prefix: {"in": file.entry(noted[hook]).number()}}
        s = norm_scale(fields, source.path(_DISTILL[0]))
        warnings = []
        if s is None and fields.get("norm_activation", "dataset-wise") != "inference":
            warnings.append("the scale of its inputs is not recorded: activations are taken as they are")
        cfg = _config(source, fields, file)
        ignored = frozenset(noted.values())
        return Parts(cfg=cfg, tensors=tensors, file=file, input_scale=s or 1.0, ignored=ignored, warnings=warnings)


def _tensors(file: TensorFile) -> dict[str, Any]:
    return {
        "W_enc": file.entry("encoder.weight").T,
        "b_enc": file.entry("encoder.bias"),
        "W_dec": file.entry("decoder.weight").T,
        "b_dec": file.entry("decoder.bias"),
    }


def norm_scale(fields: dict[str, Any], path: Path) -> float | None:
    """`sqrt(D) / norm`, where the configuration records the average norm of the activations."""
    norm = section(fields, "dataset_average_activation_norm", path).get("in")
    if norm is None:
        return None
    width = integer(fields.get("d_model"), "d_model", path)
    if width < 1:
        raise SteersmanError(f"{path}: d_model is {width}, not a width")
    return math.sqrt(width) / positive(norm, "dataset_average_activation_norm.in", path)


def _config(source: Source, fields: dict[str, Any], file: TensorFile) -> SAEConfig:
    d_sae, d_in = matrix(file.entry("encoder.weight"))
    for what, width in (("d_model", d_in), ("d_sae", d_sae)):
        if fields.get(what, width) != width:
            raise SteersmanError(
                f"{file.path}: the weights have {what} {width}, the configuration says {shown(fields[what])}"
            )
    hook_in, hook_out = (text(fields, f"hook_point_{end}", "", file.path) for end in ("in", "out"))
    hook = to_hook_name(hook_in)
    distill = "R1-Distill" in source.place
    cfg = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        architecture="jumprelu",
        hook_name=hook,
        model_name="deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
        if distill
        else "meta-llama/Llama-3.1-8B"
        if "Llama3_1-8B" in source.place
        else "",
        apply_b_dec_to_input=False,
        reshape_heads=hook.endswith("hook_z"),
        transcoder=hook_out not in ("", hook_in),
        hook_name_out=to_hook_name(hook_out),
    )
    return with_metadata(cfg, neuronpedia_id=_neuronpedia(source.place))


def _neuronpedia(place: str) -> str | None:
    """The page of an SAE of the release: every one of layers and sizes has one."""
    match = re.search(r"Llama3_1-8B-Base-L(\d+)([RAM])-(8|32)x", place)
    if match is None:
        return None
    kind = {"R": "res", "A": "att", "M": "mlp"}[match[2]]
    return f"llama3.1-8b/{match[1]}-llamascope-{kind}-{'32k' if match[3] == '8' else '131k'}"
