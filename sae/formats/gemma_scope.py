"""Gemma Scope 1: `layer_{i}/width_{16k|65k|1m|...}/average_l0_{n}/params.npz` of `google/gemma-scope-{size}-{pt|it}-*`.

JumpReLU. `W_enc [D,L]`, `W_dec [L,D]`, `b_enc [L]`, `b_dec [D]`, `threshold [L]` (lower-case names too). `b_dec` is not
subtracted from the input and nothing is normalised. There is no configuration: repository and folder say the model, the
layer and the hook point (`res`: the block's output; `mlp`: `hook_mlp_out`; `att`: the heads' outputs side by side;
`transcoders`: from the normalised MLP input to `hook_mlp_out`). The SAEs of the embedding were trained on it times
`sqrt(D)`, which is folded in.

Source: arXiv 2408.05147; sae_lens 6, `loading/pretrained_sae_loaders.py` (`gemma_2_*`).
"""

import math
import re

from steersman.errors import SteersmanError
from steersman.sae.config import SAEConfig
from steersman.sae.formats.base import Format, Parts, first_of, matrix, with_metadata
from steersman.sae.formats.source import Source

_PATTERN = r"[\w.-]*\.npz"


class GemmaScope(Format):
    name = "gemma_scope"
    needs = "params.npz"

    def matches(self, source: Source) -> bool:
        return source.pick(_PATTERN) is not None

    def read(self, source: Source) -> Parts:
        weights = source.pick(_PATTERN)
        if weights is None:
            raise SteersmanError(f"{source.label} has no params.npz; found {source.describe()}")
        file = source.tensors(weights)
        tensors = {name: first_of(file, (name, name.lower())) for name in ("W_enc", "W_dec")}
        tensors |= {name: file.entry(name) for name in ("b_enc", "b_dec", "threshold")}
        d_in, d_sae = matrix(tensors["W_enc"])
        # Every array is checked against the others before one of them is unpacked.
        expected = {"W_dec": (d_sae, matrix(tensors["W_dec"])[1]), "b_enc": (d_sae,), "threshold": (d_sae,)}
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise SteersmanError(
                    f"{file.path}: {tensors[name].name} has shape {list(tensors[name].shape)}, that of W_enc "
                    f"({[d_in, d_sae]}) asks for {list(shape)}"
                )
        place = source.place
        transcoder = "transcoder" in place
        embedding = "embedding" in place.rsplit("gemma-scope", 1)[-1]
        layer = re.search(r"layer_(\d+)", place)
        hook = _hook(place, layer[1] if layer else None, transcoder, embedding)
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            architecture="jumprelu",
            hook_name=hook,
            model_name=_model(place),
            apply_b_dec_to_input=False,
            reshape_heads=hook.endswith("hook_z"),
            transcoder=transcoder,
            d_out=matrix(tensors["W_dec"])[1] if transcoder else None,
            hook_name_out=f"blocks.{layer[1]}.hook_mlp_out" if transcoder and layer else "",
        )
        if embedding:
            tensors["W_enc"] = tensors["W_enc"].scaled(1 / math.sqrt(d_in))
            tensors["W_dec"] = tensors["W_dec"].scaled(math.sqrt(d_in))
        l0 = re.search(r"average_l0_(\d+)", place)
        warnings = [] if hook else ["the path does not name repository and layer, so hook point and model are unknown"]
        return Parts(
            cfg=with_metadata(cfg, average_l0=int(l0[1]) if l0 else None), tensors=tensors, file=file, warnings=warnings
        )


def _model(place: str) -> str:
    matches = re.findall(r"gemma-scope-(\d+b)-(pt|it)", place)
    return f"google/gemma-2-{matches[-1][0]}{'-it' if matches[-1][1] == 'it' else ''}" if matches else ""


def _hook(place: str, layer: str | None, transcoder: bool, embedding: bool) -> str:
    if embedding:
        return "hook_embed"
    kinds = re.findall(r"gemma-scope-\d+b-(?:pt|it)-(res|mlp|att)", place)
    if layer is None or not (kinds or transcoder):
        return ""
    if transcoder:
        return f"blocks.{layer}.ln2.hook_normalized"
    return f"blocks.{layer}." + {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}[kinds[-1]]
