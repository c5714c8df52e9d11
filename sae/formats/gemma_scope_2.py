"""Gemma Scope 2: `{resid_post|mlp_out|attn_out|transcoder}/layer_{i}_width_{w}_l0_{n}/params.safetensors`
and `config.json` of `google/gemma-scope-2-{size}-{pt|it}`.

JumpReLU. `w_enc [D,L]`, `w_dec [L,D_out]`, `b_enc [L]`, `b_dec [D_out]`, `threshold [L]`; transcoders may have
`affine_skip_connection [D,D_out]`. `b_dec` is not subtracted from the input, nothing is normalised. `config.json`,
where there is one, has `architecture: "jump_relu"`, `model_name` and the module paths `hf_hook_point_in` and `_out`.
Cross-layer transcoders (`w_dec [L, layers, D]`) write to many layers and are refused.

Source: the Gemma Scope 2 release (2025); sae_lens 6, `loading/pretrained_sae_loaders.py` (`gemma_3_*`).
"""

import re

from steersman.errors import SteersmanError
from steersman.sae.config import SAEConfig
from steersman.sae.formats.base import Format, Parts, integer, matrix, refuse, text, with_metadata
from steersman.sae.formats.names import to_model_name
from steersman.sae.formats.source import Source

_PATTERN = r"params[\w.-]*\.safetensors"


class GemmaScope2(Format):
    name = "gemma_scope_2"
    needs = "params.safetensors (and config.json)"

    def matches(self, source: Source) -> bool:
        return source.pick(_PATTERN) is not None

    def read(self, source: Source) -> Parts:
        weights = source.pick(_PATTERN)
        if weights is None:
            raise SteersmanError(f"{source.label} has no params.safetensors; found {source.describe()}")
        fields = source.json("config.json") if source.has("config.json") else {}
        file = source.tensors(weights)
        refuse(fields, {"architecture": ("jump_relu",)}, file.path)
        names = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
        tensors = {ours: file.entry(theirs) for ours, theirs in names.items()}
        if len(tensors["W_dec"].shape) == 3:
            raise SteersmanError(f"{file.path} is a cross-layer transcoder, which writes to many layers: not supported")
        d_in, d_sae = matrix(tensors["W_enc"])
        skip = "affine_skip_connection" in file
        if skip:
            tensors["W_skip"] = file.entry("affine_skip_connection").T
        path_in, path_out = (text(fields, f"hf_hook_point_{end}", "", file.path) for end in ("in", "out"))
        for what, width in (("width", d_sae),):
            if fields.get(what) is not None and integer(fields[what], what, file.path) != width:
                raise SteersmanError(f"{file.path}: the weights have {what} {width}, the configuration another")
        if fields.get("affine_connection") and not skip:
            raise SteersmanError(f"{file.path} lacks the affine_skip_connection that its configuration says it has")
        transcoder = skip or path_out != "" or "transcoder" in source.place
        layer = re.search(r"layers?[._](\d+)", path_in) or re.search(r"layer_(\d+)", source.place)
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            architecture="jumprelu",
            hook_name=_hook(source.place, path_in, layer[1] if layer else None, transcoder),
            model_name=_model(text(fields, "model_name", "", file.path), source.place),
            apply_b_dec_to_input=False,
            reshape_heads=not transcoder and _kind(source.place, path_in) == "attn.hook_z",
            transcoder=transcoder,
            d_out=matrix(tensors["W_dec"])[1] if transcoder else None,
            hook_name_out=f"blocks.{layer[1]}.hook_mlp_out" if transcoder and layer else "",
            skip_connection=skip,
        )
        cfg = with_metadata(cfg, hf_hook_point_in=path_in or None, hf_hook_point_out=path_out or None)
        return Parts(cfg=cfg, tensors=tensors, file=file)


def _kind(place: str, path: str) -> str:
    """The end of the hook point's name, from the module path or else from the folder."""
    if path.endswith("o_proj.input") or "attn_out" in place:
        return "attn.hook_z"
    if path.endswith("post_feedforward_layernorm.output") or "mlp_out" in place:
        return "hook_mlp_out"
    if re.search(r"layers\.\d+\.output$", path) or "resid_post" in place:
        return "hook_resid_post"
    return ""


def _hook(place: str, path: str, layer: str | None, transcoder: bool) -> str:
    if layer is None:
        return ""
    kind = "hook_mlp_in" if transcoder else _kind(place, path)
    return f"blocks.{layer}.{kind}" if kind else ""


def _model(name: str, place: str) -> str:
    if not name:
        match = re.search(r"gemma-scope-2-([\w]+-(?:pt|it))", place)
        name = f"gemma-3-{match[1]}" if match else ""
    name = to_model_name(name.replace("-v3", "-3"))
    return name.replace("-pt", "") if "270m" in name else name
