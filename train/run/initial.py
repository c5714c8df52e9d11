"""Fine-tuning: a run that starts from the weights of an SAE that is there, of any format that opens.

The weights are brought to the units of training, in which they were before they were folded into a file; so no step at
all gives back the same SAE. What a file has beside weights, statistics and labels of features, stays behind: both are
of the old features.

Shape letters: L latents.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steersman.errors import SteersmanError
from steersman.lm.digest import tensor_hash
from steersman.sae import SAE, SAEConfig
from steersman.train.run.inputs import Inputs

log = logging.getLogger(__name__)

_SAME_LENGTH = 0.01
"""How far the lengths of decoder rows may be from one another where what is active depends on them: bf16 and averages
leave them so."""
_IN_UNITS_OF_ACTIVATIONS = ("b_enc", "b_gate", "b_mag", "threshold")


class InitialSAE:
    """The SAE at `path`, checked to be one that a run of the configuration `cfg` can start from."""

    def __init__(self, path: str, cfg: SAEConfig) -> None:
        """Raises SteersmanError for an SAE that cannot be opened, and for one of another architecture, width or hook
        point, naming both."""
        self.path, self.sae = path, SAE.load(path)
        _check(path, self.sae.cfg, cfg)
        _make_unit(path, self.sae)
        self.cfg = replace(cfg, apply_b_dec_to_input=self.sae.cfg.apply_b_dec_to_input)
        """`cfg`, as the SAE there has what files may differ in."""
        tensors = self.sae.state_dict()
        self.digest = tensor_hash(*(tensors[name] for name in sorted(tensors)))
        """Sixteen hexadecimal digits of the weights."""

    @torch.no_grad()
    def copy_into(self, sae: SAE, inputs: Inputs, held: tuple[int, int]) -> None:
        """Give an SAE in training, which has the latents `held` of all, these weights in the units of `inputs`."""
        whole, trained = self.sae.state_dict(), dict(sae.named_parameters())
        for name, value in sae.state_dict().items():
            if name not in whole and name in trained:
                raise SteersmanError(f"init {self.path}: a {sae.name} SAE in training has a {name}, which files lack")
            if name not in whole:  # a counter that only training has begins as ever
                continue
            dim = sae.latent_dim(name)
            value.copy_(whole[name] if dim is None else whole[name].narrow(dim, held[0], held[1] - held[0]))
        inputs.unfold(sae)


def _check(path: str, known: SAEConfig, cfg: SAEConfig) -> None:
    kinds: list[tuple[str, Any, Any]] = [
        ("architecture", known.architecture, cfg.architecture),
        ("d_in", known.d_in, cfg.d_in),
        ("d_sae", known.d_sae, cfg.d_sae),
        ("groups", known.group_sizes, cfg.group_sizes),
        ("output", _output(known), _output(cfg)),
    ]
    for name, theirs, ours in kinds:
        if theirs != ours:
            raise SteersmanError(
                f"init {path} is an SAE of {name} {theirs}, and this run trains {name} {ours}: make them the same, or "
                "train without init"
            )
    if known.input_norm != "none" or known.reshape_heads:
        what = f"normalises each token ({known.input_norm})" if known.input_norm != "none" else "reads attention heads"
        raise SteersmanError(f"init {path} {what}, which no SAE in training does: train without init")
    if known.hook_name and cfg.hook_name and known.hook_name != cfg.hook_name:
        raise SteersmanError(
            f"init {path} is an SAE of {known.hook_name}, and this run reads {cfg.hook_name}, where other features "
            "are: train without init"
        )
    if known.model_name and cfg.model_name and known.model_name != cfg.model_name:
        log.warning("init %s is of %s; the features go on with %s", path, known.model_name, cfg.model_name)
    if known.k != cfg.k:
        log.warning("init %s has k %d; it goes on with k %d", path, known.k, cfg.k)


def _output(cfg: SAEConfig) -> str:
    skip = " with a skip connection" if cfg.skip_connection else ""
    return f"{cfg.hook_name_out or cfg.out_width}{skip}" if cfg.transcoder else f"what it reads{skip}"


@torch.no_grad()
def _make_unit(path: str, sae: SAE) -> None:
    """Make decoder rows unit vectors, as training keeps them, and the activations as many times larger."""
    lengths = sae.W_dec.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    least, most = float(lengths.min()), float(lengths.max())
    threshold = getattr(sae, "threshold", None)
    depends = sae.exact_k or (isinstance(threshold, Tensor) and not threshold.ndim)
    if depends and most > (1 + _SAME_LENGTH) * least:
        raise SteersmanError(
            f"init {path} has decoder rows of lengths {least:.3g} to {most:.3g}: with rows of one length, as training "
            f"keeps them, a {sae.name} SAE would choose other features; train without init"
        )
    sae.W_dec.div_(lengths[:, None])
    sae.W_enc.mul_(lengths)
    for name in _IN_UNITS_OF_ACTIVATIONS:
        tensor = getattr(sae, name, None)
        if isinstance(tensor, Tensor):
            tensor.mul_(lengths if tensor.ndim else lengths.mean())
