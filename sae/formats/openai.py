"""OpenAI sparse_autoencoder v1, v4 and v5: `{location}[_v4|_v5_32k|_v5_128k]/autoencoders/{layer}.pt` of GPT-2 small.

`pre_bias [D]`, `encoder.weight [L,D]`, `latent_bias [L]`, `decoder.weight [D,L]`, statistics, and the entries
`activation` (absent: ReLU) and `activation_state_dict` (`{"k", "postact_fn"}`). With TopK (v5) each token is normalised
to mean 0 and unbiased deviation 1 first, and that is undone after decoding; v1 and v4 are not normalised.
`z = act((x' - pre_bias) W_enc^T + latent_bias)`, `x_hat' = z W_dec + pre_bias`.

Source: arXiv 2406.04093; github.com/openai/sparse_autoencoder, `model.py` (`Autoencoder.from_state_dict`), `paths.py`.
"""

import re
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError
from steersman.reading import shown
from steersman.sae.config import SAEConfig
from steersman.sae.formats.base import Format, Parts, integer, matrix, with_metadata
from steersman.sae.formats.pt import PtFile
from steersman.sae.formats.source import Source

_PATTERN = r"(?!ae(_\d+)?\.pt$).+\.pt"
_STATISTICS = frozenset({"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"})
_LOCATIONS = {
    "resid_post_mlp": ("hook_resid_post", "res_post"),
    "resid_post_attn": ("hook_resid_mid", "res_mid"),
    "resid_delta_mlp": ("hook_mlp_out", "mlp"),
    "resid_delta_attn": ("hook_attn_out", "att"),
    "mlp_post_act": ("mlp.hook_post", None),
}


class OpenAI(Format):
    name = "openai"
    needs = "one .pt file with pre_bias, encoder.weight, latent_bias and decoder.weight (name the file, such as 6.pt)"

    def matches(self, source: Source) -> bool:
        name = source.pick(_PATTERN)
        return name is not None and "pre_bias" in source.tensors(name)

    def read(self, source: Source) -> Parts:
        name = source.pick(_PATTERN)
        if name is None:
            raise SteersmanError(f"{source.label}: name one .pt file; found {source.describe()}")
        file = source.tensors(name)
        assert isinstance(file, PtFile)
        tensors = {
            "W_enc": file.entry("encoder.weight").T,
            "b_enc": file.entry("latent_bias"),
            "W_dec": file.entry("decoder.weight").T,
            "b_dec": file.entry("pre_bias"),
        }
        d_in, d_sae = matrix(tensors["W_enc"])
        k = _k(file.others, file.path)
        hook, page = _place(f"{source.place}/{name}")
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            k=k or 0,
            architecture="relu" if k is None else "topk",
            hook_name=hook,
            model_name="gpt2" if hook else "",
            input_norm="none" if k is None else "layer_norm",
        )
        return Parts(cfg=with_metadata(cfg, neuronpedia_id=page), tensors=tensors, file=file, ignored=_STATISTICS)


def _k(others: dict[str, Any], path: Path) -> int | None:
    """K of a TopK SAE, None for ReLU. Raises SteersmanError for codes that may be negative."""
    activation = others.get("activation", "ReLU")
    if activation == "ReLU":
        return None
    state = others.get("activation_state_dict")
    if activation != "TopK" or not isinstance(state, dict):
        raise SteersmanError(f"{path}: cannot read activation {shown(activation)}; can read ReLU and TopK")
    if state.get("postact_fn") != "ReLU":
        raise SteersmanError(
            f"{path}: TopK without a ReLU ({shown(state.get('postact_fn'))}) gives negative activations"
        )
    return integer(state.get("k"), "k", path)


def _place(path: str) -> tuple[str, str | None]:
    """Hook point, and page on Neuronpedia, from a path of the release."""
    match = re.search(r"/(\w+?)(?:_(v4|v5_32k|v5_128k))?/autoencoders/(\d+)\.pt$", path)
    if match is None or match[1] not in _LOCATIONS:
        return "", None
    kind, short = _LOCATIONS[match[1]]
    version = match[2] or ""
    page = f"gpt2-small/{match[3]}-{short}_{version[3:]}-oai" if version.startswith("v5") and short else None
    return f"blocks.{match[3]}.{kind}", page
