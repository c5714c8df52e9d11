"""The arithmetic of a sparse autoencoder on raw tensors.

`reference` defines the results, `torch_ops` computes them fast with PyTorch and `triton_ops` with fused kernels on
NVIDIA GPUs, `dispatch` chooses, `autograd` gives them gradients, and `ops` makes operators of them that `torch.compile`
knows. `update` defines the fused backward pass and update of a training step, `rounding` how its state is kept in fewer
bits. A function has the same signature wherever it exists; `signed` codes (AbsTopK) may be negative.

Names in the Triton kernels: `x_ptr` points to the first element of the tensor x; `x` and `w` of a product are tensor
descriptors where the copy engine loads them, else such pointers. Capital letters are sizes, by each file's shape
letters; capitals declared `tl.constexpr` are known when a kernel is compiled: tiles (BM, BN, BK, BLOCK_D, ...) and
switches (MODE, SIGNED, ...). Kernels are launched by keyword, by the plain function below them.
"""

from steersman.deprecation import moved
from steersman.kernels.autograd import (
    Order,
    collect_row_gradients,
    gather_rows,
    sparse_decode,
    topk_encode,
    with_gradient,
)
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
    "collect_row_gradients",
    "gather_rows",
    "precision",
    "sparse_decode",
    "topk_encode",
    "using",
    "with_gradient",
]

__getattr__ = moved(
    __name__, {"Fused": "steersman.kernels.update:UpdateState", "Rule": "steersman.kernels.update:UpdateRule"}
)
