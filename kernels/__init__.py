"""The arithmetic of a sparse autoencoder on raw tensors.

`reference` defines the results, `torch_ops` computes them fast with PyTorch and `triton_ops` with fused kernels on
NVIDIA GPUs, `dispatch` chooses, `autograd` gives them gradients, and `ops` makes operators of them that `torch.compile`
knows. `update` defines the fused backward pass and update of a training step, `rounding` how its state is kept in fewer
bits.
"""

from steersman.kernels.autograd import Order, sparse_decode, topk_encode, with_gradient
from steersman.kernels.dispatch import Implementation, choose, using
from steersman.kernels.operands import precision
from steersman.kernels.update import AuxRows, RuleName, StateDtype, UpdateRule, UpdateState

__all__ = [
    "AuxRows",
    "Implementation",
    "Order",
    "RuleName",
    "StateDtype",
    "UpdateRule",
    "UpdateState",
    "choose",
    "precision",
    "sparse_decode",
    "topk_encode",
    "using",
    "with_gradient",
]
