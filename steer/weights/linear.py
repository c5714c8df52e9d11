"""The linear layers that write to the residual stream: what reads the heads' outputs, and what reads the neurons.

Shape letters: B rows, S tokens, D width of what is written, E width of what is read.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steersman.errors import SteersmanError
from steersman.lm import LanguageModel

Part = Literal["attn", "mlp"]
_READS = {"attn": "attn.hook_z", "mlp": "mlp.hook_post"}
_WRITES = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}
_TOKENS = 6
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, kw_only=True)
class OutputLayer:
    """A linear layer whose output, times `factor`, is what a block adds to the residual stream."""

    path: str
    """Of the module, from the model."""
    module: nn.Module
    factor: float

    @property
    def turned(self) -> bool:
        """Whether the weight is kept as [E, D], as GPT-2's Conv1D does, and not as [D, E]."""
        return not isinstance(self.module, nn.Linear)

    def matrix(self) -> Tensor:
        """W [D, E] of factor (W x + b): a view of the weight, without the factor."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if self.turned else weight


def output_layer(lm: LanguageModel, layer: int, part: Part) -> OutputLayer:
    """The layer that carries a block's heads ("attn") or neurons ("mlp") into the residual stream.

    It is tried on the model: what the block adds must be `factor` (W x + b) of what the layer reads. Raises
    SteersmanError where it is not: behind a norm (Gemma 2 and 3, OLMo 2), in a mixture of experts, in quantised or
    split weights.
    """
    reads, writes = (lm.hook_point(f"blocks.{layer}.{names[part]}") for names in (_READS, _WRITES))
    module = reads.module
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        raise SteersmanError(f"{reads.path} of {lm.name} is a {type(module).__name__}, not a plain linear layer")
    found = OutputLayer(path=reads.path, module=module, factor=writes.factor)
    if lm.tensor_parallel or not found.matrix().is_floating_point():
        raise SteersmanError(f"the weights of {lm.name} are split or quantised: load it whole, in floating point")
    ids = torch.arange(1, _TOKENS + 1, device=lm.device)[None] % int(lm.config.vocab_size)
    with lm.unedited():
        seen: dict[str, Tensor] = lm.capture(ids, hooks=[reads.name, writes.name])
    with torch.no_grad():
        bias: Any = getattr(module, "bias", None)
        expected = seen[reads.name] @ found.matrix().T.to(seen[reads.name].dtype)
        expected = found.factor * (expected if bias is None else expected + bias)
    error = (expected - seen[writes.name]).float().norm() / seen[writes.name].float().norm()
    if not float(error) < _ROUNDING.get(lm.dtype, 0.03):
        raise SteersmanError(
            f"what block {layer} of {lm.name} adds at {writes.name} is not what {reads.path} returns: a norm or "
            "something else stands between"
        )
    return found
