"""The norm between the last block and the output layer, and its gain: found and measured, not read from names."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from steersman.lm.layout import submodule
from steersman.lm.probe import first_input, probe, states_of

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "emb_layer_norm_after")
"""What the module is called beside the list of blocks, in the families that call it so."""
_ROWS = 64


def find_final_norm(model: nn.Module, path: str, blocks: nn.ModuleList, width: int) -> nn.Module | None:
    """The norm that reads the last block's output; None for models that have none. `path` is that of `blocks`.

    Where no name tells it, a pass over a few tokens does: the last norm outside the blocks that is given what the last
    block returned.
    """
    parent: Any = submodule(model, path.rpartition(".")[0])
    for name in FINAL_NORMS:
        if isinstance(norm := getattr(parent, name, None), nn.Module) and not isinstance(norm, nn.Identity):
            return norm
    last: list[Tensor] = []
    found: list[nn.Module] = []

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        if (x := states_of(output, width)) is not None:
            last[:] = [x]

    def norm_reads(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = states_of(first_input(args, kwargs), width)
        if x is not None and last and torch.equal(x, last[0]):
            found.append(module)

    def attach() -> list[Any]:
        norms = [
            module
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower() and not name.startswith(f"{path}.")
        ]
        handles = [module.register_forward_pre_hook(norm_reads, with_kwargs=True) for module in norms]
        return [blocks[-1].register_forward_hook(end), *handles]

    try:
        probe(model, attach)
    except Exception:  # a model that a plain pass over text does not run has no norm to name
        return None
    return found[-1] if found else None


@torch.no_grad()
def norm_gain(norm: nn.Module | None) -> Tensor:
    """The factor per dimension [D] that the norm multiplies normalised states by; one for a norm without weights.

    Measured: the slope of what it returns over the input normalised, with or without its mean, whichever it does. Some
    families keep the gain less one, or in another form.
    """
    weight: Any = getattr(norm, "weight", None)
    if norm is None or weight is None:
        return torch.ones(())
    clean = copy.copy(norm)  # in single precision, and without anybody's hooks
    clean._forward_hooks, clean._forward_pre_hooks = OrderedDict(), OrderedDict()
    clean._parameters = {
        name: None if p is None else nn.Parameter(p.detach().float(), requires_grad=False)
        for name, p in norm._parameters.items()
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.numel(), generator=generator).to(weight.device)
    try:
        y = clean(x)
        slopes = [_slope(x - x.mean(1, keepdim=True), y), _slope(x, y)]
    except Exception:  # a norm that cannot be called by itself (weights kept elsewhere): what it is called must do
        return weight.detach().float()
    return min(slopes, key=lambda found: found[1])[0]


def _slope(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Slope of y [N, D] over x, each row scaled to unit mean square, per dimension, and the error that is left."""
    unit = x / x.square().mean(1, keepdim=True).sqrt()
    u, v = unit - unit.mean(0), y.float() - y.float().mean(0)
    slope = (u * v).sum(0) / u.square().sum(0)
    return slope, float((v - slope * u).square().sum())
