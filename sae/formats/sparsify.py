"""sparsify (EleutherAI): `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`.

`encoder.weight [L,D]`, `encoder.bias [L]`, `W_dec [L,D]` (not transposed), `b_dec [D]`, and `W_skip [D,D]` with
`skip_connection`. `cfg.json`: `activation` (topk or groupmax), `k`, `num_latents` (0 for `d_in * expansion_factor`),
`d_in`, `transcode`, `skip_connection`. `z = topk(ReLU(x' W_enc^T + b_enc))` with `x' = x - b_dec`, or `x' = x` with
`transcode`; `y = z W_dec + b_dec (+ x W_skip^T)`. The hook point is the name of the folder: the submodule of the base
model whose output it is. With `signed`, which versions before 1.0 had, there is no ReLU and the K largest are those by
absolute value.

Source: eai-sparsify 1.3, `sparse_coder.py`, `fused_encoder.py`, `config.py`.
"""

from pathlib import Path
from typing import Any

import torch

from steersman.errors import SteersmanError
from steersman.files import make_folder, write_json
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig
from steersman.sae.formats.base import Format, Parts, flag, integer, matrix, refuse, section, text
from steersman.sae.formats.names import hook_in_path, to_model_name
from steersman.sae.formats.source import Source
from steersman.tensor_files import save_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_PLAIN = {"cross_layer": (0, False), "n_targets": (0,), "n_sources": (0,), "coalesce_topk": ("none",)}
"""Keys of its development branches, which write to many layers, and the values at which they change nothing."""


class Sparsify(Format):
    name = "sparsify"
    needs = f"{CONFIG} and {WEIGHTS}"

    def matches(self, source: Source) -> bool:
        return source.has(CONFIG, WEIGHTS) and source.only in (None, CONFIG, WEIGHTS)

    def read(self, source: Source) -> Parts:
        fields, file = source.json(CONFIG), source.tensors(WEIGHTS)
        path = source.path(CONFIG)
        activation = text(fields, "activation", "topk", path)
        if activation not in ("topk", "groupmax"):
            raise SteersmanError(f"{path}: cannot read activation {activation!r}; sparsify has topk and groupmax")
        if "k" not in fields or "d_in" not in fields:
            raise SteersmanError(f"{path} is not a readable SAE configuration: it has no k or no d_in")
        refuse(fields, _PLAIN, path)
        signed = flag(fields, "signed", False, path)
        if signed and activation != "topk":
            raise SteersmanError(f"{path}: cannot read a signed SAE of activation {activation!r}, only of topk")
        d_in = integer(fields["d_in"], "d_in", path)
        d_sae = integer(fields.get("num_latents") or 0, "num_latents", path)
        d_sae = d_sae or d_in * integer(fields.get("expansion_factor", 32), "expansion_factor", path)
        transcode = flag(fields, "transcode", False, path)
        encoder = file.entry("encoder.weight")
        matrix(encoder)
        hook, model = _origin(source, fields)
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            k=integer(fields["k"], "k", path),
            architecture="abs_topk" if signed else activation,
            hook_name=hook,
            model_name=model,
            apply_b_dec_to_input=not transcode,
            transcoder=transcode,
            hook_name_out=hook if transcode else "",  # sparsify reads and writes around one module
            skip_connection=flag(fields, "skip_connection", False, path),
        )
        tensors = {
            "W_enc": encoder.T,
            "b_enc": file.entry("encoder.bias"),
            "W_dec": file.entry("W_dec"),
            "b_dec": file.entry("b_dec"),
        }
        if cfg.skip_connection:
            tensors["W_skip"] = file.entry("W_skip")
        return Parts(cfg=cfg, tensors=tensors, file=file)

    def write(self, sae: SAE, path: Path) -> None:
        """TopK and GroupMax SAEs whose input loses `b_dec`, and transcoders of equal widths; nothing normalised."""
        cfg = sae.cfg
        reasons = {
            f"activation {cfg.architecture!r} (it has topk and groupmax)": cfg.architecture not in ("topk", "groupmax"),
            f"input normalisation {cfg.input_norm!r}": cfg.input_norm != "none",
            "inputs per attention head": cfg.reshape_heads,
            f"an output of another width ({cfg.out_width}) than the input's ({cfg.d_in})": cfg.out_width != cfg.d_in,
            "an input that keeps b_dec": not cfg.transcoder and not cfg.apply_b_dec_to_input,
        }
        unfit = [what for what, holds in reasons.items() if holds]
        if unfit:
            raise SteersmanError(f"sparsify cannot express {'; '.join(unfit)}")
        tensors = {
            "encoder.weight": sae.W_enc.detach().T,
            "encoder.bias": sae.b_enc.detach(),
            "W_dec": sae.W_dec.detach(),
            "b_dec": sae.b_dec.detach(),
        }
        if cfg.skip_connection:
            tensors["W_skip"] = sae.W_skip.detach()
        make_folder(path)
        save_tensors(path / WEIGHTS, {name: tensor.float() for name, tensor in tensors.items()})
        fields: dict[str, Any] = {
            "activation": cfg.architecture,
            "expansion_factor": max(1, cfg.d_sae // cfg.d_in),
            "normalize_decoder": bool(torch.allclose(sae.W_dec.float().norm(dim=1), torch.ones(1, device=sae.device))),
            "num_latents": cfg.d_sae,
            "k": cfg.k,
            "multi_topk": False,
            "skip_connection": cfg.skip_connection,
            "transcode": cfg.transcoder,
            "d_in": cfg.d_in,
            "steersman": {
                "hook_name": cfg.hook_name,
                "model_name": cfg.model_name,
            },  # sparsify skips what it does not know
        }
        write_json(path / CONFIG, fields)


def _origin(source: Source, fields: dict[str, Any]) -> tuple[str, str]:
    """Hook point and model: as Steersman noted them, else from the folder's name and the run's configuration above."""
    path = source.path(CONFIG)
    if noted := section(fields, "steersman", path):
        return text(noted, "hook_name", "", path), text(noted, "model_name", "", path)
    run = source.above("config.json") or {}
    model = to_model_name(text(run, "model", "", path))
    return hook_in_path(source.place, model or "unknown"), model
