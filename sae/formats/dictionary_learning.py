"""dictionary_learning: `ae.pt` (or `ae_<step>.pt`) and `config.json`.

`config.json` holds `{"trainer": {"dict_class", "activation_dim", "dict_size", "k", "layer", "lm_name",
"submodule_name"}}`; by `dict_class`, the tensors of `ae.pt`:

- `AutoEncoder` (ReLU): `encoder.weight [L,D]`, `encoder.bias`, `decoder.weight [D,L]`, `bias [D]`, subtracted from the
  input too.
- `AutoEncoderNew` (ReLU): `decoder.bias` in place of `bias`, not subtracted.
- `GatedAutoEncoder`: `encoder.weight`, `decoder.weight`, `decoder_bias`, `gate_bias`, `mag_bias`, `r_mag`.
- `JumpReluAutoEncoder`: `W_enc [D,L]`, `b_enc`, `W_dec [L,D]`, `b_dec`, `threshold [L]`; `b_dec` is not subtracted.
- `AutoEncoderTopK`, `BatchTopKSAE`: `encoder.*`, `decoder.weight`, `b_dec`, and the numbers `k` and `threshold`.
- `MatryoshkaBatchTopKSAE`: `W_enc`, `b_enc`, `W_dec`, `b_dec`, `k`, `threshold`, `group_sizes [G]`.

TopK takes the K largest, BatchTopK and Matryoshka what exceeds the threshold. A backup written in mid-run holds
`{step, ae, optimizer, config, norm_factor}` instead; its biases are still those of inputs divided by `norm_factor`.

Source: dictionary-learning 0.1, `dictionary.py`, `trainers/*.py`, `training.py`.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.files import make_folder, write_json, write_whole
from steersman.reading import shown
from steersman.sae.base import SAE
from steersman.sae.config import SAEConfig
from steersman.sae.formats.base import Format, Parts, first_of, integer, matrix, positive, refuse, text
from steersman.sae.formats.names import hook_of_model, to_model_name
from steersman.sae.formats.pt import PtFile
from steersman.sae.formats.source import Source
from steersman.sae.formats.tensors import Entry, TensorFile

CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}
_WEIGHTS = r"ae(_\d+)?\.pt"


class DictionaryLearning(Format):
    name = "dictionary_learning"
    needs = "ae.pt (or ae_<step>.pt), and config.json beside it or one folder up"

    def matches(self, source: Source) -> bool:
        return source.pick(_WEIGHTS) is not None

    def read(self, source: Source) -> Parts:
        weights = source.pick(_WEIGHTS)
        if weights is None:
            raise SteersmanError(f"{source.label} has no ae.pt; found {source.describe()}")
        file = source.tensors(weights, below="ae")
        assert isinstance(file, PtFile)
        trainer = _trainer(source, file)
        refuse(trainer, {"output_features": (False,)}, file.path)
        kind = text(trainer, "dict_class", "", file.path) or _guess(file)
        if kind not in CLASSES:
            raise SteersmanError(f"{file.path}: cannot read dict_class {kind!r}; can read {', '.join(CLASSES)}")
        tensors = _find(kind, file)
        d_in, d_sae = matrix(tensors["W_enc"])
        for what, width in (("activation_dim", d_in), ("dict_size", d_sae)):
            if trainer.get(what) is not None and integer(trainer[what], what, file.path) != width:
                raise SteersmanError(
                    f"{file.path}: the weights have {what} {width}, the configuration says {shown(trainer[what])}"
                )
        warnings: list[str] = []
        numbers = {name: file.entry(name).number() for name in ("k", "threshold") if _is_number(file, name)}
        unset = kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and numbers.get("threshold", -1.0) < 0
        if unset:
            warnings.append("its threshold is not set yet: every positive pre-activation counts as active")
        elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            tensors["threshold"] = file.entry("threshold")
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            k=_k(kind, numbers, trainer, file),
            architecture=CLASSES[kind],
            hook_name=_hook(trainer, file.path),
            model_name=to_model_name(text(trainer, "lm_name", "", file.path)),
            apply_b_dec_to_input=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
            group_sizes=_groups(file) if kind == "MatryoshkaBatchTopKSAE" else (),
        )
        scale = _norm_factor(file)
        if scale != 1.0:
            biases = ("b_enc", "b_dec", "b_gate", "b_mag", "threshold")
            tensors = {name: entry.scaled(scale) if name in biases else entry for name, entry in tensors.items()}
        return Parts(
            cfg=cfg,
            tensors=tensors,
            file=file,
            ignored=frozenset({"k", "threshold", "group_sizes"}),
            constants={"threshold": 0.0} if unset else {},
            warnings=warnings,
        )

    def write(self, sae: SAE, path: Path) -> None:
        """Every architecture but transcoders, normalised inputs and GroupMax; `b_dec` as each class treats it."""
        kind = _class_for(sae)
        make_folder(path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors_of(kind, sae).items()}
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        write_whole(path / "ae.pt", lambda temporary: torch.save(tensors, temporary))
        cfg = sae.cfg
        trainer: dict[str, Any] = {
            "dict_class": kind,
            "activation_dim": cfg.d_in,
            "dict_size": cfg.d_sae,
            "k": cfg.k,
            "layer": cfg.hook_layer,
            "lm_name": cfg.model_name,
            "submodule_name": cfg.hook_name,
        }
        if cfg.group_sizes:
            trainer["group_sizes"] = list(cfg.group_sizes)
        write_json(path / "config.json", {"trainer": trainer})


def _trainer(source: Source, file: PtFile) -> dict[str, Any]:
    """The trainer's configuration: beside the weights, one folder up, or inside a backup; empty where there is none."""
    config = source.json("config.json") if source.has("config.json") else source.above("config.json")
    trainer = (config or {}).get("trainer")
    trainer = file.others.get("config") if trainer is None else trainer
    trainer = {} if trainer is None else trainer
    if not isinstance(trainer, dict):
        raise SteersmanError(f"{source.label}: the trainer's configuration is no JSON object")
    return trainer


def _guess(file: TensorFile) -> str:
    """The class from the tensors alone, for an `ae.pt` without its config.json."""
    for kind, mark in (
        ("MatryoshkaBatchTopKSAE", "group_sizes"),
        ("GatedAutoEncoder", "r_mag"),
        ("AutoEncoderNew", "decoder.bias"),
        ("JumpReluAutoEncoder", "W_enc"),
    ):
        if mark in file:
            return kind
    if "k" in file:
        raise SteersmanError(
            f"{file.path} may be a TopK or a BatchTopK SAE: put the run's config.json beside it, which says so"
        )
    return "AutoEncoder"


def _find(kind: str, file: TensorFile) -> dict[str, Entry]:
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        names = ("W_enc", "b_enc", "W_dec", "b_dec") + (("threshold",) if kind == "JumpReluAutoEncoder" else ())
        return {name: file.entry(name) for name in names}
    tensors = {"W_enc": file.entry("encoder.weight").T, "W_dec": file.entry("decoder.weight").T}
    if kind == "GatedAutoEncoder":
        names = {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
        return tensors | {ours: file.entry(theirs) for ours, theirs in names.items()}
    tensors["b_enc"] = file.entry("encoder.bias")
    bias = {"AutoEncoder": ("bias",), "AutoEncoderNew": ("decoder.bias",)}.get(kind, ("b_dec", "bias"))
    return tensors | {"b_dec": first_of(file, bias)}


def _is_number(file: TensorFile, name: str) -> bool:
    return name in file and math.prod(file.headers[name].shape) == 1


def _k(kind: str, numbers: dict[str, float], trainer: dict[str, Any], file: TensorFile) -> int:
    if not SAE.architectures[CLASSES[kind]].uses_k:
        return 0
    noted = trainer.get("k")
    k = numbers.get("k", noted)
    if k is None:
        raise SteersmanError(f"{file.path} holds no k, and no config.json says it")
    return integer(k, "k", file.path)


def _groups(file: TensorFile) -> tuple[int, ...]:
    sizes = file.entry("group_sizes")
    if len(sizes.shape) != 1 or sizes.header.n_bytes > 1 << 16 or sizes.header.dtype.is_floating_point:
        raise SteersmanError(f"{file.path}: group_sizes has shape {list(sizes.shape)}, it should be a short list")
    return tuple(int(size) for size in sizes.read())


def _norm_factor(file: PtFile) -> float:
    """What a backup's inputs were divided by; 1 for a finished file, whose biases are already scaled."""
    factor = file.others.get("norm_factor")
    if factor is None and "norm_factor" in file.headers:
        factor = file.entry("norm_factor").number()
    if factor is None:
        return 1.0
    if isinstance(factor, Tensor):
        if factor.numel() != 1 or factor.is_complex():
            raise SteersmanError(f"{file.path}: norm_factor has shape {list(factor.shape)}, it should be one number")
        factor = factor.item()
    return positive(factor, "norm_factor", file.path)


def _hook(trainer: dict[str, Any], path: Path) -> str:
    layer, submodule = trainer.get("layer"), text(trainer, "submodule_name", "", path)
    model = text(trainer, "lm_name", "", path)
    if "hook_" in submodule:
        return submodule
    if isinstance(layer, list):
        layer = layer[0] if len(layer) == 1 else None
    if isinstance(layer, bool) or not isinstance(layer, int):
        return hook_of_model(submodule, model)
    if "mlp" in submodule:
        return hook_of_model(f"layers.{layer}.mlp", model)
    return hook_of_model(f"layers.{layer}.self_attn" if "att" in submodule else f"layers.{layer}", model)


def _class_for(sae: SAE) -> str:
    """The class that computes what the SAE does. Raises SteersmanError where none does."""
    cfg = sae.cfg
    reasons = {
        "transcoders": cfg.transcoder,
        "skip connections": cfg.skip_connection,
        f"input normalisation {cfg.input_norm!r}": cfg.input_norm != "none",
        "inputs per attention head": cfg.reshape_heads,
        cfg.architecture: cfg.architecture not in CLASSES.values(),
    }
    unfit = [what for what, holds in reasons.items() if holds]
    if unfit:
        raise SteersmanError(f"dictionary_learning cannot express {'; '.join(unfit)}")
    if cfg.architecture == "relu":
        return "AutoEncoder" if cfg.apply_b_dec_to_input else "AutoEncoderNew"
    keeps = cfg.architecture == "jumprelu"
    if cfg.apply_b_dec_to_input and keeps:
        raise SteersmanError("dictionary_learning cannot express a JumpReLU SAE that subtracts b_dec from its input")
    if not cfg.apply_b_dec_to_input and not keeps:
        raise SteersmanError(
            f"dictionary_learning cannot express a {cfg.architecture} SAE that keeps b_dec in its input"
        )
    return {ours: kind for kind, ours in CLASSES.items()}[cfg.architecture]


def _tensors_of(kind: str, sae: Any) -> dict[str, Tensor]:
    cfg = sae.cfg
    counts = {"k": torch.tensor(cfg.k, dtype=torch.int)}
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors["threshold"] = sae.threshold
        if kind == "JumpReluAutoEncoder":
            return tensors
        return tensors | counts | {"group_sizes": torch.tensor(cfg.group_sizes)}
    tensors = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    if kind == "GatedAutoEncoder":
        return tensors | {
            "decoder_bias": sae.b_dec,
            "gate_bias": sae.b_gate,
            "mag_bias": sae.b_mag,
            "r_mag": sae.r_mag,
        }
    tensors["encoder.bias"] = sae.b_enc
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return tensors | {"bias" if kind == "AutoEncoder" else "decoder.bias": sae.b_dec}
    threshold = sae.threshold if kind == "BatchTopKSAE" else torch.tensor(-1.0)
    return tensors | counts | {"b_dec": sae.b_dec, "threshold": threshold}
